"""`fewstep card` and `fewstep emissions`: a model card from a training record, and the carbon emissions of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fewstep.errors import InputError


def card(
    folder: Annotated[Path, typer.Argument(help="A model's folder, with training.json beside the weights.")],
    scores: Annotated[list[Path] | None, typer.Option(help="JSON files with lists of scores to put in.")] = None,
) -> None:
    """Write or update a model's README.md; text that people added stays."""
    from fewstep.cards.model_card import write_card
    from fewstep.cards.training_record import read_scores, read_training
    from fewstep.inspect import checkpoint

    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name that of a model")
    training = read_training(folder)
    added = [score for path in scores or () for score in read_scores(path)]
    training = replace(training, scores=(*training.scores, *added))
    parts = checkpoint.describe(folder).get("parts", {})
    typer.echo(write_card(folder, training, {name: part["parameters"] for name, part in parts.items()}))


def emissions(
    hours: Annotated[float, typer.Argument(help="How long the run took or takes.")],
    *,
    watts: Annotated[float, typer.Option(help="Mean power of all the hardware.")],
    kg_per_kwh: Annotated[float, typer.Option(help="Of the grid: kg of CO2 equivalent for each kWh.")],
    pue: Annotated[float, typer.Option(help="Power of the building for each watt of the hardware.")] = 1.0,
) -> None:
    """Compute the carbon emissions of a run, with all that the number is based on."""
    from fewstep.cards.emissions import Emissions

    typer.echo(Emissions(hours=hours, watts=watts, kg_per_kwh=kg_per_kwh, pue=pue).statement())
