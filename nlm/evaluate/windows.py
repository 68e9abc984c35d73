"""Documents as windows that slide over them: each token is predicted once, with enough context, and from none before
its document but the mark that ends the one before."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm.anatomy import IGNORED
from nlm.batch import KEPT, Batch
from nlm.data.tokenizer import Tokenizer
from nlm.evaluate.corpus import Document, n_bytes

POOL = 16
"""Batches whose windows are put in the order of their length together, so that few are filled up."""


@dataclass(frozen=True)
class Windows(Batch):
    """Rows that end with padding: `real` [B S] are the other places, of whose targets those that are `scored` [B S] are
    no other window's as well. An encoder attends to no padding: it is another document."""

    real: Tensor | None = None
    scored: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """[B S]."""
        assert self.real is not None
        return super().targets.where(self.real, IGNORED)


def spans(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Of n tokens, windows from `start` to before `stop`, at most window + 1 long, that predict those from `first` on.

    Each token but the very first is predicted once, with more than window - stride before it in its window, or all.
    """
    start, first = 0, 1
    while first < n:
        stop = min(start + window + 1, n)
        yield start, stop, first
        start, first = min(start + stride, max(0, n - window - 1)), stop


def cut(document: Document, n: int, coder: Tokenizer | None) -> Document:
    """Its first n tokens."""
    if n >= len(document.tokens):
        return document
    return Document(document.tokens[:n], n_bytes(document.tokens[:n], coder))


class Row(NamedTuple):
    """A window's tokens [≤ S+1], and how many of the last ones are scored; of an encoder's, those of them that have
    `stand_ins` [≤ S+1], as of a Batch."""

    tokens: NDArray[np.integer]
    scored: int
    stand_ins: NDArray[np.integer] | None = None


def rows(tokens: NDArray[np.integer], window: int, stride: int) -> Iterator[Row]:
    for start, stop, first in spans(len(tokens), window, stride):
        yield Row(tokens[start:stop], stop - first)


def batches(found: Iterable[Row], size: int, multiple: int = 1, length: int | None = None) -> Iterator[Windows]:
    """Batches of `size` rows, those of about the same length together, the last filled up with empty ones; as long as
    the longest in a batch, up to a multiple of `multiple`, or of `length` all."""
    for pool in _taken(iter(found), POOL * size):
        for some in _taken(iter(sorted(pool, key=lambda row: -len(row.tokens))), size):
            longest = length or -(-(len(some[0].tokens) - 1) // multiple) * multiple
            yield joined(some, size, longest)


def _taken(iterator: Iterator[Row], n: int) -> Iterator[list[Row]]:
    """By n; the last are what is left."""
    while some := list(islice(iterator, n)):
        yield some


def joined(some: Iterable[Row], size: int, length: int) -> Windows:
    """-> tokens [size length+1]."""
    tokens, hidden = np.zeros((size, length + 1), np.int64), np.full((size, length + 1), KEPT)
    real, scored = (np.zeros((size, length), np.bool_) for _ in range(2))
    masked = False
    for i, (row, n, stand_ins) in enumerate(some):
        tokens[i, : len(row)] = row
        real[i, : len(row) - 1] = True
        scored[i, len(row) - 1 - n : len(row) - 1] = True
        if stand_ins is not None:
            hidden[i, : len(row)] = stand_ins
            masked = True
    found = Windows(torch.from_numpy(tokens), real=torch.from_numpy(real), scored=torch.from_numpy(scored))
    if not masked:
        return found
    padding = np.pad(~real, ((0, 0), (0, 1)), constant_values=True).astype(np.int64)
    found = replace(found, documents=torch.from_numpy(padding), stand_ins=torch.from_numpy(hidden))
    return replace(found, scored=torch.from_numpy(scored) & (found.targets != IGNORED))
