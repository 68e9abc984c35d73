"""Transformers without Tears: Pre-LN with ScaleNorm, FixNorm and SmallInit (Nguyen & Salazar 2019, arXiv:1910.05895).

Its norm is `scalenorm`: `configs/schemes/without_tears.toml`.
"""

from dataclasses import dataclass

from nlm.anatomy import Group, Role, Site, Weight
from nlm.schemes.base import Fixed, Norm, Residual, Scheme, Slot, Slots, scaled
from nlm.schemes.pre_ln import pre_ln
from nlm.weight_norms import Conditioning, MakeWeightNorm


@dataclass(frozen=True, kw_only=True)
class WithoutTears(Scheme):
    """FixNorm (section 2.2): token vectors of norm 1, times sqrt(D) where they enter the stream, plain in the head.

    SmallInit (section 2.1): attention starts at N(0, 2/(5D)). Nothing decays, as in the authors' code. What length the
    token vectors start at sets their learning rate only; it is that of every scheme here.
    """

    def residual(self, site: Site) -> Residual:
        return Residual(pre_ln, norm=Norm())

    def slots(self, site: Site) -> Slots:
        if site.kind != "stack":
            return {}
        return {"token": Slot(scaled, scale=Fixed(site.dim**0.5)), "final": Norm()}

    def std(self, weight: Weight) -> float:
        if weight.role in {Role.Q, Role.K, Role.V, Role.O}:
            dim = weight.shape[0 if weight.role is Role.O else 1]
            return (2 / (5 * dim)) ** 0.5
        return super().std(weight)

    def group(self, weight: Weight) -> Group:
        return Group(weight_decay=0.0)

    def weight_norm(self, weight: Weight) -> MakeWeightNorm | None:
        return Conditioning if weight.role in {Role.EMBED, Role.HEAD} else None
