"""Which layers are of one kind: built alike, so that one of them tells what each costs."""

from collections.abc import Hashable, Mapping

from nlm.anatomy import Site
from nlm.build import design
from nlm.config import Config
from nlm.model import Part
from nlm.schemes.base import Equation, Learned, Norm, Scheme, Slot

NOTHING = Part(range(0), first=False, last=False)
ENDS = Part(range(0), first=True, last=True)


def kinds(config: Config) -> list[int]:
    """The first layer that is built as each layer is, [L]; numbers apart, which cost nothing."""
    scheme, model = design(config, part=NOTHING).scheme, config.model
    first: dict[Hashable, int] = {}
    return [
        first.setdefault(_structure(scheme, layer, model.n_layers, model.dim, model.activation), layer)
        for layer in range(model.n_layers)
    ]


def _structure(scheme: Scheme, layer: int, n_layers: int, dim: int, activation: str) -> Hashable:
    sublayers = scheme.sublayers(layer)
    sites = [Site(layer, n_layers, kind, dim, place, activation) for place, kind in enumerate(sublayers)]
    return sublayers, *((_equation(scheme.residual(site)), _slots(scheme.slots(site))) for site in sites)


def _slots(slots: Mapping[str, Slot | Norm]) -> Hashable:
    return tuple((name, Norm if isinstance(slot, Norm) else _equation(slot)) for name, slot in sorted(slots.items()))


def _equation(equation: Equation) -> Hashable:
    parts = sorted(equation.parts.items())
    return equation.function, *(
        (name, (part.axes, part.shared, part.stored is None) if isinstance(part, Learned) else type(part))
        for name, part in parts
    )
