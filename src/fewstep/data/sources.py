"""Collections as they come: tar files in the webdataset manner, and parquet tables. Damage is told, not raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fewstep.data.columns import Record
from fewstep.data.raw import Damage, DamageError, Leftover, RawSample
from fewstep.data.tables import table_records, table_samples
from fewstep.data.tar_samples import PICTURES, tar_samples
from fewstep.errors import InputError

__all__ = ["DamageError", "Leftover", "RawSample", "input_files", "samples"]

KINDS = (".tar", ".parquet")


def input_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The tar and parquet files meant by `inputs`, files or folders, in the order in which they are read.

    Folders are searched through and sorted by name. The table beside a tar file of the same name says more of its
    pictures, and is no input of its own. Raises `InputError` where there is nothing to read.
    """
    try:
        files = [file for given in inputs for file in _listed(Path(given))]
    except OSError as error:
        raise InputError(f"the inputs cannot be read: {error}") from error
    tars = {file.with_suffix("") for file in files if _kind(file) == ".tar"}
    chosen = [file for file in files if file.suffix != ".parquet" or file.with_suffix("") not in tars]
    if not chosen:
        raise InputError("no inputs were given; name a folder of tar or parquet files")
    if twice := [file for file, count in Counter(chosen).items() if count > 1]:
        raise InputError(f"{twice[0]} is given twice; name every input once")
    return chosen


def samples(path: Path) -> Iterator[RawSample | Leftover]:
    """The pictures of one tar or parquet file in their order, and the members of a tar that are part of none.

    Once all that can be read was, raises `DamageError` if something could not, and says what. `InputError` if the file
    is gone, `MissingExtraError` where pyarrow is needed and not there; nothing else, whatever the file holds.
    """
    if not path.is_file():
        raise InputError(f"the input {path} is gone; put it back and give the same command again")
    damage = Damage()
    if _kind(path) == ".parquet":
        yield from table_samples(path, damage)
    else:
        yield from tar_samples(path, _table_records(path, damage), damage)
    damage.require_none()


def _table_records(path: Path, damage: Damage) -> dict[str, Record]:
    """The records of the table beside a tar file, by key; none where there is no table."""
    table, own = path.with_suffix(".parquet"), Damage()
    records = table_records(table, own) if table.is_file() else {}
    for fault in own.faults:
        damage.add(f"its table {table.name} {fault}")
    return records


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _listed(given: Path) -> list[Path]:
    if given.is_dir():
        inside = sorted(path for path in given.rglob("*") if not path.name.startswith(".") and path.is_file())
        if files := [path for path in inside if _kind(path) in KINDS]:
            return files
        loose = sum(_kind(path)[1:] in PICTURES for path in inside)
        hint = f", but {loose:,} pictures: put them into one (`tar cf pictures.tar -C {given} .`)" if loose else ""
        raise InputError(f"the folder {given} holds no .tar and no .parquet file{hint}")
    if not given.is_file():
        raise InputError(f"there is no file or folder {str(given)!r} to read")
    if _kind(given) not in KINDS:
        raise InputError(f"{given} is neither a .tar nor a .parquet file")
    return [given]
