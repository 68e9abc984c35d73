"""ReZero: one learned number a layer that starts at 0, and no norms (Bachlechner et al. 2020, arXiv:2003.04887)."""

from dataclasses import dataclass
from typing import ClassVar

from nlm.anatomy import Site
from nlm.schemes.base import Growth, Learned, Residual, Scheme
from nlm.schemes.skipinit import skipinit


@dataclass(frozen=True, kw_only=True)
class ReZero(Scheme):
    """Both sublayers of a layer share their number (eqs. 6 and 7). In the first step it alone moves, by about the
    learning rate: the branches' gradients are 0."""

    growth: ClassVar[Growth] = "exponential"

    def residual(self, site: Site) -> Residual:
        return Residual(skipinit, alpha=Learned((), 0.0, shared=True))
