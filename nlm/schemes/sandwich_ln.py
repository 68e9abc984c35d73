"""Sandwich-LN: a norm before and one after each sublayer (CogView, Ding et al. 2021, arXiv:2105.13290, section 2.4).

The blocks of Peri-LN, four years earlier, with no norm on the embedding.
"""

from dataclasses import dataclass

from nlm.anatomy import Site
from nlm.schemes.base import Norm, NormPlace, Residual, Scheme, Slots
from nlm.schemes.peri_ln import peri_ln


@dataclass(frozen=True, kw_only=True)
class SandwichLN(Scheme):
    """CogView divides the norms' inputs by their largest number first, against overflow in float16: norms here are
    taken in float32."""

    @property
    def norm_place(self) -> NormPlace | None:
        return "around"

    def residual(self, site: Site) -> Residual:
        return Residual(peri_ln, branch_end="norm_out", norm_in=Norm(), norm_out=Norm())

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}
