"""Finding a model and its files: shipped with fewstep, on this disk, or on the hub; without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.errors import CheckpointError, InputError
from fewstep.models.zoo import CATALOGUE, Entry, entry, entry_of_source

ASSETS = Path(__file__).parent.parent / "assets"
_ID = re.compile(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")
_REVISION = re.compile(r"[A-Za-z0-9._-]{1,96}(/[A-Za-z0-9._-]{1,96})*")
_FILE_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LARGEST_CONFIG = 4_000_000  # bytes
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def located(what: str | Path, *, half: bool, revision: str | None = None) -> tuple[Path, Entry | None]:
    """The folder or file that `what` names, downloaded if need be, and its entry of the catalogue, if any.

    A name of the catalogue comes first, then a path that exists, then a hub id `owner/name`. `half` prefers the
    files in half precision. InputError for a name that is none of them.
    """
    if isinstance(what, str) and what in CATALOGUE:
        return _of_entry(CATALOGUE[what], half, revision), CATALOGUE[what]
    path = Path(what).expanduser()
    if path.exists():
        return path, None
    if isinstance(what, Path) or what.endswith(_FILE_ENDINGS) or what.startswith((".", "/", "~")):
        raise InputError(f"there is no file or folder {str(what)!r}; is the path relative to another folder?")
    if not _ID.fullmatch(what) or ".." in what:
        entry(what)  # which raises, and names the nearest
    return fetch(what, half=half, revision=revision), entry_of_source(what)


def fetch(source: str, *, half: bool, revision: str | None = None) -> Path:
    """The folder of the hub repository `source`, from the local cache where it is complete there, else downloaded.

    Only what drawing needs is taken. CheckpointError when it cannot be had, InputError for a malformed name.
    """
    if not _ID.fullmatch(source) or ".." in source:
        raise InputError(f"{source!r} is not a hub id; expected owner/name of letters, digits, '.', '_' and '-'")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(f"{revision!r} is not a revision; expected a branch, a tag or a commit")
    cached = cached_folder(source, revision)
    if cached is not None and _complete(cached, half=half):
        return cached
    from huggingface_hub import HfApi, snapshot_download

    try:
        listed = HfApi().model_info(source, revision=revision).siblings or ()
        wanted = wanted_files([file.rfilename for file in listed], half=half)
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except Exception as error:  # hub, HTTP and system errors, by other names in each version of the hub's library
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source} is not in the local cache and could not be downloaded ({reason}). Check the name and the "
            "network; log in with `hf auth login` if it is gated; or give the path of a folder or file"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if there is none, or it is over 4 MB."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise CheckpointError(f"{path} is {path.stat().st_size:,} bytes; a config has at most {LARGEST_CONFIG:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parts_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the networks that a model_index.json lists, text towers in their order."""

    def present(name: str) -> bool:
        value = index.get(name)
        return isinstance(value, list) and any(value)

    return tuple(name for name in NETWORKS if present(name))


def weight_file(names: Iterable[str], *, half: bool) -> str | None:
    """Which of a part's file `names` to load: a file of weights or the index of its shards; None without any.

    Safetensors before pickles; the fp16 variant first when `half`, else only where nothing else is.
    """
    present = set(names)
    variants = (".fp16", "") if half else ("", ".fp16")
    for ending in ("safetensors", "bin"):
        for variant in variants:
            for stem in _STEMS:
                single = f"{stem}{variant}.{ending}"
                indexes = (f"{single}.index.json", f"{stem}.{ending}.index{variant}.json")
                for name in (single, *indexes):
                    if name in present:
                        return name
    return None


def shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names, beside it; CheckpointError for a name that leaves the folder."""
    places = read_json(index).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) and places else [""]
    for name in names:
        if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} names the shard {name!r}; expected names of files beside it")
    return tuple(index.with_name(name) for name in names)


def wanted_files(names: Iterable[str], *, half: bool) -> list[str]:
    """Those of a repository's file `names` that drawing needs: settings, vocabularies, one file of weights a part."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(PurePosixPath(name).name)
    whole = "model_index.json" in folders.get(".", ())
    wanted = [name for name in folders.get(".", ()) if name in ("model_index.json", "config.json")]
    for folder, files in folders.items():
        if folder.startswith("tokenizer") or folder == "scheduler":
            wanted += [f"{folder}/{name}" for name in files if name.endswith((".json", ".txt"))]
        if folder in NETWORKS:
            wanted += [f"{folder}/{name}" for name in ("config.json", *_weights(files, half=half))]
    return wanted if whole else [*wanted, *_weights(folders.get(".", ()), half=half)]


def cached_folder(source: str, revision: str | None = None) -> Path | None:
    """Where the local hub cache keeps `source`, which may lack files; None if it has nothing of it. No network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    store = Path(HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    named = store / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else revision or ""
    folder = store / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def is_cached(known: Entry) -> bool:
    """Whether the entry's model can be loaded without a network."""
    folder = ASSETS / known.name if known.source is None else cached_folder(known.source)
    return folder is not None and _complete(folder, half=False)


def _of_entry(known: Entry, half: bool, revision: str | None) -> Path:
    if known.source is not None:
        return fetch(known.source, half=half, revision=revision)
    folder = ASSETS / known.name
    if not folder.is_dir():
        raise CheckpointError(f"{known.name} should come with fewstep, but {folder} is missing; install fewstep again")
    return folder


def _complete(folder: Path, *, half: bool) -> bool:
    """Whether a folder has all the files that drawing needs."""
    if not (folder / "model_index.json").is_file():
        return (folder / "config.json").is_file() and _has_weights(folder, half=half)
    try:
        names = parts_of(read_json(folder / "model_index.json"))
    except CheckpointError:
        return False
    return all((folder / name / "config.json").is_file() and _has_weights(folder / name, half=half) for name in names)


def _has_weights(folder: Path, *, half: bool) -> bool:
    chosen = weight_file((path.name for path in folder.iterdir() if path.exists()), half=half)
    if chosen is None or ".index." not in chosen:
        return chosen is not None
    return all(path.exists() for path in shards(folder / chosen))


def _weights(names: Iterable[str], *, half: bool) -> list[str]:
    """The file of weights to take of a part's `names`, or the index and its shards."""
    present = list(names)
    chosen = weight_file(present, half=half)
    if chosen is None or ".index." not in chosen:
        return [chosen] if chosen else []
    ending, variant = (".safetensors" if ".safetensors." in chosen else ".bin"), ".fp16" in chosen
    same = [name for name in present if "-of-" in name and name.endswith(ending) and (".fp16" in name) == variant]
    return [chosen, *same]
