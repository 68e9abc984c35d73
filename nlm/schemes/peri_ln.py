"""Peri-LN: normalize what each sublayer reads and what it writes (Kim et al. 2025, arXiv:2502.02732)."""

from dataclasses import dataclass

from torch import Tensor

from nlm.anatomy import Site
from nlm.schemes.base import Branch, Norm, NormPlace, Residual, Scheme, Slots


def peri_ln(x: Tensor, f: Branch, norm_in: Branch, norm_out: Branch) -> Tensor:
    return x + norm_out(f(norm_in(x)))


@dataclass(frozen=True, kw_only=True)
class PeriLN(Scheme):
    """Each branch adds exactly unit variance at the start, so the stream's variance is 1 + 2l after l layers.

    `embed_norm`: normalize the embedding too, as the paper's recipe does.
    """

    embed_norm: bool = True

    @property
    def norm_place(self) -> NormPlace | None:
        return None if self.embed_norm else "around"

    def residual(self, site: Site) -> Residual:
        return Residual(peri_ln, branch_end="norm_out", norm_in=Norm(), norm_out=Norm())

    def slots(self, site: Site) -> Slots:
        if site.kind != "stack":
            return {}
        return {"final": Norm()} | ({"embed": Norm()} if self.embed_norm else {})
