"""Finding a model and its files: shipped with fewstep, on this disk, or on the hub; without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import CheckpointError, InputError
from fewstep.files import recover_folder
from fewstep.models.zoo import CATALOGUE, Entry, entry
from fewstep.weights.folder import NETWORKS, parts_of, read_json, weight_file, weight_files

ASSETS = Path(__file__).parent.parent / "assets"
_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]{1,96}(/[A-Za-z0-9._-]{1,96})*")
_FILE_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
_SETTINGS = re.compile(
    r"model_index\.json|((unet|vae|text_encoder(_2)?)/)?config\.json|(tokenizer\w*|scheduler)/[^/]+\.(json|txt)"
)


def located(what: str | Path, *, half: bool, revision: str | None = None) -> tuple[Path, Entry | None]:
    """The folder or file that `what` names, downloaded if need be, and its entry of the catalogue, if any.

    A name of the catalogue comes first, then a path that exists, then a hub id `owner/name`. `half` prefers the
    files in half precision. InputError for a name that is none of them.
    """
    if isinstance(what, str) and what in CATALOGUE:
        known = CATALOGUE[what]
        if known.source is not None:
            return fetch(known.source, half=half, revision=revision), known
        folder = ASSETS / known.name
        if not folder.is_dir():
            raise CheckpointError(f"{what} should come with fewstep, but {folder} is missing; install fewstep again")
        return folder, known
    path = Path(what).expanduser()
    recover_folder(path)
    if path.exists():
        return path, None
    if isinstance(what, Path) or what.endswith(_FILE_ENDINGS) or what.startswith((".", "/", "~")):
        raise InputError(f"there is no file or folder {str(what)!r}; is the path relative to another folder?")
    if not _ID.fullmatch(what):
        entry(what)  # which raises, and names the nearest
    named = next((known for known in CATALOGUE.values() if known.source == what), None)
    return fetch(what, half=half, revision=revision), named


def fetch(source: str, *, half: bool, revision: str | None = None) -> Path:
    """The folder of the hub repository `source`, from the local cache where it is complete there, else downloaded.

    Only what drawing needs is taken. CheckpointError when it cannot be had, InputError for a malformed name.
    """
    if not _ID.fullmatch(source):
        raise InputError(f"{source!r} is not a hub id; expected owner/name of letters, digits, '.', '_' and '-'")
    if revision is not None and not _REVISION.fullmatch(revision):
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


def wanted_files(names: Sequence[str], *, half: bool) -> list[str]:
    """Those of a repository's file `names` that drawing needs: settings, vocabularies, one file of weights a part."""
    wanted = [name for name in names if _SETTINGS.fullmatch(name)]
    for folder in (f"{name}/" for name in NETWORKS) if "model_index.json" in names else ("",):
        files = [file for name in names if name.startswith(folder) and "/" not in (file := name.removeprefix(folder))]
        chosen = weight_file(files, half=half)
        wanted += [folder + name for name in files if name == chosen or (chosen and _is_shard(name, chosen))]
    return wanted


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


def _complete(folder: Path, *, half: bool) -> bool:
    """Whether a folder has all the files that drawing needs."""
    index = folder / "model_index.json"
    try:
        parts = [folder / name for name in parts_of(read_json(index))] if index.is_file() else [folder]
        files = [path for part in parts for path in (part / "config.json", *weight_files(part, half=half))]
    except CheckpointError:
        return False
    return all(path.is_file() for path in files)


def _is_shard(name: str, index: str) -> bool:
    """Whether a file's `name` says that it is one of the shards of that index."""
    ending = ".safetensors" if ".safetensors." in index else ".bin"
    return ".index." in index and "-of-" in name and name.endswith(ending) and (".fp16" in name) == (".fp16" in index)
