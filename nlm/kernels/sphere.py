"""nGPT's step on the sphere in one pass over memory, in Triton: y = unit(h + a (unit(f) - h)), and its gradients.

(Loshchilov et al. 2024, arXiv:2410.01131, eq. 10 and 11, where h is of unit length.)
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from nlm.kernels.rowwise import PROGRAMS, get, partial_sums, put, rows_of, sizes, unit, unit_backward


def reference(h: Tensor, f: Tensor, a: Tensor, least: float) -> Tensor:
    """h, f [… D], a [D] -> [… D]; lengths count as at least `least`."""
    return F.normalize(h + a * (F.normalize(f, dim=-1, eps=least) - h), dim=-1, eps=least)


@triton.jit
def _forward(h, f, a, y_out, least, D: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    start, rate = get(h, row, columns, D), get(a, 0, columns, D)
    towards, _ = unit(get(f, row, columns, D), least)
    y, _ = unit(start + rate * (towards - start), least)
    put(y_out, row, columns, D, y)


@triton.jit
def _backward(h, f, a, dy, dh_out, df_out, da_out, rows, least, D: tl.constexpr, BLOCK: tl.constexpr):
    program, columns = tl.program_id(0), tl.arange(0, BLOCK)
    rate = get(a, 0, columns, D)
    da = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        start = get(h, row, columns, D)
        towards, length = unit(get(f, row, columns, D), least)
        y, reached = unit(start + rate * (towards - start), least)
        g = unit_backward(get(dy, row, columns, D), y, reached)
        da += g * (towards - start)
        put(dh_out, row, columns, D, g * (1 - rate))
        put(df_out, row, columns, D, unit_backward(g * rate, towards, length))
    put(da_out, program, columns, D, da)


@custom_op("nlm::sphere_step", mutates_args=())
def sphere_step(h: Tensor, f: Tensor, a: Tensor, least: float) -> Tensor:
    """As `reference`."""
    y = torch.empty_like(h)
    rows = rows_of(h)
    _forward[(len(rows),)](rows, rows_of(f), a.contiguous(), y, least, **sizes(rows))
    return y


@sphere_step.register_fake
def _(h, f, a, least):
    return torch.empty_like(h)


@custom_op("nlm::sphere_step_backward", mutates_args=())
def sphere_step_backward(h: Tensor, f: Tensor, a: Tensor, dy: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of h, f [… D] and a [D]."""
    dh, df = torch.empty_like(h), torch.empty_like(f)
    rows = rows_of(h)
    programs = min(PROGRAMS, len(rows))
    da = partial_sums(a, programs)
    _backward[(programs,)](rows, rows_of(f), a.contiguous(), rows_of(dy), dh, df, da, len(rows), least, **sizes(rows))
    return dh, df, da.sum(0).to(a.dtype)


@sphere_step_backward.register_fake
def _(h, f, a, dy, least):
    return torch.empty_like(h), torch.empty_like(f), torch.empty_like(a)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.least = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *sphere_step_backward(*ctx.saved_tensors, dy, ctx.least), None


sphere_step.register_autograd(_gradients, setup_context=_keep)
