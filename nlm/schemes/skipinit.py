"""SkipInit: a learned number on each branch that starts at 0, and no norms (De & Smith 2020, arXiv:2002.10444)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import Site
from nlm.schemes.base import Branch, Growth, Learned, Residual, Scheme


def skipinit(x: Tensor, f: Branch, alpha: Tensor) -> Tensor:
    return x + alpha * f(x)


@dataclass(frozen=True, kw_only=True)
class SkipInit(Scheme):
    """`alpha`: where the numbers start; the paper also has 1/sqrt(branches)."""

    alpha: float = 0.0

    growth: ClassVar[Growth] = "exponential"

    def residual(self, site: Site) -> Residual:
        return Residual(skipinit, alpha=Learned((), self.alpha))
