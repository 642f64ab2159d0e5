"""`fewstep data`: from a collection of pictures to what a training run reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from fewstep.cli import progress
from fewstep.errors import CheckpointError, InputError, printable, quoted

if TYPE_CHECKING:
    import torch

    from fewstep import Pipeline
    from fewstep.data.cache import CacheKey, Encode
    from fewstep.data.manifest import Manifest
    from fewstep.data.shards import Shards

app = typer.Typer(help="Prepare, cache and look at training data.", no_args_is_help=True)

_WHICH, _WHAT, _WHO = "Which pictures", "What becomes of them", "Who works"
Shown = Callable[[int, int], None]


def _limit(given: str | float) -> float | None:
    return None if given == "off" else float(given)


def _whole_limit(given: str | int) -> int | None:
    return None if given == "off" else int(given)


Limit = Annotated[float | None, Option(parser=_limit, metavar="NUMBER|off", rich_help_panel=_WHICH)]
WholeLimit = Annotated[int | None, Option(parser=_whole_limit, metavar="NUMBER|off", rich_help_panel=_WHICH)]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress, no summary.")]
Out = Annotated[Path, Option("--out", "-o", help="The folder to write.")]


@app.command()
def prepare(
    inputs: Annotated[list[Path], Argument(help="Tar or parquet files, or folders of them.")],
    *,
    out: Out,
    min_size: WholeLimit = 512,
    min_aesthetic: Limit = 5.0,
    max_watermark: Limit = 0.5,
    max_unsafe: Limit = 0.5,
    blocklist: Annotated[Path | None, Option(help="Hashes, one a line.", rich_help_panel=_WHICH)] = None,
    missing: Annotated[str, Option(help="No score or caption: reject or keep.", rich_help_panel=_WHICH)] = "reject",
    max_hamming: Annotated[
        int | None,
        Option(
            "--near",
            parser=_whole_limit,
            metavar="BITS|off",
            help="Of 128, by which lookalikes differ.",
            rich_help_panel=_WHICH,
        ),
    ] = 3,
    side: Annotated[int | None, Option(help="Of a square picture (else --min-size).", rich_help_panel=_WHAT)] = None,
    step: Annotated[int, Option(help="Of the sides of the buckets.", rich_help_panel=_WHAT)] = 64,
    encoding: Annotated[str, Option(help="jpeg or png.", rich_help_panel=_WHAT)] = "jpeg",
    per_shard: Annotated[int, Option(help="The most pictures in a shard.", rich_help_panel=_WHAT)] = 10_000,
    processes: Annotated[int, Option(help="How many work here.", rich_help_panel=_WHO)] = 1,
    engine: Annotated[str, Option(help="local, or ray: the cluster at RAY_ADDRESS.", rich_help_panel=_WHO)] = "local",
    quiet: Quiet = False,
) -> None:
    """Filter, check, deduplicate and cut pictures to buckets; the same command goes on after an interruption."""
    from fewstep.data.executor import ShardExecutor
    from fewstep.data.filter_inputs import Settings
    from fewstep.data.filters import Filter, read_blocklist
    from fewstep.data.prepare import prepare as prepared

    rule = Filter(
        min_size=min_size,
        min_aesthetic=min_aesthetic,
        max_watermark=max_watermark,
        max_unsafe=max_unsafe,
        blocked=read_blocklist(blocklist) if blocklist else frozenset(),
        missing=missing,  # type: ignore[arg-type]
    )
    settings = Settings(
        filter=rule,
        side=side,
        step=step,
        encoding=encoding,  # type: ignore[arg-type]
        max_hamming=max_hamming,
        per_shard=per_shard,
    )
    with _progress("preparing", quiet) as shown:
        executor = ShardExecutor(processes=processes, engine=engine, progress=shown)  # type: ignore[arg-type]
        manifest = prepared(inputs, out, settings, executor)
    if not quiet:
        _print(manifest)
    typer.echo(out)
    if lost := [each["name"] for each in manifest.inputs if each["damage"] and not each["samples"]]:
        raise CheckpointError(
            f"nothing could be read of {len(lost)} inputs, {quoted(lost[0])} first; the rest is in {out}"
        )


@app.command()
def blockworld(
    *,
    out: Out,
    count: Annotated[int, Option("--count", "-n", help="How many pictures.")] = 2000,
    size: Annotated[int, Option(help="Their width.")] = 128,
    seed: Annotated[int, Option(help="The same seed writes the same files.")] = 0,
    per_tar: Annotated[int, Option(help="The most pictures in a tar.")] = 1000,
) -> None:
    """Write blockworld as a collection from the web: tars with captions, scores, duplicates and flaws."""
    import torch

    from fewstep.blockworld.tars import write_blockworld

    torch.set_num_threads(1)  # on a busy machine more threads wait for each other at every small operation
    for path in write_blockworld(out, count, size=size, seed=seed, per_tar=per_tar):
        typer.echo(path)


@app.command()
def cache(
    shards: Annotated[Path, Argument(help="A prepared folder.")],
    *,
    out: Out,
    model: Annotated[str, Option("--model", "-m", help="Whose networks encode.")] = "blocks-base",
    what: Annotated[str, Option(help="latents or text.")] = "latents",
    store: Annotated[str, Option(help="float16, bfloat16 or float32.")] = "float16",
    batch: Annotated[int, Option(help="Pictures encoded at once.")] = 16,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps (else the best here).")] = None,
    quiet: Quiet = False,
) -> None:
    """Encode pictures or captions once, for all epochs; the same command goes on after an interruption."""
    import torch

    import fewstep
    from fewstep.data.cache import write_cache
    from fewstep.data.shards import open_shards
    from fewstep.errors import unknown

    if what not in _ENCODERS:
        raise InputError(unknown("cache", what, _ENCODERS))
    if store not in (formats := ("float16", "bfloat16", "float32")):
        raise InputError(unknown("number format", store, formats))
    data, pipe = open_shards(shards), fewstep.load(model, device=device)
    encode, key = _ENCODERS[what](data, pipe, getattr(torch, store))
    with torch.inference_mode(), _progress("encoding", quiet) as shown:
        for done, total in write_cache(out, data, encode, key, batch=batch):
            shown(done, total)
    typer.echo(out)


@app.command()
def inspect(
    folder: Annotated[Path, Argument(help="A prepared folder.")],
    *,
    verify: Annotated[bool, Option("--verify", help="Compare all checksums; reads every byte.")] = False,
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Show where every picture of a collection went, and whether its shards are whole."""
    from fewstep.data.shards import open_shards

    shards = open_shards(folder)
    if verify and (faults := list(shards.damaged())):
        raise CheckpointError("; ".join(faults))
    if as_json:
        typer.echo(json.dumps(vars(shards.manifest), indent=1))
    else:
        _print(shards.manifest)


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Shown]:
    with progress.bar(shown=not quiet) as bar:
        bar.stage(what)
        yield lambda done, total: bar.bars.update(bar.task, total=total, completed=done)


