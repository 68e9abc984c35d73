"""Norm layers, usable wherever a scheme says `Norm()`, and NORMS, the choice by name.

A norm over an axis that tensor parallelism cuts joins the ranks' statistics; its parts are of equal length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Role, Span
from nlm.parallel.tensor import TensorParallel


class LayerNorm(nn.Module):
    """[… D] -> [… D]: γ (x - mean) / sqrt(var + eps) + b, biased variance (Ba et al. 2016, eq. 4)."""

    roles = {"weight": Role.NORM, "bias": Role.BIAS}
    initial = {"weight": 1.0, "bias": 0.0}

    def __init__(self, width: Span, tp: TensorParallel, eps: float, bias: bool) -> None:
        super().__init__()
        self.tp, self.eps, self.is_whole = tp, eps, width.is_whole
        self.spans = {"weight": (width,), "bias": (width,)}
        self.weight = nn.Parameter(torch.empty(len(width)))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(len(width))) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_whole:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x = _precise(x)
        means, variances = self.tp.stack(torch.stack([x.mean(-1), x.var(-1, correction=0)])).unbind(1)  # [n B S]
        mean, var = means.mean(0)[..., None], (variances.mean(0) + means.var(0, correction=0))[..., None]
        y = (x - mean) * (var + self.eps).rsqrt() * self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """[… D] -> [… D]: γ x / sqrt(mean(x²) + eps), eps inside the root (Zhang & Sennrich 2019, eq. 4; Llama)."""

    roles = {"weight": Role.NORM}
    initial = {"weight": 1.0}

    def __init__(self, width: Span, tp: TensorParallel, eps: float, bias: bool = False) -> None:
        # `bias` is the model's choice for norms that have one; this one never does.
        super().__init__()
        self.tp, self.eps, self.is_whole = tp, eps, width.is_whole
        self.spans = {"weight": (width,)}
        self.weight = nn.Parameter(torch.empty(len(width)))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_whole:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x = _precise(x)
        mean_square = self.tp.sum(x.square().mean(-1, keepdim=True)) / self.tp.size
        return x * (mean_square + self.eps).rsqrt() * self.weight


def _precise(x: Tensor) -> Tensor:
    """At least float32, in which norms are taken whatever the precision of the products."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """[… D] -> [… D]: x / max(‖x‖₂, 1e-12) over the last axis."""
    return F.normalize(x, dim=-1, eps=1e-12)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
