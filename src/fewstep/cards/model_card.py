"""Model cards, written from training records; text that people added stays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.cards.licences import licence_of, strictest_licence
from fewstep.cards.training_record import TrainingRecord
from fewstep.errors import InputError
from fewstep.models.zoo import CATALOGUE
from fewstep.tables import Cell, format_number, table, write_text

CARD = "README.md"
HUB_RELATIONS = ("finetune", "adapter", "merge")
WORDS = {
    "finetune": "fine-tuned from",
    "adapter": "trained as an adapter for",
    "merge": "merged from",
    "distilled": "distilled from",
}
_REGION = re.compile(r"<!-- fewstep: (\w+) -->\n(.*?)<!-- /fewstep: \1 -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?fewstep: \w+ -->")


def write_card(folder: Path, training: TrainingRecord, parameters: Mapping[str, int]) -> Path:
    """Write or update `README.md` in a model's folder, with the `parameters` of each part; its path.

    Only what stands between the card's marks is written anew, and the entries of the front matter that fewstep
    knows. InputError if the marks of an existing card are damaged.
    """
    path = folder / CARD
    before = path.read_text(encoding="utf-8") if path.exists() else f"# {training.name}\n"
    write_text(path, update_card(before, training, parameters))
    return path


def update_card(card: str, training: TrainingRecord, parameters: Mapping[str, int]) -> str:
    """The text of `card` with fewstep's sections updated; missing sections are appended."""
    from huggingface_hub import ModelCard, ModelCardData

    try:
        old = ModelCard(card)
    except Exception as error:  # the errors of the YAML reader have no common base here
        raise InputError(f"the front matter of the card cannot be read: {error}") from error
    entries, own = dict(old.data.to_dict()), front_matter(training)  # type: ignore[no-untyped-call]
    tags = dict.fromkeys([*(entries.get("tags") or []), *own["tags"]])
    data = ModelCardData(**{**entries, **own, "tags": list(tags)})
    return f"---\n{data.to_yaml().strip()}\n---\n\n{_with_sections(old.text.strip(), sections(training, parameters))}"


def _with_sections(body: str, written: Mapping[str, str]) -> str:
    present = [match[1] for match in _REGION.finditer(body)]
    if len(_MARK.findall(body)) != 2 * len(present) or len(set(present)) != len(present):
        raise InputError("the marks <!-- fewstep: NAME --> of the card are damaged; each opens once and closes once")
    regions = {name: f"<!-- fewstep: {name} -->\n{text}\n<!-- /fewstep: {name} -->" for name, text in written.items()}
    body = _REGION.sub(lambda match: regions.get(match[1], match[0]), body)
    return "\n\n".join([body, *(region for name, region in regions.items() if name not in present)]) + "\n"


def front_matter(training: TrainingRecord) -> dict[str, Any]:
    """The front matter (YAML) that the hub reads."""
    chain = [training.licence, *(ancestor.licence for ancestor in training.ancestors)]
    licence, emissions = strictest_licence(chain), training.emissions
    entries: dict[str, Any] = {
        "license": licence.hub,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["fewstep", "stable-diffusion", "text-to-image"],
        "co2_eq_emissions": {
            "emissions": round(1000 * emissions.kilograms, 3),  # grams
            "source": emissions.statement(),
            "training_type": "fine-tuning" if training.ancestors else "pre-training",
            "hardware_used": ", ".join(dict.fromkeys(stage.hardware for stage in training.stages)),
        },
    }
    if licence.hub == "other":
        entries |= {"license_name": licence.name.lower()} | ({"license_link": licence.link} if licence.link else {})
    if training.ancestors:
        entries["base_model"] = [ancestor.name for ancestor in training.ancestors]
        relations = {ancestor.relation for ancestor in training.ancestors}
        if len(relations) == 1 and relations <= set(HUB_RELATIONS):
            entries["base_model_relation"] = relations.pop()
    return entries


