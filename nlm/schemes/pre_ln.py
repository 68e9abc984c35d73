"""Pre-LN: normalize what each sublayer reads (Radford et al. 2019; Xiong et al. 2020, arXiv:2002.04745)."""

from dataclasses import dataclass

from torch import Tensor

from nlm.anatomy import WRITES, Site, Weight
from nlm.schemes.base import Branch, Norm, NormPlace, Residual, Scheme, Slots


def pre_ln(x: Tensor, f: Branch, norm: Branch) -> Tensor:
    return x + f(norm(x))


@dataclass(frozen=True, kw_only=True)
class PreLN(Scheme):
    """`residual_init`: W_o and W_down start smaller by 1/sqrt(2L), as in GPT-2, so that the stream stays O(1); unless
    model.init is another. 2L is the number of sublayers on the stream, in a decoder with an encoder 3L."""

    residual_init: bool = True

    @property
    def folds(self) -> bool:
        return True

    @property
    def norm_place(self) -> NormPlace | None:
        return "before"

    def residual(self, site: Site) -> Residual:
        return Residual(pre_ln, norm=Norm())

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}

    @property
    def leaves_init_open(self) -> bool:
        return True

    def std(self, weight: Weight) -> float:
        std = super().std(weight)
        if self.residual_init and weight.role in WRITES and weight.site:
            std *= weight.site.branches**-0.5
        return std
