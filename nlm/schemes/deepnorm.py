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

    β is the init gain of V, O and the FFN, never of Q and K, and never a factor in the forward. The paper has
    no gated FFN: the gate keeps gain 1, because the product already carries β twice (up and down).
    """

    growth: ClassVar[Growth] = "constant"

    def residual(self, site: Site) -> Residual:
        return Residual(deepnorm, norm=Norm(), alpha=Fixed((2 * site.n_layers) ** 0.25))

    def std(self, weight: Weight) -> float:
        if weight.role in {Role.V, Role.O, Role.UP, Role.DOWN} and weight.site:
            return xavier(weight, gain=(8 * weight.site.n_layers) ** -0.25)
        return super().std(weight)