def sections(training: TrainingRecord, parameters: Mapping[str, int]) -> dict[str, str]:
    """The sections that fewstep writes, as Markdown by name, in the card's order."""
    return {
        "about": _about(training, parameters),
        "use": _use(training),
        "data": _data(training),
        "recipe": _recipe(training),
        "emissions": _emissions(training),
        "scores": _scores(training),
        "limits": "\n".join(["## Limits and bias", "", *(f"- {limit}" for limit in training.limits or _NOT_STATED)]),
        "licence": _licence(training),
    }


_NOT_STATED = ("Not stated.",)


def _about(training: TrainingRecord, parameters: Mapping[str, int]) -> str:
    parts = [{"part": name, "parameters": f"{count:,}"} for name, count in parameters.items()]
    origin = [f"It was {WORDS[one.relation]} `{one.name}`." for one in training.ancestors]
    return "\n\n".join(filter(None, [training.summary, " ".join(origin), table(parts) if parts else ""]))


def _use(training: TrainingRecord) -> str:
    example, known = training.example.replace('"', "'"), CATALOGUE.get(training.name)
    embedded = known is not None and known.source is None
    name, where = "FOLDER", "`FOLDER` is where this file is; it has the layout of diffusers."
    if embedded:
        name, where = training.name, "It comes with fewstep, under this name."
    option, keyword = ("--model", "") if known is None or known.family != "tiny" else ("--decoder", "decoder=")
    return f"""## How to use it

```sh
fewstep generate "{example}" {option} {name}
```

```python
import fewstep

pipe = fewstep.load({keyword}"{name}")
pipe.text_to_image("{example}", seed=7).images[0].save("picture.png")
```

{where}"""


def _data(training: TrainingRecord) -> str:
    lines = [
        f"- {source.what} (`{source.digest}`)" + (f"; licence: {source.licence}" if source.licence else "")
        for source in training.data
    ]
    return "\n".join(["## Training data", "", *(lines or ["None: no pictures of its own."])])


def _recipe(training: TrainingRecord) -> str:
    rows: list[dict[str, Cell]] = [
        {
            "stage": stage.name,
            "steps": "not kept" if stage.steps is None else f"{stage.steps:,}",
            "batch": f"{stage.batch:,}",
            "precision": stage.precision,
            "hours": stage.hours,
            "hardware": stage.hardware,
            "settings": ", ".join(f"{name} {value}" for name, value in stage.settings.items()).replace("|", "\\|"),
        }
        for stage in training.stages
    ]
    return f"## Recipe\n\n{table(rows)}"


def _emissions(training: TrainingRecord) -> str:
    power = dict.fromkeys(f"{stage.watts:g} W ({stage.hardware})" for stage in training.stages)
    return (
        f"## Hours and emissions\n\n{format_number(training.hours)} hours. {training.emissions.statement()}.\n\n"
        f"Mean power of each stage, {training.power_source}: {', '.join(power)}. Power times hours times the carbon "
        "intensity of the grid times the building's share (PUE), as in arXiv:1910.09700."
    )


def _scores(training: TrainingRecord) -> str:
    if not training.scores:
        return "## Scores\n\nNone measured."
    rows: list[dict[str, Cell]] = [
        {
            "what": score.what,
            "value": score.value,
            "95 % interval": "" if score.low is None else f"{format_number(score.low)} to {format_number(score.high)}",
            "n": score.count,
            "how": score.how.replace("|", "\\|"),
        }
        for score in training.scores
    ]
    return f"## Scores\n\n{table(rows)}"


def _licence(training: TrainingRecord) -> str:
    """Its licence and those of its ancestors: the strictest of them holds (a student derives from its teacher)."""
    holds = strictest_licence([training.licence, *(ancestor.licence for ancestor in training.ancestors)])
    lines = [f"## Licence\n\n**{holds.name}**: {holds.terms}."]
    if training.ancestors:
        chain = [f"- `{training.name}`: {licence_of(training.licence).name}, of its makers"]
        chain += [f"- {WORDS[one.relation]} `{one.name}`: {licence_of(one.licence).name}" for one in training.ancestors]
        lines += ["The chain of licences, of which the strictest holds:", "\n".join(chain)]
    else:
        lines += ["No other model went into it, so no other licence is inherited."]
    return "\n\n".join(lines)
