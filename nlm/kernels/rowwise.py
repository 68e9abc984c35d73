"""What Triton kernels of whole rows [N D] share: a program reads a row at once and computes in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256
"""How many programs share the rows of a backward, each with a sum of its own of what all rows have in common."""


@triton.jit
def get(pointer, row, columns, D: tl.constexpr):
    return tl.load(pointer + tl.cast(row, tl.int64) * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def put(pointer, row, columns, D: tl.constexpr, value):
    if pointer is not None:
        at = pointer + tl.cast(row, tl.int64) * D + columns
        tl.store(at, value.to(pointer.dtype.element_ty), mask=columns < D)


@triton.jit
def unit(x, least: tl.constexpr):
    """-> the row divided by its length, and the length, at least `least`."""
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), least)
    return x / length, length


@triton.jit
def unit_backward(g, u, length):
    """From the gradient of u, the row of unit length, that of the row."""
    return (g - u * tl.sum(g * u, 0)) / length


def rows_of(x: Tensor) -> Tensor:
    """[… D] -> [N D], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def sizes(x: Tensor) -> dict[str, int]:
    """Of rows [N D]: D, and the power of two that holds it."""
    return {"D": x.shape[-1], "BLOCK": triton.next_power_of_2(x.shape[-1])}


def partial_sums(like: Tensor, programs: int) -> Tensor:
    """Room for each program's sum of the gradient of `like`."""
    return torch.empty(programs, *like.shape, dtype=torch.float32, device=like.device)
