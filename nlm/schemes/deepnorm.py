"""DeepNorm: Post-LN with an up-weighted skip and down-scaled init (Wang et al. 2022, arXiv:2203.00555)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import Role, Site, Weight
from nlm.schemes.base import Branch, Fixed, Growth, Norm, Residual, Scheme, xavier


def deepnorm(x: Tensor, f: Branch, norm: Branch, alpha: Tensor) -> Tensor:
    return norm(alpha * x + f(x))


@dataclass(frozen=True, kw_only=True)
class DeepNorm(Scheme):
    """α = (2L)^¼ and β = (8L)^-¼ of L layers (table in figure 2); 2L · 2β²/α² = 1 bounds the update.

    With an encoder of N layers and a decoder of M: α = 0.81 (N⁴M)^(1/16) and β = 0.87 (N⁴M)^(-1/16) in the encoder,
    (3M)^¼ and (12M)^-¼ in the decoder. (torchscale has 1.15 in the place of 0.87, with which the encoder's part of the
    bound is 1.77, not 1.01.)

    β is the init gain of V, O and the FFN, never of Q and K, and never a factor in the forward. The paper has
    no gated FFN: the gate keeps gain 1, because the product already carries β twice (up and down).
    """

    growth: ClassVar[Growth] = "constant"

    def residual(self, site: Site) -> Residual:
        return Residual(deepnorm, norm=Norm(), alpha=Fixed(constants(site)[0]))

    def std(self, weight: Weight) -> float:
        if weight.role in {Role.V, Role.O, Role.UP, Role.DOWN} and weight.site:
            return xavier(weight, gain=constants(weight.site)[1])
        return super().std(weight)


def constants(site: Site) -> tuple[float, float]:
    """α and β."""
    n, other = site.n_layers, site.other_layers
    if other and site.stack == "encoder":
        root = (n**4 * other) ** (1 / 16)
        return 0.81 * root, 0.87 / root
    return site.branches**0.25, (4 * site.branches) ** -0.25
