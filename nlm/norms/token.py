"""Norms over the channels of one token: LayerNorm, RMSNorm and its variants, ScaleNorm.

A norm over an axis that tensor parallelism cuts joins the ranks' statistics; its parts are of equal length.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nlm.anatomy import Role, Site, Span
from nlm.parallel.tensor import Ranks, TensorParallel


@dataclass(frozen=True)
class NormSite:
    """The channels that a norm layer is over, this rank's part of them, and what the model says of its norms."""

    width: Span
    tp: TensorParallel
    eps: float
    bias: bool = False
    site: Site | None = None
    data: tuple[Ranks, ...] = ()
    """Groups of ranks with other rows of the same batch."""


class NormLayer(nn.Module):
    """[… D] -> [… D]."""

    token_scale = False
    """Whether it wants embedded tokens multiplied by a learned number that starts at sqrt(D)."""
    calibrates = False
    """Whether it has a method `calibrated`: what it reads -> values that its parameters are to start from, by name."""

    def __init__(self, at: NormSite) -> None:
        super().__init__()
        self.width, self.tp, self.eps = at.width, at.tp, at.eps


class ChannelNorm(NormLayer):
    """With a gain, unless told otherwise, and, if asked for, a bias for each channel."""

    roles = {"weight": Role.NORM, "bias": Role.BIAS}

    def __init__(self, at: NormSite, gain: bool = True) -> None:
        super().__init__(at)
        self.initial = {"weight": 1.0, "bias": 0.0}
        self.spans: dict[str, tuple[Span, ...]] = {"weight": (at.width,), "bias": (at.width,)}
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.empty(len(at.width))) if gain else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(len(at.width))) if gain and at.bias else None)

    def scaled(self, x: Tensor) -> Tensor:
        """[… D] -> [… D]: times the gain, plus the bias."""
        if self.weight is None:
            return x
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


class LayerNorm(ChannelNorm):
    """γ (x - mean) / sqrt(var + eps) + b, biased variance (Ba et al. 2016, eq. 4).

    `gain = false`: without γ and b, as where the next linear layer has taken them in (`nlm fold-norms`).
    """

    def __init__(self, at: NormSite, *, gain: bool = True) -> None:
        super().__init__(at, gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.width.is_whole:
            return F.layer_norm(x, (len(self.width),), self.weight, self.bias, self.eps)
        x = precise(x)
        means, variances = self.tp.stack(torch.stack([x.mean(-1), x.var(-1, correction=0)])).unbind(1)  # [n B S]
        mean, var = means.mean(0)[..., None], (variances.mean(0) + means.var(0, correction=0))[..., None]
        return self.scaled((x - mean) * (var + self.eps).rsqrt())


class RMSNorm(ChannelNorm):
    """γ x / sqrt(mean(x²) + eps) (Zhang & Sennrich 2019, eq. 4; Llama).

    `eps_outside`: γ x / (sqrt(mean(x²)) + eps), as in its authors' code. `one_plus`: the gain is 1 + γ and γ starts
    at 0, as in Gemma. `gain = false`: without γ. It has no bias, whatever the model's choice for norms that may.
    """

    def __init__(self, at: NormSite, *, eps_outside: bool = False, one_plus: bool = False, gain: bool = True) -> None:
        super().__init__(replace(at, bias=False), gain)
        if one_plus and not gain:
            raise ValueError("model.norm.one_plus: is about the gain; remove it, or set gain = true")
        self.eps_outside, self.one_plus = eps_outside, one_plus
        self.initial["weight"] = 0.0 if one_plus else 1.0
        self.counted = at.width.full

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight + 1 if self.weight is not None and self.one_plus else self.weight
        if self.width.is_whole and self.counted == self.width.full and not self.eps_outside:
            return F.rms_norm(x, (len(self.width),), gain, self.eps)
        x = precise(x)
        counted = x[..., : max(0, self.counted - self.width.start)]  # those of the first channels that this rank has
        mean_square = sum_squares(counted, self.width, self.tp) / self.counted
        if self.eps_outside:
            # Below the least number there is, the root has no slope.
            y = x / (mean_square.clamp(min=torch.finfo(x.dtype).tiny).sqrt() + self.eps)
        else:
            y = x * (mean_square + self.eps).rsqrt()
        return y if gain is None else y * gain


class PartialRMSNorm(RMSNorm):
    """pRMSNorm: the root mean square is that of the first `p` · D channels, at least one; all are divided by it
    (Zhang & Sennrich 2019, section 4.2, where p = 6.25 %)."""

    def __init__(self, at: NormSite, *, p: Annotated[float, Field(gt=0, le=1)] = 0.0625) -> None:
        super().__init__(at)
        self.counted = max(1, int(at.width.full * p))


class ScaleNorm(NormLayer):
    """g x / max(‖x‖, eps) with one learned g, which starts at sqrt(D) (Nguyen & Salazar 2019,
    arXiv:1910.05895, eq. 5)."""

    roles = {"g": Role.NORM}
    spans = {"g": (Span.whole(1),)}

    def __init__(self, at: NormSite) -> None:
        super().__init__(at)
        self.initial = {"g": at.width.full**0.5}
        self.g = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        x = precise(x)
        return x * (self.g * sum_squares(x, self.width, self.tp).clamp(min=self.eps**2).rsqrt())


def sum_squares(x: Tensor, width: Span, tp: TensorParallel) -> Tensor:
    """[… D/n] -> [… 1], over all ranks' parts of an axis that is cut."""
    squares = x.square().sum(-1, keepdim=True)
    return squares if width.is_whole else tp.sum(squares)


def precise(x: Tensor) -> Tensor:
    """At least float32, in which norms are taken whatever the precision of the products."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """[… D] -> [… D]: x / max(‖x‖₂, 1e-12) over the last axis."""
    return F.normalize(x, dim=-1, eps=1e-12)
