"""Brainformer's order of sublayers, dense: two of attention in eight (Zhou et al. 2023, arXiv:2306.00008).

The published block is attention, MoE, FFN, attention, MoE, FFN, MoE, FFN, found by search; here the mixtures of experts
are FFNs, as the search's finding is the proportion. The order is known from secondary accounts only.
"""

from dataclasses import dataclass

from nlm.anatomy import Kind, Site
from nlm.schemes.base import Norm, Residual, Scheme, Slots
from nlm.schemes.pre_ln import pre_ln

BLOCK: tuple[tuple[Kind, Kind], ...] = (("attn", "ffn"), ("ffn", "attn"), ("ffn", "ffn"), ("ffn", "ffn"))


@dataclass(frozen=True, kw_only=True)
class Brainformer(Scheme):
    """A block is four layers of two sublayers; depth that is no multiple of four ends within one."""

    def sublayers(self, layer: int, reads_memory: bool = False) -> tuple[Kind, ...]:
        return BLOCK[layer % len(BLOCK)]

    @property
    def lacks_two_stacks(self) -> str:
        return "the order of sublayers was searched for in a decoder alone, without cross-attention"

    def residual(self, site: Site) -> Residual:
        return Residual(pre_ln, norm=Norm())

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}
