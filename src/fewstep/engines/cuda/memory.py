"""What to do when a card's memory runs short: fewer pictures at a time, then a piece of a picture at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fewstep.errors import InputError

TILE = 64
"""Rows and columns of latents that are decoded at a time."""

OVERLAP = 16
"""Of these, how many neighbouring tiles share: one fades into the other there."""

Rows = Sequence[Tensor | None]


def split_on_oom(
    function: Callable[..., Tensor],
    rows: Rows,
    *,
    forget: Callable[[], None],
    last: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`function` of rows (B, ...); out of memory, of half of them at a time and so on, and of a single one by `last`.

    The pieces together are what the whole would have been, but for `last`. `forget` frees what is cached. Raises
    InputError with the bytes that were wanted and are free.
    """
    try:
        return function(*rows)
    except torch.OutOfMemoryError as error:
        message = str(error)  # not the error itself: it holds on to the tensors of the failed call
    forget()
    assert rows[0] is not None
    count = len(rows[0])
    if count > 1:
        halves = (slice(None, count // 2), slice(count // 2, None))
        pieces = ([None if each is None else each[half] for each in rows] for half in halves)
        return torch.cat([split_on_oom(function, piece, forget=forget, last=last) for piece in pieces])
    if last is not None:
        return split_on_oom(last, rows, forget=forget)
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", message)
    raise InputError(
        f"{wanted[1] if wanted else 'some bytes'} more are needed at once on the card and {_free()} are free; draw "
        "smaller pictures, close other programs that use it, or load the model with decoder='tiny'"
    )


def tiled(decode: Callable[[Tensor], Tensor], latents: Tensor, *, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Latents (1, 4, h, w) decoded a tile at a time, tiles fading into each other.

    Not the same picture to the last bit: norms see one tile at a time. The last tile of a row ends where the row does.
    """
    height, width = latents.shape[2:]
    total = weights = torch.zeros(())
    for rows in _spans(height, tile, overlap):
        for columns in _spans(width, tile, overlap):
            piece = decode(latents[:, :, rows, columns])
            factor = piece.shape[2] // (rows.stop - rows.start)
            if total.dim() == 0:
                total = piece.new_zeros(*piece.shape[:2], height * factor, width * factor)
                weights = total.new_zeros(total.shape[2:])
            down, across = (_ramp(length, overlap * factor, piece) for length in piece.shape[2:])
            fade = down[:, None] * across
            place = [slice(span.start * factor, span.stop * factor) for span in (rows, columns)]
            total[:, :, place[0], place[1]] += piece * fade
            weights[place[0], place[1]] += fade
    return total / weights


def _spans(length: int, tile: int, overlap: int) -> Iterator[slice]:
    """Pieces of at most `tile` that cover `length` and share `overlap` or more."""
    tile = min(tile, length)
    for start in range(0, length - overlap, tile - overlap) if length > tile else (0,):
        start = min(start, length - tile)
        yield slice(start, start + tile)


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights that rise from the edge over `overlap` pixels, stay 1, and fall again; nowhere 0."""
    distance = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap) / overlap


def _free() -> str:
    return f"{torch.cuda.mem_get_info()[0]:,} bytes" if torch.cuda.is_available() else "an unknown number of bytes"
