"""T-Fixup: no norms and no warmup, by the init alone (Huang et al. 2020, ICML, "Improving Transformer Optimization
Through Better Initialization")."""

from dataclasses import dataclass
from typing import ClassVar

from nlm.anatomy import Role, Site, Weight
from nlm.schemes.base import Fixed, Growth, Residual, Scheme, Slot, Slots, scaled
from nlm.schemes.norm_free import plain


@dataclass(frozen=True, kw_only=True)
class TFixup(Scheme):
    """V, O and the FFN start at 0.67 L^-¼ and the embedding at (9L)^-¼ times the usual (section 3.2).

    That is the paper's encoder, which has two sublayers a layer as a decoder without an encoder does. Its decoder has
    three, and (9L)^-¼ in the place of the first factor; the embedding that both share is the encoder's. It is
    multiplied by sqrt(D), as in the Transformer that the paper starts from. The paper has no gate: it keeps gain 1,
    because the product carries the factor twice already.
    """

    growth: ClassVar[Growth] = "exponential"

    def residual(self, site: Site) -> Residual:
        return Residual(plain)

    def slots(self, site: Site) -> Slots:
        return {"token": Slot(scaled, scale=Fixed(site.dim**0.5))} if site.kind == "stack" else {}

    def std(self, weight: Weight) -> float:
        std = super().std(weight)
        if weight.role is Role.EMBED:
            return std * (9 * (weight.n_encoder_layers or weight.n_layers)) ** -0.25
        if weight.role in {Role.V, Role.O, Role.UP, Role.DOWN} and weight.site:
            return std * (9**-0.25 if weight.site.reads_memory else 0.67) * weight.site.n_layers**-0.25
        return std
