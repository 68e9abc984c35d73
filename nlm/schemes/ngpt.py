"""nGPT: every vector on the unit hypersphere (Loshchilov et al. 2024, arXiv:2410.01131).

Each sublayer is a step from the stream towards its own normalized output, with a learned rate for each
channel; matrices are projected back to unit norm along the stream's axis after every optimizer step.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import Group, Site, Weight
from nlm.norms import unit
from nlm.schemes.base import Branch, Fixed, Growth, Learned, Residual, Scheme, Slot, Slots, stream_axis


def ngpt(x: Tensor, f: Branch, alpha: Tensor) -> Tensor:
    h = unit(x)
    return unit(h + alpha.abs() * (unit(f(h)) - h))


def unit_query(q: Tensor, s_qk: Tensor) -> Tensor:
    # The paper gives query and key the same s_qk and the score the scale sqrt(Dh). Only the product of both
    # reaches the score, which divides by sqrt(Dh) itself: hence s_qk² · Dh here and a plain unit key.
    return unit(q) * (s_qk * s_qk * q.shape[-1])


def times(x: Tensor, s: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    return x * (s * factor)


@dataclass(frozen=True, kw_only=True)
class NGPT(Scheme):
    """`alpha`: the initial rate, by default 0.05 up to 20 layers and 1/L beyond (the paper: "order of 1/L")."""

    alpha: float | None = None

    growth: ClassVar[Growth] = "constant"

    @property
    def lacks_two_stacks(self) -> str | None:
        known = "the default of the initial rate is that of one stack of L layers; set model.scheme.alpha"
        return known if self.alpha is None else None

    def residual(self, site: Site) -> Residual:
        init = min(0.05, 1 / site.n_layers) if self.alpha is None else self.alpha
        return Residual(ngpt, alpha=Learned(("dim",), init, stored=site.dim**-0.5))

    def slots(self, site: Site) -> Slots:
        stored, root = site.dim**-0.5, Fixed(site.dim**0.5)
        match site.kind:
            case "attn" | "cross":
                s_qk = Learned(("head", "head_dim"), 1.0, stored)
                return {"q": Slot(unit_query, s_qk=s_qk), "k": Slot(unit)}
            case "ffn":
                s = Learned(("hidden",), 1.0)
                return {"up": Slot(times, s=s, factor=root), "gate": Slot(times, s=s, factor=root)}
            case "stack":
                return {"logits": Slot(times, s=Learned(("vocab",), 1.0, stored))}

    def std(self, weight: Weight) -> float:
        axis = stream_axis(weight)
        assert axis is not None, f"{weight} is no matrix of the stream"
        return weight.shape[axis] ** -0.5  # about unit norm; the projection that follows makes it exact

    def group(self, weight: Weight) -> Group:
        return Group(weight_decay=0.0)

    def unit_axis(self, weight: Weight) -> int | None:
        return stream_axis(weight)
