"""Norm and rotary positions of queries or keys in one pass over memory, in Triton, and their gradients likewise.

y = scale · N₂(rotate(N₁(x))): N₁ an RMSNorm of each head or nothing (Gemma 3), N₂ the unit length or nothing (nGPT,
QKNorm), and a scale for each channel of each head, or none.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from nlm.kernels.rowwise import PROGRAMS, get, put
from nlm.positions import rotate


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    least: float | None,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x [B S H Dh], tables [S 1 Dh], gain [Dh], scale [H Dh] -> [B S H Dh], of `dtype`.

    Without `eps` there is no N₁; without `least`, below which no length counts, there is no N₂.
    """
    if eps is not None:
        x = F.rms_norm(x, x.shape[-1:], gain, eps)
    x = rotate(x, cos, sin, interleaved)
    if least is not None:
        x = F.normalize(x, dim=-1, eps=least)
    return (x if scale is None else x * scale).to(dtype)


@triton.jit
def _places(token, head, positions, heads, D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """-> the row of x and that of the tables, the channels, and of each channel the other of its pair."""
    channels = tl.arange(0, BLOCK)
    if INTERLEAVED:
        others = channels ^ 1
    else:
        others = tl.where(channels < D // 2, channels + D // 2, channels - D // 2)
    others = tl.where(channels < D, others, BLOCK)
    return token * heads + head, token % positions, channels, others


@triton.jit
def _forward(
    x, cos, sin, gain, scale, y_out, positions, heads, eps, least,
    D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    row, angle, here, there = _places(token, head, positions, heads, D, BLOCK, INTERLEAVED)
    p, q = get(x, row, here, D), get(x, row, there, D)
    if eps is not None:
        r = 1 / tl.sqrt(tl.sum(p * p, 0) / D + eps)
        p, q = p * r, q * r
        if gain is not None:
            p, q = p * get(gain, 0, here, D), q * get(gain, 0, there, D)
    y = p * get(cos, angle, here, D) + q * get(sin, angle, here, D)
    if least is not None:
        y /= tl.maximum(tl.sqrt(tl.sum(y * y, 0)), least)
    if scale is not None:
        y *= get(scale, head, here, D)
    put(y_out, row, here, D, y)


@triton.jit
def _backward(
    x, cos, sin, gain, scale, dy, dx_out, dgain_out, dscale_out, tokens, positions, heads, eps, least,
    D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    dgain = tl.zeros([BLOCK], tl.float32)
    dscale = tl.zeros([BLOCK], tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        row, angle, here, there = _places(token, head, positions, heads, D, BLOCK, INTERLEAVED)
        n, m = get(x, row, here, D), get(x, row, there, D)
        r = 1.0
        if eps is not None:
            r = 1 / tl.sqrt(tl.sum(n * n, 0) / D + eps)
        n, m = n * r, m * r
        p, q = n, m
        if gain is not None:
            p, q = p * get(gain, 0, here, D), q * get(gain, 0, there, D)
        cos_here, sin_here = get(cos, angle, here, D), get(sin, angle, here, D)
        cos_there, sin_there = get(cos, angle, there, D), get(sin, angle, there, D)
        y, z = p * cos_here + q * sin_here, q * cos_there + p * sin_there
        length = 1.0
        if least is not None:
            length = tl.maximum(tl.sqrt(tl.sum(y * y, 0)), least)
        y, z = y / length, z / length
        g, h = get(dy, row, here, D), get(dy, row, there, D)
        dscale += g * y
        if scale is not None:
            g, h = g * get(scale, head, here, D), h * get(scale, head, there, D)
        if least is not None:
            along = tl.sum(g * y, 0)
            g, h = (g - y * along) / length, (h - z * along) / length
        g = g * cos_here + h * sin_there
        dgain += g * n
        if gain is not None:
            g *= get(gain, 0, here, D)
        if eps is not None:
            g = (g - n * (tl.sum(g * n, 0) / D)) * r
        put(dx_out, row, here, D, g)
    channels = tl.arange(0, BLOCK)
    put(dgain_out, program * heads + head, channels, D, dgain)
    put(dscale_out, program * heads + head, channels, D, dscale)


def _sizes(x: Tensor, cos: Tensor, interleaved: bool) -> dict[str, Any]:
    head_dim = x.shape[-1]
    return {
        "positions": cos.shape[0],
        "heads": x.shape[-2],
        "D": head_dim,
        "BLOCK": triton.next_power_of_2(head_dim),
        "INTERLEAVED": interleaved,
    }


@custom_op("nlm::rotary", mutates_args=())
def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    scale: Tensor | None,
    eps: float | None,
    least: float | None,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference`; the tables get no gradient."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    tokens = x.shape[:-2].numel()
    _forward[tokens, x.shape[-2]](
        x.contiguous(), cos.contiguous(), sin.contiguous(), gain, scale, y,
        eps=eps, least=least, **_sizes(x, cos, interleaved),
    )  # fmt: skip
    return y


@rotary.register_fake
def _(x, cos, sin, gain, scale, eps, least, interleaved, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@custom_op("nlm::rotary_backward", mutates_args=())
def rotary_backward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    scale: Tensor | None,
    dy: Tensor,
    eps: float | None,
    least: float | None,
    interleaved: bool,
) -> list[Tensor]:
    """-> the gradients of x [B S H Dh], and of the gain and the scale there are."""
    tokens, heads, head_dim = x.shape[:-2].numel(), *x.shape[-2:]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = min(PROGRAMS, tokens)
    sums = [None if v is None else dx.new_empty(programs, heads, head_dim, dtype=torch.float32) for v in (gain, scale)]
    _backward[programs, heads](
        x.contiguous(), cos.contiguous(), sin.contiguous(), gain, scale, dy.contiguous(), dx, *sums, tokens,
        eps=eps, least=least, **_sizes(x, cos, interleaved),
    )  # fmt: skip
    found, (of_gain, of_scale) = [dx], sums
    if gain is not None and of_gain is not None:
        found.append(of_gain.sum((0, 1)).to(gain.dtype))
    if scale is not None and of_scale is not None:
        found.append(of_scale.sum(0).to(scale.dtype))
    return found


@rotary_backward.register_fake
def _(x, cos, sin, gain, scale, dy, eps, least, interleaved):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return [dx, *(torch.empty_like(v) for v in (gain, scale) if v is not None)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, gain, scale, ctx.eps, ctx.least, ctx.interleaved, _ = inputs
    ctx.save_for_backward(x, cos, sin, gain, scale)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin, gain, scale = ctx.saved_tensors
    dx, *found = rotary_backward(x, cos, sin, gain, scale, dy, ctx.eps, ctx.least, ctx.interleaved)
    learned = iter(found)
    dgain, dscale = (None if v is None else next(learned) for v in (gain, scale))
    return dx, None, None, dgain, dscale, None, None, None, None


rotary.register_autograd(_gradients, setup_context=_keep)
