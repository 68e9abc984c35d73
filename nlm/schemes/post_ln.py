"""Post-LN: normalize after the sum, as in the first Transformer (Vaswani et al. 2017, arXiv:1706.03762)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import Site
from nlm.schemes.base import Branch, Growth, Norm, Residual, Scheme


def post_ln(x: Tensor, f: Branch, norm: Branch) -> Tensor:
    return norm(x + f(x))


@dataclass(frozen=True, kw_only=True)
class PostLN(Scheme):
    growth: ClassVar[Growth] = "constant"

    def residual(self, site: Site) -> Residual:
        return Residual(post_ln, norm=Norm())
