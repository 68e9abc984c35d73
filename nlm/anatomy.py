"""The words everyone shares: what a weight is (Role), where it sits (Site), how it is trained (Group).

Rules of schemes, optimizers and parallel layouts speak in these words, never in parameter names.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """What a weight is. The first nine are matrices [out, in]; the last three are vectors or scalars."""

    EMBED = "embed"
    Q = "q"
    K = "k"
    V = "v"
    O = "o"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    HEAD = "head"
    NORM = "norm"  # gains of norm layers
    SCALE = "scale"  # learned parts of schemes and scores
    BIAS = "bias"


READS = frozenset({Role.Q, Role.K, Role.V, Role.GATE, Role.UP})
"""Matrices that read the residual stream."""
WRITES = frozenset({Role.O, Role.DOWN})
"""Matrices that write into the residual stream."""
MATRICES = READS | WRITES | {Role.EMBED, Role.HEAD}

Axis = Literal["dim", "head", "kv_head", "head_dim", "hidden", "vocab"]
"""Logical axes. The name of an axis, not its position, decides how a tensor parallel layout places it."""

CUT_AXES: frozenset[Axis] = frozenset({"head", "kv_head", "hidden", "vocab"})
"""The axes that tensor parallelism divides among its ranks."""

IGNORED = -100
"""A target from which nothing is to be learned."""


@dataclass(frozen=True)
class Span:
    """The indices start … stop-1 of an axis of length `full` that this rank holds."""

    start: int
    stop: int
    full: int

    @classmethod
    def whole(cls, full: int) -> "Span":
        return cls(0, full, full)

    @classmethod
    def part(cls, full: int, index: int, parts: int) -> "Span":
        """One of `parts` parts in order, whose lengths differ by at most 1."""
        return cls(full * index // parts, full * (index + 1) // parts, full)

    def __len__(self) -> int:
        return self.stop - self.start

    def inner(self, start: int, stop: int) -> "Span":
        """The span of its own indices start … stop-1."""
        return Span(self.start + start, self.start + stop, self.full)

    def __mul__(self, inner: int) -> "Span":
        """The span of this axis flattened with a whole axis inside it."""
        return Span(self.start * inner, self.stop * inner, self.full * inner)

    @property
    def is_whole(self) -> bool:
        return len(self) == self.full


SLOTS: dict[str, tuple[Axis, ...]] = {
    "token": ("dim",),  # [B S D] embedded tokens, before positions are added
    "embed": ("dim",),  # [B S D] what enters the first block
    "q": ("head", "head_dim"),  # [B S H Dh] after positions, before the score
    "k": ("kv_head", "head_dim"),  # [B S Hkv Dh] likewise
    "heads": ("head", "head_dim"),  # [B S H·Dh] concatenated heads, before W_o
    "gate": ("hidden",),  # [B S F] before the activation
    "up": ("hidden",),  # [B S F]
    "hidden": ("hidden",),  # [B S F] before W_down
    "final": ("dim",),  # [B S D] what the head reads
    "logits": ("vocab",),  # [B S V]
}
"""The fixed places where a scheme may put a module, with the logical axes that end the tensor there."""


Kind = Literal["attn", "cross", "ffn"]
"""Of a sublayer: self-attention, attention to what an encoder has made of the source, feed-forward."""
StackName = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Site:
    """Where: one sublayer of one layer, or (`kind="stack"`, `layer=0`) the ends of the whole stack.

    `place` tells a layer's sublayers apart, counted from 0 in the order in which they come. `layer` and `n_layers` are
    of its own stack; `other_layers` are those of the other in an encoder–decoder, 0 where there is none.
    """

    layer: int  # 0-based
    n_layers: int
    kind: Kind | Literal["stack"]
    dim: int
    place: int = 0
    activation: str = "gelu"  # of the model's feed-forward sublayers
    stack: StackName = "decoder"
    other_layers: int = 0

    @property
    def reads_memory(self) -> bool:
        """Whether its layer has cross-attention too."""
        return self.stack == "decoder" and self.other_layers > 0

    @property
    def before(self) -> int:
        """How many sublayers come before it in its stack."""
        return (3 if self.reads_memory else 2) * self.layer + self.place

    @property
    def branches(self) -> int:
        """How many sublayers its stack has."""
        return (3 if self.reads_memory else 2) * self.n_layers

    @property
    def other_branches(self) -> int:
        """And the other stack."""
        return (2 if self.stack == "decoder" else 3) * self.other_layers

    @property
    def number(self) -> int:
        """Of its layer among all of the model, an encoder's first."""
        return self.layer + (self.other_layers if self.reads_memory else 0)

    @property
    def sublayer_number(self) -> int:
        """Of its sublayer, likewise."""
        return self.before + (self.other_branches if self.reads_memory else 0)


@dataclass(frozen=True)
class Weight:
    """A parameter as the rules see it. `site` is None outside the blocks.

    `shape` is that of the whole parameter, [out, in] for matrices, whatever part of it a rank holds; `n_layers` are
    those of the model, for the weights outside too, of its decoder where it also has `n_encoder_layers`.
    """

    role: Role
    shape: tuple[int, ...]
    site: Site | None
    n_layers: int
    n_encoder_layers: int = 0


@dataclass(frozen=True)
class Group:
    """How a weight is trained: multipliers of the configured learning rate and weight decay."""

    lr: float = 1.0
    weight_decay: float = 1.0