def _print(manifest: Manifest) -> None:
    """The account in a few lines, on stderr: stdout is for programs."""
    from fewstep.data.filter_inputs import PART

    share = manifest.accepted / manifest.samples if manifest.samples else 0.0
    lines = [f"{manifest.accepted:,} of {manifest.samples:,} pictures accepted ({share:.1%})"]
    lines += [f"  {count:>9,} {reason}" for reason, count in manifest.rejected.items() if count]
    buckets = (f"{each['width']}x{each['height']}: {each['samples']:,}" for each in manifest.buckets)
    lines += [f"buckets {', '.join(buckets) or 'none'}; {len(manifest.shards)} shards"]
    unused = {reason: count for reason, count in manifest.members.items() if reason != PART}
    lines += [f"members of tars that are part of no picture: {sum(unused.values()):,}"] if unused else []
    lines += [f"  {count:>9,} {reason}" for reason, count in unused.items()]
    lines += [f"damaged input {name} {damage}" for name, damage in manifest.damaged.items()]
    print(printable("\n".join(lines)), file=sys.stderr)


def _latents(shards: Shards, pipe: Pipeline, dtype: torch.dtype) -> tuple[Encode, CacheKey]:
    from fewstep.data.cache import latent_encoder, latent_key

    vae = pipe.networks.autoencoder
    key = latent_key(shards, vae.state_dict(), vae.config.scaling_factor, dtype)
    return latent_encoder(shards, pipe.engine.encode, dtype), key


def _text(shards: Shards, pipe: Pipeline, dtype: torch.dtype) -> tuple[Encode, CacheKey]:
    from fewstep.data.cache import text_encoder, text_key
    from fewstep.text.prompt import tokenize

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pipe.engine.encode_text([tokenize(captions, words, chunk=False).ids for words in pipe.tokenizers])

    key = text_key(shards, [tower.state_dict() for tower in pipe.networks.text_encoders], dtype)
    return text_encoder(shards, encode, dtype), key


_ENCODERS = {"latents": _latents, "text": _text}
