"""Normalizer-Free residuals: known variances in the place of norms (Brock et al. 2021, arXiv:2101.08692, section 3).

The stream's variance grows by α² a branch; each branch reads it divided by its expected std β, and writes unit variance
because its weights are standardized and its activation has a gain.
"""

from dataclasses import dataclass

from torch import Tensor

from nlm.activations import unit_variance_gain
from nlm.anatomy import MATRICES, Role, Site, Weight
from nlm.schemes.base import Branch, Fixed, Learned, Residual, Scheme, Slot, Slots, scaled
from nlm.weight_norms import MakeWeightNorm, ScaledStandardization


def nf(x: Tensor, f: Branch, alpha: Tensor, beta: Tensor, skip_gain: Tensor) -> Tensor:
    return x + alpha * skip_gain * f(x / beta)


@dataclass(frozen=True, kw_only=True)
class NF(Scheme):
    """`alpha`: what each branch adds to the stream, as a std.

    The stream starts at unit variance and is never reset, as there are no transitions between widths; the head, too,
    reads it divided by its std. `skip_gain` is SkipInit's number, which the authors' networks have at 0 first.
    """

    alpha: float = 0.2

    def std_before(self, branches: int) -> float:
        return (1 + self.alpha**2 * branches) ** 0.5

    def residual(self, site: Site) -> Residual:
        beta = Fixed(self.std_before(site.before))
        return Residual(nf, alpha=Fixed(self.alpha), beta=beta, skip_gain=Learned((), 0.0))

    def slots(self, site: Site) -> Slots:
        match site.kind:
            case "ffn":
                return {"hidden": Slot(scaled, scale=Fixed(unit_variance_gain(site.activation)))}
            case "stack":
                return {"final": Slot(scaled, scale=Fixed(1 / self.std_before(site.branches)))}
        return {}

    def std(self, weight: Weight) -> float:
        return 1.0 if weight.role is Role.EMBED else super().std(weight)

    def weight_norm(self, weight: Weight) -> MakeWeightNorm | None:
        return ScaledStandardization if weight.role in MATRICES and weight.site else None
