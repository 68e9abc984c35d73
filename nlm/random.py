"""Random numbers that depend on what they are for, not on who draws them: the same in every layout, and once more in
recomputation."""

from hashlib import blake2b

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def hashed(text: str) -> int:
    """A number in [0, 2⁶⁴)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def mixed(x: Tensor) -> Tensor:
    """int64 -> int64 in [0, 2³²): a number in which every bit of the 32 lowest of x counts for every other.

    Shifts and products of 32-bit words, by a multiplier small enough for the products not to leave int64.
    """
    for _ in range(2):
        x = x & WORD
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & WORD
    return x ^ (x >> 16)


def row_keys(seed: int, numbers: Tensor) -> Tensor:
    """Rows' numbers among all, int64 [B] -> [B] int64: keys of what is to be random in each."""
    return mixed(numbers + mixed(torch.tensor(seed, device=numbers.device)))


def words(keys: Tensor, number: Tensor) -> Tensor:
    """Keys and numbers, int64, broadcast -> int64 in [0, 2³²), others for every number."""
    return mixed(keys + mixed(number))


def uniform(keys: Tensor, number: Tensor) -> Tensor:
    """Likewise -> float64 in [0, 1)."""
    return words(keys, number).double() / (WORD + 1)


def normal(keys: Tensor, number: Tensor) -> Tensor:
    """Likewise -> float64, standard normal numbers."""
    return torch.special.ndtri(uniform(keys, number) + 0.5 / (WORD + 1))
