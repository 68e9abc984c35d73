"""LayerNorm scaling: what layer l reads is divided by sqrt(l) (Sun et al. 2025, The Curse of Depth, arXiv:2502.05795).

So its stream's variance, and with it the deep layers' nearness to the identity, grows slowly with depth.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import Site
from nlm.schemes.base import Branch, Fixed, Growth, Norm, Residual, Scheme, Slots


def layernorm_scaling(x: Tensor, f: Branch, norm: Branch, scale: Tensor) -> Tensor:
    return x + f(scale * norm(x))


@dataclass(frozen=True, kw_only=True)
class LayerNormScaling(Scheme):
    """Both sublayers of a layer have the same l, counted from 1; the final norm is as it was."""

    growth: ClassVar[Growth] = "logarithmic"

    @property
    def lacks_two_stacks(self) -> str:
        return "the factor 1/sqrt(l) was derived for a decoder alone"

    def residual(self, site: Site) -> Residual:
        return Residual(layernorm_scaling, norm=Norm(), scale=Fixed((site.layer + 1) ** -0.5))

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}
