"""NormFormer: Pre-LN with head scales, a norm after attention and one in the FFN.

Shleifer, Weston & Ott 2021, arXiv:2110.09456, section 2. The heads are scaled before W_o, as the paper's
equation says; the released fairseq code scales blocks of W_o's output instead.
"""

from dataclasses import dataclass

from torch import Tensor

from nlm.anatomy import Site
from nlm.schemes.base import Branch, Learned, Norm, Residual, Scheme, Slot, Slots
from nlm.schemes.peri_ln import peri_ln
from nlm.schemes.pre_ln import pre_ln


def scaled_skip(x: Tensor, f: Branch, norm: Branch, skip_scale: Tensor) -> Tensor:
    return skip_scale * x + f(norm(x))


def scale_heads(heads: Tensor, scale: Tensor) -> Tensor:
    return (heads.unflatten(-1, (len(scale), -1)) * scale[:, None]).flatten(-2)  # [B S H·Dh]


@dataclass(frozen=True, kw_only=True)
class NormFormer(Scheme):
    """The paper's four additions, each of which can be left out; `residual_scale` is for small models only.

    The paper has decoders and encoders, each alone, with the same equations; cross-attention is as in Pre-LN, to which
    the released code, too, adds nothing.
    """

    head_scale: bool = True
    attn_norm: bool = True
    ffn_norm: bool = True
    residual_scale: bool = False

    def residual(self, site: Site) -> Residual:
        if site.kind == "attn" and self.attn_norm:
            return Residual(peri_ln, branch_end="norm_out", norm_in=Norm(), norm_out=Norm())
        if site.kind == "ffn" and self.residual_scale:
            return Residual(scaled_skip, norm=Norm(), skip_scale=Learned(("dim",), init=1.0))
        return Residual(pre_ln, norm=Norm())

    def slots(self, site: Site) -> Slots:
        if site.kind == "attn" and self.head_scale:
            return {"heads": Slot(scale_heads, scale=Learned(("head",), init=1.0))}
        if site.kind == "ffn" and self.ffn_norm:
            return {"hidden": Norm()}
        return {"final": Norm()} if site.kind == "stack" else {}
