"""Branch scaling: Pre-LN with every branch times 1/sqrt(2L) (Hayou & Yang 2023, arXiv:2302.00453).

With it comes depth-µP: under an optimizer whose steps do not follow the gradient's size, the branches' learning rate
falls as 1/sqrt(L) (Yang et al. 2023, arXiv:2310.02244, table 1), and one tuned on few layers holds for many.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from nlm.anatomy import MATRICES, Group, Site, Weight
from nlm.schemes.base import Branch, Fixed, Norm, Residual, Scheme, Slots


def branch_scaled(x: Tensor, f: Branch, norm: Branch, scale: Tensor) -> Tensor:
    return x + scale * f(norm(x))


@dataclass(frozen=True, kw_only=True)
class BranchScaled(Scheme):
    """`base_layers`: the depth that optim.lr was tuned at; the branches learn at sqrt(base_layers / L) times it."""

    base_layers: int = 1

    @property
    def folds(self) -> bool:
        return True

    @property
    def lacks_two_stacks(self) -> str:
        return "the factor 1/sqrt(2L) is that of one stack of L layers"

    def residual(self, site: Site) -> Residual:
        return Residual(branch_scaled, norm=Norm(), scale=Fixed((2 * site.n_layers) ** -0.5))

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}

    def group(self, weight: Weight) -> Group:
        group = super().group(weight)
        if weight.site and weight.role in MATRICES:
            return replace(group, lr=(self.base_layers / weight.site.n_layers) ** 0.5)
        return group
