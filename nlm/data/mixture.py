"""Which source each training row comes from: a pure function of (weights, seed, position)."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from nlm.data.order import Permutation

BLOCK = 1 << 16
"""Rows in which every source has its exact share; within them the order is random."""

Places = NDArray[np.int64]


@final
class Mixture:
    """Rows 0, 1, 2, … of training drawn from sources by `weights`, of which only the proportions count.

    In every BLOCK of rows each source has its share, to the nearest row (largest remainders first), at places drawn
    from (seed, block). A source's own rows come in their order, so that one that cannot seek will do.

    Errors: ValueError for a weight too small to get a row of a block.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.array(weights, np.float64) / sum(weights) * BLOCK
        self._counts = np.floor(shares).astype(np.int64)
        most = np.argsort(self._counts - shares, kind="stable")
        self._counts[most[: BLOCK - self._counts.sum()]] += 1
        if not self._counts.all():
            least = int(self._counts.argmin())
            raise ValueError(
                f"data.train: expected weights of at least a {BLOCK}th of their sum, got {weights[least]} of "
                f"{sum(weights)} for source {least}; raise it or leave the source out"
            )
        self._seed = seed
        self._block = -1

    def places(self, start: int, stop: int) -> tuple[Places, Places]:
        """Rows start … stop-1 -> the source [n] of each, and the how-manieth of its source's rows [n] it is."""
        if len(self._counts) == 1:
            return np.zeros(stop - start, np.int64), np.arange(start, stop)
        sources, numbers = [], []
        while start < stop:
            block, first = divmod(start, BLOCK)
            last = min(first + stop - start, BLOCK)
            self._draw(block)
            sources.append(self._sources[first:last])
            numbers.append(self._numbers[first:last] + block * self._counts[self._sources[first:last]])
            start += last - first
        return np.concatenate(sources), np.concatenate(numbers)

    def counts(self, rows: int) -> Places:
        """How many of the first `rows` rows come from each source."""
        if len(self._counts) == 1:
            return np.array([rows])
        block, rest = divmod(rows, BLOCK)
        self._draw(block)
        return block * self._counts + np.bincount(self._sources[:rest], minlength=len(self._counts))

    def _draw(self, block: int) -> None:
        """The source of every row of a block, and the how-manieth of that source in the block it is."""
        if block == self._block:
            return
        order = Permutation(BLOCK, (self._seed, block))(np.arange(BLOCK))
        firsts = self._counts.cumsum() - self._counts
        self._sources = np.searchsorted(firsts, order, "right") - 1
        self._numbers = np.empty(BLOCK, np.int64)
        by_source = np.argsort(self._sources, kind="stable")
        self._numbers[by_source] = np.arange(BLOCK) - np.repeat(firsts, self._counts)
        self._block = block
