"""Which tokens [n_tokens] a step reads: a pure function of (seed, step), so that resuming needs no state.

Every epoch visits all samples once, each epoch in an order of its own.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


@final
class Permutation:
    """A bijection of range(n) keyed by `seed`, a non-negative integer or several, in O(1) memory.

    A Feistel network on pairs in range(a) x range(b), where a*b is n or slightly more; a result outside
    range(n) goes through it again until it falls inside. (Black & Rogaway 2002, "Ciphers with Arbitrary
    Finite Domains": generalized Feistel and cycle walking.)
    """

    def __init__(self, n: int, seed: int | Sequence[int]) -> None:
        if n < 1:
            raise ValueError(f"expected a permutation of at least 1 element, got n={n}")
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __call__(self, i: NDArray[np.integer]) -> NDArray[np.int64]:
        """[m] integers in range(n) -> [m] int64, their images.

        Errors: ValueError for an integer outside range(n).
        """
        if i.size and not 0 <= i.min() <= i.max() < self.n:
            raise ValueError(f"expected integers in range({self.n}), got {i.min()} to {i.max()}")
        image = self._encrypt(i.astype(np.uint64))
        while (outside := image >= self.n).any():
            image[outside] = self._encrypt(image[outside])
        return image.astype(np.int64)

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """[m] -> [m], a bijection of range(a*b)."""
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for key in self._keys:
            # Reduced before the sum, which would otherwise wrap at 2**64 and map two values to one.
            left, right, a, b = right, (left + _mix(right ^ key) % a) % a, b, a
        return left * b + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[m] -> [m], scrambled 64-bit words: the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@final
class Batches:
    """An endless, shuffled sequence of batches [batch_rows, seq_len+1] from a stream of tokens [n_tokens].

    Sample i is tokens[i*seq_len : (i+1)*seq_len + 1], inputs and their targets. A batch may straddle epochs.

    Errors: ValueError when the stream holds no whole sample.
    """

    def __init__(self, tokens: NDArray[np.integer], seq_len: int, batch_rows: int, seed: int) -> None:
        self._samples = _samples(tokens, seq_len)
        self.n_samples = len(self._samples)
        self.batch_rows = batch_rows
        self.seed = seed

    def batch(self, step: int, part: int = 0, parts: int = 1) -> NDArray[np.int64]:
        """[batch_rows/parts, seq_len+1]: one of the equal parts of this step's batch."""
        rows = np.arange(self.batch_rows * part // parts, self.batch_rows * (part + 1) // parts)
        epochs, places = np.divmod(step * self.batch_rows + rows, self.n_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            samples[inside] = Permutation(self.n_samples, (self.seed, int(epoch)))(places[inside])
        return self._samples[samples].astype(np.int64)

    def epoch(self, step: int) -> float:
        """Passes over the corpus made before this step."""
        return step * self.batch_rows / self.n_samples


def validation_batches(
    tokens: NDArray[np.integer], seq_len: int, batch_rows: int, max_batches: int
) -> Iterator[NDArray[np.int64]]:
    """[n_tokens] -> at most `max_batches` batches [batch_rows, seq_len+1] in the stream's order.

    No token is a target twice; the last batch may have fewer rows.

    Errors: ValueError when the stream holds no whole sample.
    """
    samples = _samples(tokens, seq_len)[: max_batches * batch_rows]
    return (samples[i : i + batch_rows].astype(np.int64) for i in range(0, len(samples), batch_rows))


def _samples(tokens: NDArray[np.integer], seq_len: int) -> NDArray[Any]:
    """[n_tokens] -> [(n_tokens-1)//seq_len, seq_len+1], a view in which neighbours share one token."""
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"expected at least seq_len+1 = {seq_len + 1} tokens, got {len(tokens)}; "
            "shorten train.seq_len or give a larger corpus"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]
