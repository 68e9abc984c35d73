"""Residual and norms in one pass over memory, in Triton: s = α x + N₁(f), y = N₂(s), and their gradients likewise.

With N₁ the identity, so Post-LN and DeepNorm end a sublayer (y), and so one Pre-LN sublayer meets the next (s and y);
with both norms it is Peri-LN; without N₂, the end of a layer of Peri-LN. Norms are "rms" or "layer", with a gain and a
bias or without.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from nlm.kernels.rowwise import PROGRAMS, get, partial_sums, put, rows_of, sizes


def reference(
    x: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    gain_1: Tensor | None,
    bias_1: Tensor | None,
    gain_2: Tensor | None,
    bias_2: Tensor | None,
    norm_1: str,
    norm_2: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x, f [… D], α [], gains and biases [D], norms "none", "rms" or "layer" -> s, y [… D]; without N₂, y is empty."""
    s = (x if alpha is None else alpha * x) + _norm(f, norm_1, gain_1, bias_1, eps)
    return s, _norm(s, norm_2, gain_2, bias_2, eps) if norm_2 != "none" else s.new_empty(0)


def _norm(x: Tensor, kind: str, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    match kind:
        case "rms":
            return F.rms_norm(x, x.shape[-1:], gain, eps)
        case "layer":
            return F.layer_norm(x, x.shape[-1:], gain, bias, eps)
    return x


@triton.jit
def _normal(s, columns, eps, D: tl.constexpr, KIND: tl.constexpr):
    """-> the row without gain and bias, and what it was multiplied by."""
    if KIND == "layer":
        s = tl.where(columns < D, s - tl.sum(s, 0) / D, 0.0)
    scale = 1 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
    return s * scale, scale


@triton.jit
def _normal_backward(g, n, scale, columns, D: tl.constexpr, KIND: tl.constexpr):
    """From the gradient of n, the row without gain and bias, that of what was normalized."""
    g -= n * (tl.sum(g * n, 0) / D)
    if KIND == "layer":
        g = tl.where(columns < D, g - tl.sum(g, 0) / D, 0.0)
    return g * scale


@triton.jit
def _gained(n, gain, bias, columns, D: tl.constexpr):
    if gain is not None:
        n *= get(gain, 0, columns, D)
    if bias is not None:
        n += get(bias, 0, columns, D)
    return n


@triton.jit
def _forward(
    x, f, alpha, gain_1, bias_1, gain_2, bias_2, s_out, y_out, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM_1: tl.constexpr, NORM_2: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    s = get(x, row, columns, D)
    if alpha is not None:
        s *= tl.load(alpha)
    z = get(f, row, columns, D)
    if NORM_1 != "none":
        z, _ = _normal(z, columns, eps, D, NORM_1)
        z = _gained(z, gain_1, bias_1, columns, D)
    s += z
    put(s_out, row, columns, D, s)
    if NORM_2 != "none":
        y, _ = _normal(s, columns, eps, D, NORM_2)
        put(y_out, row, columns, D, _gained(y, gain_2, bias_2, columns, D))


@triton.jit
def _backward(
    s, f, alpha, gain_1, gain_2, ds, dy, dx_out, df_out, dgain_1, dbias_1, dgain_2, dbias_2, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM_1: tl.constexpr, NORM_2: tl.constexpr,
):  # fmt: skip
    program, columns = tl.program_id(0), tl.arange(0, BLOCK)
    sum_gain_1 = tl.zeros([BLOCK], tl.float32)
    sum_bias_1 = tl.zeros([BLOCK], tl.float32)
    sum_gain_2 = tl.zeros([BLOCK], tl.float32)
    sum_bias_2 = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        g = tl.zeros([BLOCK], tl.float32)
        if ds is not None:
            g += get(ds, row, columns, D)
        if dy is not None:
            n, scale = _normal(get(s, row, columns, D), columns, eps, D, NORM_2)
            d = get(dy, row, columns, D)
            sum_gain_2 += d * n
            sum_bias_2 += d
            g += _normal_backward(_gained(d, gain_2, None, columns, D), n, scale, columns, D, NORM_2)
        dx = g
        if alpha is not None:
            dx *= tl.load(alpha)
        put(dx_out, row, columns, D, dx)
        if NORM_1 != "none":
            n, scale = _normal(get(f, row, columns, D), columns, eps, D, NORM_1)
            sum_gain_1 += g * n
            sum_bias_1 += g
            g = _normal_backward(_gained(g, gain_1, None, columns, D), n, scale, columns, D, NORM_1)
        put(df_out, row, columns, D, g)
    put(dgain_1, program, columns, D, sum_gain_1)
    put(dbias_1, program, columns, D, sum_bias_1)
    put(dgain_2, program, columns, D, sum_gain_2)
    put(dbias_2, program, columns, D, sum_bias_2)


@custom_op("nlm::residual", mutates_args=())
def residual(
    x: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    gain_1: Tensor | None,
    bias_1: Tensor | None,
    gain_2: Tensor | None,
    bias_2: Tensor | None,
    norm_1: str,
    norm_2: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `reference`; α gets no gradient."""
    s, y = _like(x, f, norm_2)
    rows = rows_of(x)
    _forward[(len(rows),)](
        rows, rows_of(f), alpha, gain_1, bias_1, gain_2, bias_2, s, y, eps, **sizes(rows), NORM_1=norm_1, NORM_2=norm_2
    )
    return s, y


def _like(x: Tensor, f: Tensor, norm_2: str) -> tuple[Tensor, Tensor]:
    s = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, f.dtype), device=x.device)
    return s, torch.empty_like(s) if norm_2 != "none" else s.new_empty(0)


@residual.register_fake
def _(x, f, alpha, gain_1, bias_1, gain_2, bias_2, norm_1, norm_2, eps):
    return _like(x, f, norm_2)


@custom_op("nlm::residual_backward", mutates_args=())
def residual_backward(
    s: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    gain_1: Tensor | None,
    bias_1: Tensor | None,
    gain_2: Tensor | None,
    bias_2: Tensor | None,
    ds: Tensor | None,
    dy: Tensor | None,
    x_dtype: torch.dtype,
    norm_1: str,
    norm_2: str,
    eps: float,
) -> list[Tensor]:
    """-> the gradients of x and f [… D], one for both if they are the same, and of the gains and biases there are."""
    dx = torch.empty(f.shape, dtype=x_dtype, device=f.device)
    df = None if _same(alpha, norm_1, x_dtype, f.dtype) else torch.empty(f.shape, dtype=f.dtype, device=f.device)
    rows = rows_of(s)
    programs = min(PROGRAMS, len(rows))
    learned = gain_1, bias_1, gain_2, bias_2
    sums = [None if vector is None else partial_sums(vector, programs) for vector in learned]
    _backward[(programs,)](
        rows, rows_of(f), alpha, gain_1, gain_2, *(d if d is None else rows_of(d) for d in (ds, dy)), dx, df, *sums,
        len(rows), eps, **sizes(rows), NORM_1=norm_1, NORM_2=norm_2,
    )  # fmt: skip
    totals = [p.sum(0).to(v.dtype) for p, v in zip(sums, learned, strict=True) if p is not None and v is not None]
    return [dx, *([] if df is None else [df]), *totals]


@residual_backward.register_fake
def _(s, f, alpha, gain_1, bias_1, gain_2, bias_2, ds, dy, x_dtype, norm_1, norm_2, eps):
    found = [f.new_empty(f.shape, dtype=x_dtype)]
    if not _same(alpha, norm_1, x_dtype, f.dtype):
        found.append(f.new_empty(f.shape))
    return found + [torch.empty_like(v) for v in (gain_1, bias_1, gain_2, bias_2) if v is not None]


def _same(alpha: Tensor | None, norm_1: str, x_dtype: torch.dtype, f_dtype: torch.dtype) -> bool:
    """Whether x and f have the same gradient, which is then written once."""
    return alpha is None and norm_1 == "none" and x_dtype == f_dtype


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, f, *parts, ctx.norm_1, ctx.norm_2, ctx.eps = inputs
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], f, *parts)


def _gradients(ctx: Any, ds: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    s, f, alpha, *learned = ctx.saved_tensors
    dy = None if ctx.norm_2 == "none" else dy
    found = iter(residual_backward(s, f, alpha, *learned, ds, dy, ctx.x_dtype, ctx.norm_1, ctx.norm_2, ctx.eps))
    dx = next(found)
    df = dx if _same(alpha, ctx.norm_1, ctx.x_dtype, f.dtype) else next(found)
    return dx, df, None, *(None if v is None else next(found) for v in learned), None, None, None


residual.register_autograd(_gradients, setup_context=_keep)
