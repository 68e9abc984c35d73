"""Elementwise stand-ins for a norm: a saturating curve for each channel, which knows no other.

What they saturate at is made for a stream of about unit size: with them, embedded tokens are multiplied by a learned
number that starts at sqrt(D) (Zhu et al. 2025, arXiv:2503.10622, section 6), unless the scheme does that itself.
"""

from math import log

import torch
from torch import Tensor, nn

from nlm.anatomy import Role, Span
from nlm.norms.token import ChannelNorm, NormSite, precise

ALPHA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}
"""DyT's α by the width of the model: before attention, and before the FFN and the head (Zhu et al. 2025, where
it falls with the width)."""


class Elementwise(ChannelNorm):
    """γ curve(x) + b with one learned number for the whole site."""

    token_scale = True

    def learned(self, name: str, initial: float) -> nn.Parameter:
        self.roles = self.roles | {name: Role.NORM}
        self.spans[name] = (Span.whole(1),)
        self.initial[name] = initial
        return nn.Parameter(torch.empty(1))


class DyT(Elementwise):
    """Dynamic Tanh: γ tanh(α x) + b (Zhu et al. 2025, eq. 1). α starts at `alpha`, by default at what ALPHA has for
    the largest width that the model reaches, or for the smallest there is."""

    def __init__(self, at: NormSite, *, alpha: float | None = None) -> None:
        super().__init__(at)
        if alpha is None:
            assert at.site is not None, "α depends on the site"
            attn, other = ALPHA[max(width for width in ALPHA if width <= max(at.site.dim, min(ALPHA)))]
            alpha = attn if at.site.kind in {"attn", "cross"} else other
        self.alpha = self.learned("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(torch.tanh(self.alpha * precise(x)))


class DyISRU(Elementwise):
    """Dynamic inverse square root unit: γ sqrt(C) x / sqrt(β + x²) + b, what RMSNorm does to one of C channels while
    the sum β of the others' squares stays the same (Stollenwerk 2025, arXiv:2503.21708).

    ln β is learned, so that β stays positive. It starts where the curve has RMSNorm's slope at 0, at β = C · E[x²] of
    what the site reads at initialization. Whether the paper's β is one number or one a channel we do not know; one a
    site is what DyT has.
    """

    calibrates = True

    def __init__(self, at: NormSite) -> None:
        super().__init__(at)
        self.log_beta = self.learned("log_beta", log(at.width.full))
        self.height = at.width.full**0.5

    def calibrated(self, x: Tensor) -> dict[str, float]:
        return {"log_beta": log(self.width.full * float(x.square().mean()))}

    def forward(self, x: Tensor) -> Tensor:
        x = precise(x)
        return self.scaled(self.height * x * (self.log_beta.exp() + x.square()).rsqrt())


class ELN(DyISRU):
    """Elementwise LayerNorm: the same of LayerNorm around the mean 0, γ sqrt(C - 1) x / sqrt(β + x²) + b."""

    def __init__(self, at: NormSite) -> None:
        super().__init__(at)
        self.height = (at.width.full - 1) ** 0.5
