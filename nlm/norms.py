"""Norm layers, usable wherever a scheme says `Norm()`, and NORMS, the choice by name."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Role


class LayerNorm(nn.Module):
    """[… D] -> [… D]: γ (x - mean) / sqrt(var + eps) + b, biased variance (Ba et al. 2016, eq. 4)."""

    roles = {"weight": Role.NORM, "bias": Role.BIAS}
    initial = {"weight": 1.0, "bias": 0.0}

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(width)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """[… D] -> [… D]: γ x / sqrt(mean(x²) + eps), eps inside the root (Zhang & Sennrich 2019, eq. 4; Llama)."""

    roles = {"weight": Role.NORM}
    initial = {"weight": 1.0}

    def __init__(self, width: int, eps: float, bias: bool = False) -> None:
        # `bias` is the model's choice for norms that have one; this one never does.
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


def unit(x: Tensor) -> Tensor:
    """[… D] -> [… D]: x / max(‖x‖₂, 1e-12) over the last axis."""
    return F.normalize(x, dim=-1, eps=1e-12)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
