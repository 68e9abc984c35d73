"""A random order of as many things as there may be, in no memory."""

import math
from collections.abc import Sequence
from typing import final

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
