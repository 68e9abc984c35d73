"""An equation of a scheme as an nn.Module: its parts become parameters, buffers and norm layers."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from nlm.anatomy import Axis, Role, Site, Span
from nlm.schemes.base import Branch, Equation, Fixed, Learned, Norm

MakeNorm = Callable[[Span], nn.Module]
"""width -> the configured norm layer."""
Spans = Mapping[Axis, Span]
"""What this rank holds of each logical axis."""


def flat(axes: tuple[Axis, ...], spans: Spans) -> Span:
    """The axes, of which only the first may be cut, as one."""
    first, *inner = (spans[axis] for axis in axes)
    for span in inner:
        assert span.is_whole, f"{axes} is cut along an inner axis"
        first *= span.full
    return first


class EquationModule(nn.Module):
    """function(x, …, **parts) with every part materialized under its own name.

    `place` are the axes of the tensor that the equation acts on.
    """

    def __init__(self, equation: Equation, spans: Spans, place: tuple[Axis, ...], make_norm: MakeNorm) -> None:
        super().__init__()
        self.function = equation.function
        self.names = tuple(equation.parts)
        self.roles: dict[str, Role] = {}
        self.spans: dict[str, tuple[Span, ...]] = {}
        self.initial: dict[str, float] = {}
        self.rescaled: tuple[str, ...] = ()
        for name, part in equation.parts.items():
            match part:
                case Norm():
                    self.add_module(name, make_norm(flat(place, spans)))
                case Fixed(value):
                    self._constant(name, value)
                case Learned(axes, init, stored):
                    self.spans[name] = tuple(spans[axis] for axis in axes) or (Span.whole(1),)
                    self.register_parameter(name, nn.Parameter(torch.empty([len(span) for span in self.spans[name]])))
                    self.roles[name] = Role.SCALE
                    self.initial[name] = init if stored is None else stored
                    if stored is not None:
                        self._constant(f"{name}_rescale", init / stored)
                        self.rescaled += (name,)

    def _constant(self, name: str, value: float) -> None:
        # A tensor, not a Python number: numbers are baked into a compiled graph, one graph for each value.
        self.register_buffer(name, torch.empty(()), persistent=False)
        self.initial[name] = value

    def part(self, name: str) -> Tensor | nn.Module:
        value = getattr(self, name)
        return value * getattr(self, f"{name}_rescale") if name in self.rescaled else value

    def evaluate(self, *args: Tensor | Branch) -> Tensor:
        return self.function(*args, **{name: self.part(name) for name in self.names})


class SlotModule(EquationModule):
    """What happens to the tensor in a slot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.evaluate(x)


class ResidualModule(EquationModule):
    """The only place where the stream meets a branch."""

    site: Site

    def forward(self, x: Tensor, branch: Branch, norms: list[Tensor] | None) -> Tensor:
        """x [B S D] -> [B S D]. `norms`, unless None, receives the norms of the branch and of the result."""
        if norms is None:
            return self.evaluate(x, branch)
        y = self.evaluate(x, partial(_recorded, branch, norms))
        norms.append(l2_norm(y))
        return y


def _recorded(branch: Branch, norms: list[Tensor], x: Tensor) -> Tensor:
    y = branch(x)
    norms.append(l2_norm(y))
    return y


@torch.no_grad()
def l2_norm(x: Tensor) -> Tensor:
    """[…] -> []: root of the sum of squares of all elements, in float32 or more."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
