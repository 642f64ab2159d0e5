"""From a collection to shards: filtered, checked, without duplicates, cut to buckets, and every picture accounted for.

Each input is filtered on its own, then one look at all the reports chooses, then each shard is packed on its own. What
a task writes depends on its input alone and appears whole or not at all. So the result is the same byte for byte
with any number of processes, on a cluster, and after any number of kills.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.buckets import Size
from fewstep.data.duplicates import Deduplicator
from fewstep.data.executor import ShardExecutor
from fewstep.data.filter_inputs import PART, FilterTask, Json, Settings, filter_input
from fewstep.data.filters import Reason
from fewstep.data.manifest import (
    FORMAT,
    INDEX,
    INDEX_TYPES,
    REJECTED,
    SUCCESS,
    WORK,
    Manifest,
    made_with,
    read_manifest,
    write_index,
    write_manifest,
)
from fewstep.data.pack import ByteRange, PackTask, pack
from fewstep.data.sources import input_files
from fewstep.errors import InputError, printable, quoted
from fewstep.files import PARTIAL, atomic_write, read_json, write_json

SUFFIXES = {"jpeg": "jpg", "png": "png"}


def prepare(
    inputs: Iterable[str | Path],
    folder: str | Path,
    settings: Settings | None = None,
    executor: ShardExecutor | None = None,
) -> Manifest:
    """Make shards in `folder` of the pictures in `inputs`: tar or parquet files, or folders of them.

    What lies in `folder` itself is no input. A run that was interrupted goes on; one that is finished is only read. Of
    duplicates the first in the order of the inputs stays. Damaged pictures and inputs are counted in the manifest.
    Raises `InputError` for inputs that are not there, for a folder that holds something else, and where no picture was
    accepted (the account is written then too), and `OSError` for a full disk.
    """
    settings, executor, folder = settings or Settings(), executor or ShardExecutor(), Path(folder)
    files = [file for file in input_files(inputs) if folder.resolve() not in file.resolve().parents]
    plan = _plan(files, settings)
    if (folder / SUCCESS).is_file():
        return _required_some(_finished(folder, plan), folder)
    work = _work_folder(folder, plan)
    filtering = [
        FilterTask(source=file.resolve(), output=work / f"input-{number:06d}.json") for number, file in enumerate(files)
    ]
    executor.run(partial(filter_input, settings), filtering)
    selection = _chosen(filtering, settings)
    packing = list(_pack_tasks(selection, settings, folder.resolve(), work))
    executor.run(pack, packing)
    manifest = _account(folder, plan, selection, packing)
    write_manifest(folder, manifest)
    shutil.rmtree(work)
    return _required_some(manifest, folder)


def _required_some(manifest: Manifest, folder: Path) -> Manifest:
    if manifest.accepted:
        return manifest
    reasons = [f"{count:,} {reason}" for reason, count in manifest.rejected.items() if count]
    unused = [f"{count:,} {reason}" for reason, count in manifest.members.items() if count and reason != PART]
    members = f"; members that are part of none: {', '.join(unused)}" if unused else ""
    damaged = "".join(f"; {name} {damage}" for name, damage in list(manifest.damaged.items())[:3])
    raise InputError(
        f"none of {manifest.samples:,} pictures was accepted "
        f"({', '.join(reasons) or 'none was found'}{members}{damaged}). "
        f"{folder / REJECTED} names each. Mend the inputs or loosen the limits (a score that is missing is no reason "
        "where its limit is off, or with missing=keep), and name another folder"
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What stays, bucket by bucket and in the order of the inputs, and what becomes of the rest.

    A head of `accepted` also holds its `piece`. `rejected`: (number of the input, key, reason); `unused` alike
    for members that are part of no picture. `inputs`: samples, members and damage of each.
    """

    accepted: dict[Size, list[Json]]
    rejected: list[tuple[int, str, str]]
    unused: list[tuple[int, str, str]]
    inputs: list[Json]


def _plan(files: Sequence[Path], settings: Settings) -> Json:
    inputs = [{"name": _readable_name(file), "bytes": file.stat().st_size} for file in files]
    return {"made_with": made_with(), "settings": settings.as_json(), "inputs": inputs}


