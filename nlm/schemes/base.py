"""What a normalization scheme is: one equation and a few rules, and the parts it may use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nlm.anatomy import MATRICES, READS, WRITES, Axis, Group, Kind, Role, Site, Weight
from nlm.weight_norms import MakeWeightNorm

Branch = Callable[[Tensor], Tensor]
"""A sublayer, [B S D] -> [B S D]."""


@dataclass(frozen=True)
class Norm:
    """A norm layer of the configured kind, over the logical axes of the place it is put in."""


@dataclass(frozen=True)
class Learned:
    """A learned vector over logical axes (`()`: one number, [1]), with the value `init` everywhere at the start.

    `stored` is the number that the parameter itself starts at when it differs from `init`: the equation then
    sees parameter · init / stored, so that the relative step of an adaptive optimizer is lr / stored
    (nGPT, Loshchilov et al. 2024, section 2.5). One that is `shared` is the same parameter in all sublayers of a
    layer; it bears the name of the first.
    """

    axes: tuple[Axis, ...]
    init: float
    stored: float | None = None
    shared: bool = False


@dataclass(frozen=True)
class Fixed:
    """A constant that may differ between layers; it becomes a 0-dim buffer, so that all layers share one graph."""

    value: float


Part = Norm | Learned | Fixed


class Equation:
    """A function and the parts it is called with: `Equation(f, a=Fixed(2.0))` computes f(x, …, a=2.0).

    `function` must be a plain module-level function, the same object in every layer: a closure that carries
    a layer's own number would compile anew for each layer.
    """

    def __init__(self, function: Callable[..., Tensor], **parts: Part) -> None:
        self.function = function
        self.parts = parts


class Residual(Equation):
    """How the stream meets a branch: function(x [B S D], f: Branch, **parts) -> [B S D].

    `branch_end` names the part that makes what is added to the stream, where it is not f itself that does: a sample
    for which a sublayer is dropped gets nothing from it (stochastic depth).
    """

    def __init__(self, function: Callable[..., Tensor], *, branch_end: str | None = None, **parts: Part) -> None:
        super().__init__(function, **parts)
        self.branch_end = branch_end


class Slot(Equation):
    """What happens to the tensor in a slot: function(x, **parts) -> tensor of the same shape."""


Growth = Literal["constant", "linear", "logarithmic", "exponential"]
"""How the variance of the stream goes up the stack: not at all, a + c · layer, a + c · (1 + 1/2 + … + 1/layer), or by
the same factor at every layer."""
NormPlace = Literal["before", "after", "around"]
"""Of the norms of a block: x + f(norm(x)), x + norm(f(x)) or x + norm_out(f(norm_in(x))), named so."""
Slots = Mapping[str, Slot | Norm]
"""What goes into which slot; a slot that is not named stays empty."""


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """A normalization scheme. Fields are the paper's hyperparameters; the rules below are all there is to it."""

    growth: ClassVar[Growth] = "linear"
    """The law that the stream follows in a healthy model."""

    def sublayers(self, layer: int, reads_memory: bool = False) -> tuple[Kind, ...]:
        """Which sublayers a layer has, in their order; one that `reads_memory` is of a decoder with an encoder."""
        return ("attn", "cross", "ffn") if reads_memory else ("attn", "ffn")

    @property
    def lacks_two_stacks(self) -> str | None:
        """What stands against an encoder–decoder: something that depends on depth and is known for one stack only.

        None where nothing does: its paper has the formula for both stacks, or nothing in it depends on depth but by
        what comes before on the same stream.
        """
        return None

    @property
    def leaves_init_open(self) -> bool:
        """Whether another init may take the place of its own."""
        return type(self).std is Scheme.std

    @property
    def folds(self) -> bool:
        """Whether its norms stand between the stream and linear layers, f(norm(x)) and the head, and nowhere else, so
        that these can take them in."""
        return False

    @property
    def norm_place(self) -> NormPlace | None:
        """Where its norms stand if, in every layer and attention first, that is all there is to its forward but a norm
        before the head: such a model has equals in other libraries (nlm.export)."""
        return None

    @abstractmethod
    def residual(self, site: Site) -> Residual:
        """The equation of one sublayer."""

    def slots(self, site: Site) -> Slots:
        """What goes into the slots of one sublayer, or (`site.kind == "stack"`) of the ends of the stack."""
        return {}

    def std(self, weight: Weight) -> float:
        """Standard deviation of a matrix at initialization."""
        return weight.shape[1] ** -0.5 if weight.role in {Role.EMBED, Role.HEAD} else xavier(weight)

    def matrix(self, normal: Tensor, weight: Weight) -> Tensor:
        """A matrix at initialization, of standard normal numbers of its shape."""
        return normal * self.std(weight)

    def group(self, weight: Weight) -> Group:
        """Learning-rate and weight-decay multipliers; by default only matrices decay."""
        return Group(weight_decay=1.0 if weight.role in MATRICES else 0.0)

    def weight_norm(self, weight: Weight) -> MakeWeightNorm | None:
        """What the forward makes of a matrix before it is used; None for the matrix itself."""
        return None

    def unit_axis(self, weight: Weight) -> int | None:
        """The axis along which the weight is projected to unit norm after each step; None for no projection."""
        return None


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """The equation of a slot that multiplies."""
    return x * scale


def xavier(weight: Weight, gain: float = 1.0) -> float:
    """gain · sqrt(2 / (fan_in + fan_out)) of a matrix [out, in] (Glorot & Bengio 2010, eq. 16)."""
    return gain * (2 / sum(weight.shape)) ** 0.5


def stream_axis(weight: Weight) -> int | None:
    """The axis of size D of a matrix [out, in]: inputs where it reads the stream, outputs where it writes it."""
    if weight.role in READS | {Role.EMBED, Role.HEAD}:
        return 1
    return 0 if weight.role in WRITES else None
