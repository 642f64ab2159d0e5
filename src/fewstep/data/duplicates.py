"""Pictures that were there before: the same file, or one that looks the same."""

from __future__ import annotations

from itertools import pairwise

from fewstep.data.filters import Reason
from fewstep.data.pictures import HASH_BITS
from fewstep.errors import InputError

MOST_BITS = 15


class Deduplicator:
    """Refuses files and pictures that came before; the first of equal ones stays, so the result depends on the order.

    Near duplicates are at most `max_hamming` of the 128 bits of their perceptual hashes apart; None compares files
    only. LSH: hashes are split into `max_hamming` + 1 bands; by pigeonhole two hashes within `max_hamming` bits share
    one.
    """

    def __init__(self, max_hamming: int | None) -> None:
        if max_hamming is not None and not 0 <= max_hamming <= MOST_BITS:
            raise InputError(
                f"max_hamming (--near) is {max_hamming}; lookalikes differ in 0 to {MOST_BITS} "
                f"of {HASH_BITS} bits (None: off)"
            )
        self.max_hamming = max_hamming
        self.files = set[str]()
        self.bands = dict[tuple[int, int], list[int]]()

    def rejection(self, file_hash: str, phash: int) -> Reason | None:
        """Why the picture with this checksum and perceptual hash is one too many; None if it is new, and then kept."""
        if file_hash in self.files:
            return Reason.DUPLICATE
        if self.max_hamming is not None:
            bands = self._bands(phash, self.max_hamming + 1)
            if any(
                (phash ^ other).bit_count() <= self.max_hamming for band in bands for other in self.bands.get(band, ())
            ):
                return Reason.NEAR_DUPLICATE
            for band in bands:
                self.bands.setdefault(band, []).append(phash)
        self.files.add(file_hash)
        return None

    def _bands(self, phash: int, count: int) -> list[tuple[int, int]]:
        edges = [HASH_BITS * i // count for i in range(count + 1)]
        return [(i, phash >> low & (1 << high - low) - 1) for i, (low, high) in enumerate(pairwise(edges))]
