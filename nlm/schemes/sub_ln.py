"""Sub-LN: Pre-LN with a second norm inside each sublayer (Magneto, Wang et al. 2022, arXiv:2210.06423)."""

from dataclasses import dataclass
from math import log, sqrt

from nlm.anatomy import Role, Site, Weight
from nlm.schemes.base import Norm, Residual, Scheme, Slots, xavier
from nlm.schemes.pre_ln import pre_ln


@dataclass(frozen=True, kw_only=True)
class SubLN(Scheme):
    """Inner norms before W_o and before W_down; V, O and the FFN start larger by sqrt(ln 2L) (table 1).

    With an encoder of N layers and a decoder of M it is sqrt(ln 3M · ln 2N / 3) in the encoder and sqrt(ln 3M) in the
    decoder, whose cross-attention has neither the gain nor the inner norm.

    As for every scheme here, the gate of a gated FFN keeps gain 1: the paper has no gate.
    """

    def residual(self, site: Site) -> Residual:
        return Residual(pre_ln, norm=Norm())

    def slots(self, site: Site) -> Slots:
        inner = {"attn": "heads", "ffn": "hidden", "stack": "final"}
        return {inner[site.kind]: Norm()} if site.kind in inner else {}

    def std(self, weight: Weight) -> float:
        site = weight.site
        if weight.role in {Role.V, Role.O, Role.UP, Role.DOWN} and site and site.kind != "cross":
            square = log(site.branches)
            if site.stack == "encoder" and site.other_layers:
                square *= log(site.other_branches) / 3
            return xavier(weight, gain=sqrt(square))
        return super().std(weight)
