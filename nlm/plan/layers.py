"""Which layers are of one kind: built alike, so that one of them tells what each costs."""

from collections.abc import Hashable, Mapping

from nlm.build import design
from nlm.config import Config
from nlm.model import Design, Part
from nlm.schemes.base import Equation, Learned, Norm, Slot

NOTHING = Part(range(0), first=False, last=False)
ENDS = Part(range(0), first=True, last=True)


class Layers:
    """The layers of a model by `kinds`: the number of the first that is built as each layer is, [L]; of these the first
    `n_encoder` are of an encoder with a decoder.

    `traced`, a decoder's first and its encoder's last, have all kinds, twice as far as there are so many: the first of
    a kind may do what the others then find done. Where a decoder reads an encoder, the last traced stands for the last
    only, whose backward makes the gradient of what all of them read.
    """

    def __init__(self, config: Config) -> None:
        self.kinds = kinds(config)
        self.n_encoder = n = config.model.n_encoder_layers or 0
        encoder, decoder = self.kinds[:n], self.kinds[n:]
        stop = _enough(decoder)
        if n and stop < len(decoder):
            stop = decoder.index(decoder[-1], stop) + 1
        self.traced = range(n - _enough(encoder[::-1]), n + stop)
        self._own = self.traced[:-1] if n else self.traced
        self._latest = {self.kinds[layer]: layer for layer in self._own}

    def like(self, layer: int) -> int:
        """The traced layer that tells what a layer costs."""
        if self.n_encoder and layer == len(self.kinds) - 1:
            return self.traced[-1]
        return layer if layer in self._own else self._latest[self.kinds[layer]]


def _enough(kinds: list[int]) -> int:
    """How many of the first layers have all kinds, and twice as many."""
    return min(len(kinds), 2 * (1 + max(map(kinds.index, kinds)))) if kinds else 0


def kinds(config: Config) -> list[int]:
    """The first layer that is built as each layer is, [L], an encoder's first; numbers apart, which cost nothing."""
    first: dict[Hashable, int] = {}
    return [
        first.setdefault(_structure(stack.design, layer), stack.first_number + layer)
        for stack in design(config, part=NOTHING).stacks
        for layer in range(stack.design.site(0, "stack").n_layers)
    ]


def _structure(of: Design, layer: int) -> Hashable:
    sublayers = of.scheme.sublayers(layer, of.memory_len is not None)
    sites = [of.site(layer, kind, place) for place, kind in enumerate(sublayers)]
    equations = ((_equation(of.scheme.residual(site)), _slots(of.scheme.slots(site))) for site in sites)
    return of.stack, sublayers, *equations


def _slots(slots: Mapping[str, Slot | Norm]) -> Hashable:
    return tuple((name, Norm if isinstance(slot, Norm) else _equation(slot)) for name, slot in sorted(slots.items()))


def _equation(equation: Equation) -> Hashable:
    parts = sorted(equation.parts.items())
    return equation.function, *(
        (name, (part.axes, part.shared, part.stored is None) if isinstance(part, Learned) else type(part))
        for name, part in parts
    )
