"""LayerScale: Pre-LN with a small learned gain a channel on each branch (Touvron et al. 2021, arXiv:2103.17239)."""

from dataclasses import dataclass

from torch import Tensor

from nlm.anatomy import Site
from nlm.schemes.base import Branch, Learned, Norm, Residual, Scheme, Slots


def layerscale(x: Tensor, f: Branch, norm: Branch, gamma: Tensor) -> Tensor:
    return x + gamma * f(norm(x))


@dataclass(frozen=True, kw_only=True)
class LayerScale(Scheme):
    """`gamma`: where the gains start, by default 0.1 up to 18 layers, 1e-5 up to 24 and 1e-6 beyond (section 2.1).

    Adam moves them by about the learning rate a step: what starts far below it starts at 0.
    """

    gamma: float | None = None

    @property
    def folds(self) -> bool:
        return True

    @property
    def lacks_two_stacks(self) -> str | None:
        known = "where the gains start by default is known for one stack; set model.scheme.gamma"
        return known if self.gamma is None else None

    def residual(self, site: Site) -> Residual:
        by_depth = 0.1 if site.n_layers <= 18 else 1e-5 if site.n_layers <= 24 else 1e-6
        return Residual(layerscale, norm=Norm(), gamma=Learned(("dim",), self.gamma or by_depth))

    def slots(self, site: Site) -> Slots:
        return {"final": Norm()} if site.kind == "stack" else {}
