"""No norms but the final one, which is the setting of ReLU's Revival (Jha & Reagen 2024, arXiv:2410.09637).

There, without norms, ReLU does better than GELU, which with them is the better one.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import Site, Weight
from nlm.schemes.base import Branch, Growth, Norm, Residual, Scheme, Slots


def plain(x: Tensor, f: Branch) -> Tensor:
    return x + f(x)


@dataclass(frozen=True, kw_only=True)
class NormFree(Scheme):
    """`init_std`: of every matrix. The authors' 0.02 is small at their width of 768; in their code the residual
    matrices, too, have no less of it."""

    init_std: float = 0.02

    growth: ClassVar[Growth] = "exponential"

    def residual(self, site: Site) -> Residual:
        return Residual(plain)

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}

    def std(self, weight: Weight) -> float:
        return self.init_std
