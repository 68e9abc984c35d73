"""OLMo 2: normalize what each sublayer writes, and nothing that it reads (OLMo team 2025, arXiv:2501.00656, section 3).

Its norm is RMSNorm with eps 1e-6, its score `rms_qknorm_full`: `configs/schemes/olmo2.toml`.
"""

from dataclasses import dataclass

from torch import Tensor

from nlm.anatomy import Group, Role, Site, Weight
from nlm.schemes.base import Branch, Norm, NormPlace, Residual, Scheme, Slots


def output_norm(x: Tensor, f: Branch, norm: Branch) -> Tensor:
    return x + norm(f(x))


@dataclass(frozen=True, kw_only=True)
class OLMo2(Scheme):
    """Everything decays but the embedding, the gains of norms too, as in the authors' training scripts."""

    @property
    def norm_place(self) -> NormPlace | None:
        return "after"

    def residual(self, site: Site) -> Residual:
        return Residual(output_norm, branch_end="norm", norm=Norm())

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}

    def group(self, weight: Weight) -> Group:
        return Group(weight_decay=0.0 if weight.role is Role.EMBED else 1.0)
