"""An equation of a scheme as an nn.Module: its parts become parameters, buffers and norm layers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlm.anatomy import Axis, Role, Site, Span
from nlm.random import uniform
from nlm.schemes.base import Branch, Equation, Fixed, Learned, Norm, Residual
from nlm.signals import Watch, moments, stream_signals

MakeNorm = Callable[[Span, Site], nn.Module]
"""width, site -> the configured norm layer."""
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

    `place` are the axes of the tensor that the equation acts on. `first`, the module of the layer's first sublayer,
    has the parameters that both share.
    """

    def __init__(
        self,
        equation: Equation,
        site: Site,
        spans: Spans,
        place: tuple[Axis, ...],
        make_norm: MakeNorm,
        first: "EquationModule | None" = None,
    ) -> None:
        super().__init__()
        self.site = site
        self.function = equation.function
        self.names = tuple(equation.parts)
        self.roles: dict[str, Role] = {}
        self.spans: dict[str, tuple[Span, ...]] = {}
        self.initial: dict[str, float] = {}
        self.rescaled: tuple[str, ...] = ()
        # In lists, where no one looks for modules: a parameter belongs to one only.
        self.elsewhere: dict[str, list[EquationModule]] = {}
        for name, part in equation.parts.items():
            match part:
                case Norm():
                    self.add_module(name, make_norm(flat(place, spans), site))
                case Fixed(value):
                    self._constant(name, value)
                case Learned(shared=True) if first is not None:
                    self.elsewhere[name] = [first]
                case Learned(axes, init, stored):
                    self.spans[name] = tuple(spans[axis] for axis in axes) or (Span.whole(1),)
                    self.register_parameter(name, nn.Parameter(torch.empty([len(span) for span in self.spans[name]])))
                    self.roles[name] = Role.SCALE
                    self.initial[name] = init if stored is None else stored
                    if stored is not None:
                        self._constant(f"{name}_rescale", init / stored)
                        self.rescaled += (name,)

    def _constant(self, name: str, value: float, dtype: torch.dtype | None = None) -> None:
        # A tensor, not a Python number: numbers are baked into a compiled graph, one graph for each value.
        self.register_buffer(name, torch.empty((), dtype=dtype), persistent=False)
        self.initial[name] = value

    def part(self, name: str) -> Tensor | nn.Module:
        if name in self.elsewhere:
            return self.elsewhere[name][0].part(name)
        value = getattr(self, name)
        return value * getattr(self, f"{name}_rescale") if name in self.rescaled else value

    def parts(self) -> dict[str, Any]:
        return {name: self.part(name) for name in self.names}


class SlotModule(EquationModule):
    """What happens to the tensor in a slot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.parts())


class ResidualModule(EquationModule):
    """The only place where the stream meets a branch. `drop` is the share of the samples for which it does not."""

    def __init__(
        self,
        residual: Residual,
        site: Site,
        spans: Spans,
        make_norm: MakeNorm,
        first: EquationModule | None = None,
        drop: float | None = None,
    ) -> None:
        super().__init__(residual, site, spans, ("dim",), make_norm, first)
        self.branch_end = residual.branch_end
        self.drop: Tensor
        self.number: Tensor
        if drop is not None:
            self._constant("drop", drop)
            self._constant("number", site.sublayer_number, torch.int64)

    def forward(self, x: Tensor, branch: Branch, watch: Watch | None, keys: Tensor | None) -> Tensor:
        """x [B S D] -> [B S D]. The branch and the stream show signals.STREAM.

        `keys` [B] are the samples' own random numbers where samples are dropped.
        """
        parts = self.parts()
        if watch is not None:
            branch = partial(_shown, branch, watch)
        if keys is not None:
            kept = (uniform(keys, self.number) >= self.drop) / (1 - self.drop)  # [B]
            if self.branch_end is None:
                branch = partial(_times, branch, kept[:, None, None])
            else:
                parts[self.branch_end] = partial(_times, parts[self.branch_end], kept[:, None, None])
        y = self.function(x, branch, **parts)
        if watch is not None:
            watch.seen.append(stream_signals(x, y, watch.view.here))
        return y


def _times(branch: Branch, factor: Tensor, x: Tensor) -> Tensor:
    y = branch(x)
    return y * factor.to(y.dtype)


def _shown(branch: Branch, watch: Watch, x: Tensor) -> Tensor:
    y = branch(x)
    watch.seen.append(moments(y, watch.view.here))
    return y
