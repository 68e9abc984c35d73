"""Memory over time, in pieces that can be put together: what a piece leaves behind, and its highest moment."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Literal, Self

import numpy as np

Kind = Literal["weights", "gathered", "gradients", "optimizer", "activations", "logits", "buffers", "update"]
KINDS: tuple[Kind, ...] = (
    "weights",  # parameters, or this rank's shards of them, and constant tables
    "gathered",  # parameters that are put together from the shards of all ranks, for as long as they are
    "gradients",
    "optimizer",
    "activations",  # of the layers: what the backward needs, and what comes and goes
    "logits",  # of embedding, last norm, head and loss
    "buffers",  # of communication
    "update",  # what comes and goes in clipping, statistics and the optimizer's step
)


def bytes_of(**sizes: float) -> np.ndarray:
    """[KINDS]: bytes by kind."""
    return np.array([sizes.get(kind, 0.0) for kind in KINDS])


@dataclass(frozen=True)
class Segment:
    """Bytes by kind beyond those at its start: at its end (`net`), and when they are most (`peak`)."""

    net: np.ndarray = field(default_factory=bytes_of)
    peak: np.ndarray = field(default_factory=bytes_of)

    @classmethod
    def step(cls, **sizes: float) -> Self:
        """Something that is allocated, or freed where it is negative."""
        net = bytes_of(**sizes)
        return cls(net, net if net.sum() > 0 else 0 * net)

    def __add__(self, after: "Segment") -> "Segment":
        later = self.net + after.peak
        return Segment(self.net + after.net, later if later.sum() > self.peak.sum() else self.peak)

    def __mul__(self, times: int) -> "Segment":
        """So many times, one after another."""
        if times == 0:
            return Segment()
        last = (times - 1) * self.net + self.peak
        return Segment(times * self.net, last if last.sum() > self.peak.sum() else self.peak)


def joined(segments: Iterable[Segment]) -> Segment:
    return reduce(add, segments, Segment())
