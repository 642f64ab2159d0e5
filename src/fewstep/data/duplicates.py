"""Pictures that were there before: the same file, or one that looks the same."""

from __future__ import annotations

from itertools import pairwise

from fewstep.data.filters import Reason
from fewstep.data.pictures import HASH_BITS
from fewstep.errors import InputError

MOST_BITS = 15


class Seen:
    """The pictures met so far; of those that are alike the first stays, so the order of the calls decides alone.

    Two look alike if at most `near` of the 128 bits of their perceptual hashes differ; None compares files only.
    Hashes are found by their bands: cut in `near` + 1 parts, two that differ in `near` bits have a part in common.
    """

    def __init__(self, near: int | None) -> None:
        if near is not None and not 0 <= near <= MOST_BITS:
            raise InputError(f"near is {near}; lookalikes differ in 0 to {MOST_BITS} of {HASH_BITS} bits (None: off)")
        self.near = near
        self.files = set[str]()
        self.bands = dict[tuple[int, int], list[int]]()

    def rejection(self, file_hash: str, looks: int) -> Reason | None:
        """Why the picture with this checksum and perceptual hash is one too many; None if it is new, and then kept."""
        if file_hash in self.files:
            return Reason.DUPLICATE
        if self.near is not None:
            bands = self._bands(looks, self.near + 1)
            if any((looks ^ other).bit_count() <= self.near for band in bands for other in self.bands.get(band, ())):
                return Reason.NEAR_DUPLICATE
            for band in bands:
                self.bands.setdefault(band, []).append(looks)
        self.files.add(file_hash)
        return None

    def _bands(self, looks: int, count: int) -> list[tuple[int, int]]:
        edges = [HASH_BITS * i // count for i in range(count + 1)]
        return [(i, looks >> low & (1 << high - low) - 1) for i, (low, high) in enumerate(pairwise(edges))]
