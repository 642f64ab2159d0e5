"""Finding a model and its files: shipped with fewstep, on this disk, or on the hub; without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import CheckpointError, InputError, quoted
from fewstep.files import recover_folder
from fewstep.models.zoo import CATALOGUE, Entry, entry
from fewstep.weights.folder import NETWORKS, parts_of, read_json, weight_file, weight_files

ASSETS = Path(__file__).parent.parent / "assets"
HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]{1,96}(/[A-Za-z0-9._-]{1,96})*")
_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/[^?#]*)?)?(?:[?#].*)?"
)
_FILE_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
_SETTINGS = re.compile(
    r"model_index\.json|((unet|vae|text_encoder(_2)?)/)?config\.json|(tokenizer\w*|scheduler)/[^/]+\.(json|txt)"
)


def named(what: str | Path) -> Entry | Path | str:
    """What `what` names: an entry of the catalogue, a path that exists, or a hub id; nothing is downloaded.

    A name of the catalogue comes first, then a path, then other spellings of names, the hub's own addresses and ids.
    InputError for what is none of them.
    """
    path, text = Path(os.path.expanduser(what)), str(what).strip(" \t\"'").rstrip("/")  # noqa: PTH111
    recover_folder(path)
    if what not in ("", *CATALOGUE) and os.path.exists(path):  # noqa: PTH110  (neither raises, whatever the name)
        return path
    if match := _URL.fullmatch(text):
        if (revision := match["revision"] or "main") != "main":
            raise InputError(f"give the hub id {match['id']!r} and the revision {revision!r}, not the address of both")
        text = match["id"]
    if isinstance(what, Path) or text.endswith(_FILE_ENDINGS) or text.startswith((".", "/", "~")) or "://" in text:
        hint = "download it and give its path" if "://" in text else "is the path relative to another folder?"
        raise InputError(f"there is no file or folder {quoted(what)}; {hint}")
    sources = {(known.source or known.name).lower(): known for known in CATALOGUE.values()}
    return sources.get(text.lower()) or (text if HUB_ID.fullmatch(text) else entry(text))


def seen_from(folder: Path, model: str) -> str:
    """A path of weights as seen from `folder`, told from a name by its leading dot; a name unchanged."""
    if model in CATALOGUE or not os.path.exists(model):  # noqa: PTH110
        return model
    return f"./{Path(os.path.relpath(model, folder)).as_posix()}"


def resolve(what: str | Path, *, half: bool, revision: str | None = None) -> tuple[Path, Entry | None]:
    """The folder or file that `what` names, downloaded if need be, and its entry of the catalogue, if any.

    For a model that is derived from another one, the folder of that. `half` prefers the files in half precision.
    InputError for a name that is none; see `named`.
    """
    found = named(what)
    if isinstance(found, Path):
        return found, None
    source, known = (found, None) if isinstance(found, str) else (found.source, found)
    if source is not None:
        return fetch(source, half=half, revision=revision), known
    assert known is not None
    if not (folder := ASSETS / (known.base or known.name)).is_dir():
        raise CheckpointError(f"{known.name} should come with fewstep, but {folder} is missing; install fewstep again")
    return folder, known


def fetch(source: str, *, half: bool, revision: str | None = None) -> Path:
    """The folder of the hub repository `source`, from the local cache where it is complete there, else downloaded.

    Only what drawing needs is taken. CheckpointError when it cannot be had, InputError for a malformed name.
    """
    if not HUB_ID.fullmatch(source):
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


def is_cached(known: Entry | str, revision: str | None = None) -> bool:
    """Whether the entry's model, or that of a hub id, can be loaded without a network."""
    source = known if isinstance(known, str) else known.source
    local = cached_folder(source, revision) if source and _REVISION.fullmatch(revision or "main") else None
    folder = ASSETS / known.name if isinstance(known, Entry) and source is None else local
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