def _readable_name(path: Path) -> str:
    r"""The path with `/`; bytes that are no UTF-8 as `\xff`, since JSON cannot hold them."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _finished(folder: Path, plan: Json) -> Manifest:
    manifest = read_manifest(folder)
    inputs = [{name: each[name] for name in ("name", "bytes")} for each in manifest.inputs]
    _require_same(folder, {"made_with": manifest.made_with, "settings": manifest.settings, "inputs": inputs}, plan)
    return manifest


def _work_folder(folder: Path, plan: Json) -> Path:
    """The folder of unfinished work, in which the plan stands; what a killed run left half written is swept out."""
    work = folder / WORK
    if not work.is_dir() and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty and holds no preparation to go on with; name another folder")
    work.mkdir(parents=True, exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    for left in folder.rglob(f".*{PARTIAL}"):
        left.unlink(missing_ok=True)
    if (work / "plan.json").is_file():
        _require_same(folder, read_json(work / "plan.json"), plan)
    else:
        write_json(work / "plan.json", plan)
    return work.resolve()


def _require_same(folder: Path, before: Json, now: Json) -> None:
    for name in ("settings", "inputs", "made_with"):
        known = before.get(name) if isinstance(before, dict) else None
        if known != now[name]:
            difference = _difference(name, known, now[name])
            raise InputError(f"{folder} was begun with other {difference}; name another folder")


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):
        return f"inputs ({len(before)} then, {len(now)} now, or of other sizes)"
    earlier = before if isinstance(before, dict) else {}
    changed = next((key for key in {**now, **earlier} if earlier.get(key) != now.get(key)), name)
    then = quoted(earlier.get(changed))
    return f"{name.replace('made_with', 'versions')} ({quoted(changed)}: {then} then, {quoted(now.get(changed))} now)"


def _chosen(tasks: Sequence[FilterTask], settings: Settings) -> Selection:
    deduplicator, sizes = Deduplicator(settings.max_hamming), settings.sizes
    accepted: list[list[Json]] = [[] for _ in sizes]
    rejected: list[tuple[int, str, str]] = []
    unused: list[tuple[int, str, str]] = []
    inputs = []
    for number, task in enumerate(tasks):
        report = read_json(task.output)
        samples = len(report["kept"]) + len(report["rejected"])
        inputs.append({"samples": samples, "members": report["members"], "damage": report["damage"]})
        rejected += [(number, key, reason) for key, reason in report["rejected"]]
        unused += [(number, name, reason) for name, reason in report["unused"]]
        for head in report["kept"]:
            if reason := deduplicator.rejection(head["sha256"], int(head["looks"], 16)):
                rejected.append((number, head["key"], reason.value))
                continue
            piece = ByteRange(
                source=task.output.with_suffix(".pictures"), start=head["start"], parts=tuple(head["parts"])
            )
            accepted[head["bucket"]].append(head | {"piece": piece})
    used = {size: heads for size, heads in zip(sizes, accepted, strict=True) if heads}
    return Selection(accepted=used, rejected=rejected, unused=unused, inputs=inputs)


def _pack_tasks(selection: Selection, settings: Settings, folder: Path, work: Path) -> Iterator[PackTask]:
    """Shards of at most `per_shard` pictures, each of one bucket; pictures are numbered throughout."""
    first = 0
    for size, heads in selection.accepted.items():
        for number, start in enumerate(range(0, len(heads), settings.per_shard)):
            pieces = [head["piece"] for head in heads[start : start + settings.per_shard]]
            name = f"{size.width}x{size.height}-{number:05d}"
            yield PackTask(
                pieces=pieces,
                shard=folder / "shards" / f"{name}.tar",
                first=first,
                suffix=SUFFIXES[settings.encoding],
                output=work / f"shard-{name}.json",
            )
            first += len(pieces)


def _account(folder: Path, plan: Json, selection: Selection, packing: Sequence[PackTask]) -> Manifest:
    reports = [read_json(task.output) for task in packing]
    _write_rejected(folder / REJECTED, selection, plan["inputs"])
    heads = [head | {"bucket": i} for i, heads in enumerate(selection.accepted.values()) for head in heads]
    rows = {name: [head.get(name) for head in heads] for name in INDEX_TYPES}
    rows["shard"] = [number for number, task in enumerate(packing) for _ in task.pieces]
    written = [member for report in reports for member in report["members"]]
    places = ("start", "length", "told_start", "told_length", "crc")
    rows |= {name: [member[i] for member in written] for i, name in enumerate(places)}
    reasons = Counter(reason for _, _, reason in selection.rejected)
    members = sum((Counter(each["members"]) for each in selection.inputs), Counter[str]())
    return Manifest(
        format=FORMAT,
        made_with=plan["made_with"],
        settings=plan["settings"],
        inputs=[named | counted for named, counted in zip(plan["inputs"], selection.inputs, strict=True)],
        samples=sum(each["samples"] for each in selection.inputs),
        members=dict(members),
        accepted=len(heads),
        rejected={reason.value: reasons[reason.value] for reason in Reason},
        buckets=[
            {"width": size.width, "height": size.height, "samples": len(heads)}
            for size, heads in selection.accepted.items()
        ],
        shards=[
            {"name": task.shard.name, "samples": len(task.pieces), "bytes": report["bytes"], "sha256": report["sha256"]}
            for task, report in zip(packing, reports, strict=True)
        ],
        index=write_index(folder / INDEX, rows, [head["sha256"] for head in heads]),
    )


def _write_rejected(path: Path, selection: Selection, inputs: Sequence[Json]) -> None:
    """A table of all pictures that were left out, and of members that are part of none."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("input", "key", "reason"))
    rows = (*selection.rejected, *selection.unused)
    table.writerows((inputs[number]["name"], printable(key), reason) for number, key, reason in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
