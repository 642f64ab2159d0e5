"""`fewstep generate`: images from a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from fewstep.cli import checks, options, outputs, progress
from fewstep.cli.settings import complete_settings, refines_finished_image, task_keywords
from fewstep.errors import printable, quoted
from fewstep.safety.provenance import Settings, image_metadata

if TYPE_CHECKING:
    from fewstep import Pipeline, Result, Run


def generate(
    prompt: options.Prompt = None,
    *,
    output: options.Output = None,
    model: options.Model = None,
    lora: options.Lora = None,
    negative_prompt: options.NegativePrompt = None,
    steps: options.Steps = None,
    guidance_scale: options.Guidance = None,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    size: options.Size = None,
    width: options.Side = None,
    height: options.Side = None,
    seed: options.Seed = None,
    images: options.Images = None,
    like: options.Like = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    init: options.Init = None,
    strength: options.Strength = None,
    mask: options.Mask = None,
    refiner: options.Refiner = None,
    handoff: options.Handoff = None,
    revision: options.Revision = None,
    prediction: options.Prediction = None,
    tokenizer: options.Tokenizer = None,
    decoder: options.Decoder = None,
    device: options.Device = None,
    dtype: options.DType = None,
) -> None:
    """Generate images from a prompt. What you leave out is the model's own default."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("output", "force", "quiet"):
        given.pop(name, None)
    where = outputs.destination(output)
    settings = complete_settings(given)
    checks.check(settings)
    outputs.check_vacant(where, settings.get("images_per_prompt", 1), force=force)
    outputs.show(_generate(settings, where, quiet))


def _generate(settings: Settings, where: outputs.Destination, quiet: bool) -> list[Path]:
    started = perf_counter()
    with progress.bar(shown=not quiet) as bar:
        bar.stage("loading")
        import fewstep

        place = {name: settings.get(name) for name in ("device", "dtype")}
        how = {name: settings.get(name) for name in ("revision", "prediction", "tokenizer", "decoder")}
        pipe = fewstep.load(settings.get("model"), **place, **how)
        refiner = fewstep.load(settings["refiner"], **place) if "refiner" in settings else None
        for file, scale in settings.get("lora", ()):
            fewstep.add_lora(pipe, file, scale)
        loaded = perf_counter() - started
        result = run_task(pipe, refiner, settings, bar)
        metadata = image_metadata(settings, result.settings, where.folder)
        written = outputs.save(result, metadata, where)
    if not quiet:
        tell(f"loaded in {loaded:.1f} s; {summary(result)}", *notes(result, pipe.spec.name))
    return written


def run_task(pipe: Pipeline, refiner: Pipeline | None, settings: Settings, bar: progress.Bar) -> Result:
    """The images of `settings`, by text to image, image to image, inpainting or with a refiner."""
    keywords = task_keywords(settings)
    if refiner is None or not refines_finished_image(settings):
        return _run(pipe.start(**keywords, refiner=refiner), bar)
    strength = keywords.pop("strength")
    first = _run(pipe.start(**keywords), bar)
    return _regenerate(first, refiner, keywords | {"strength": strength}, bar)


def summary(result: Result) -> str:
    """One line for people: time, seed, tokens."""
    count, dropped = len(result.images), max(result.tokens_dropped)
    parts = [
        f"{count} image{'s' * (count > 1)} in {sum(result.seconds.values()):.1f} s",
        f"seed {result.seeds[0]}" if count == 1 else f"seeds {result.seeds[0]} to {result.seeds[-1]}",
        f"{result.tokens_used[0]} tokens" + f" in {result.chunks} chunks" * (result.chunks > 1),
    ]
    if dropped:
        parts.append(f"{dropped} tokens dropped")
    return "; ".join(parts)


def notes(result: Result, model: str) -> list[str]:
    """A line for each thing that the user should know: words that the model does not know, options without effect."""
    words = [unknown_words(result.unknown_words, model)] if result.unknown_words else []
    return [*words, *getattr(result, "notes", ())]


def unknown_words(words: Sequence[str], model: str) -> str:
    """The sentence that names words of a prompt, and where those that the model knows are listed."""
    from fewstep.models.zoo import CATALOGUE

    hint = f"; those it knows: fewstep models {model}" if model in CATALOGUE else ""
    return f"words the model does not know: {', '.join(map(shown, words))}{hint}"


def shown(word: str) -> str:
    """A word of a prompt as it is, or quoted where a terminal would act on it."""
    return word if word.isprintable() and len(word) <= 40 else quoted(word, 40)


def tell(*lines: str) -> None:
    """Print lines for people, on stderr."""
    for line in lines:
        print(printable(line), file=sys.stderr)


def _run(run: Run, bar: progress.Bar) -> Result:
    for step in run:
        bar.on_step(step)
    bar.stage("decoding")
    return run.result()


def _regenerate(first: Result, refiner: Pipeline, keywords: Settings, bar: progress.Bar) -> Result:
    """The images of `first` regenerated by `refiner`, with the same steps, guidance and sampler."""
    same_settings = {name: first.settings[name] for name in ("steps", "guidance_scale", "sampler", "schedule")}
    one_each = {
        "prompt": [first.settings["prompt"]] * len(first.images),
        "image": first.images,
        "seed": first.seeds,
        "images_per_prompt": 1,
    }
    second = _run(refiner.start(**{**keywords, **same_settings, **one_each}), bar)
    seconds = {name: first.seconds.get(name, 0.0) + value for name, value in second.seconds.items()}
    return replace(first, images=second.images, seconds=seconds)
