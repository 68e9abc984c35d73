"""The memory of a rank through a step: the moment that takes most, and what takes it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import numpy as np
from torch import nn

from nlm.config import Config
from nlm.layout import V_SCHEDULES
from nlm.model import Part
from nlm.parallel.pieces import BUCKET_ELEMENTS
from nlm.parallel.pipeline import split, stages_of
from nlm.parallel.shard import blocks_per_unit, reshards
from nlm.plan.schedule import Action, orders
from nlm.plan.segment import Segment, bytes_of
from nlm.plan.trace import Place, Rise, part_of, trace, update_cost

Step = Segment.step


@dataclass(frozen=True)
class Tensors:
    """Parameters and buffers of a place, on one of the tensor parallel ranks."""

    shapes: tuple[tuple[int, ...], ...] = ()
    element_bytes: int = 0
    buffer_bytes: int = 0

    @classmethod
    def of(cls, *modules: nn.Module | None) -> "Tensors":
        there = [module for module in modules if module is not None]
        parameters = [p for module in there for p in module.parameters()]
        buffers = [b for module in there for b in module.buffers()]
        return cls(
            tuple(tuple(p.shape) for p in parameters),
            max((p.element_size() for p in parameters), default=0),
            sum(b.numel() * b.element_size() for b in buffers),
        )

    def bytes(self, ranks: int = 1) -> int:
        """Of the parameters, what the first of so many ranks has when they divide each along its first dim, as FSDP2
        does."""
        return self.element_bytes * sum(-(-rows // ranks) * prod(rest) for rows, *rest in self.shapes)

    def __add__(self, other: "Tensors") -> "Tensors":
        element_bytes = max(self.element_bytes, other.element_bytes)
        return Tensors(self.shapes + other.shapes, element_bytes, self.buffer_bytes + other.buffer_bytes)


class Costs:
    """What layouts share that have the same tensor parallelism, rows a microbatch and recomputation."""

    def __init__(self, config: Config) -> None:
        parallel = config.parallel
        self.rows = config.batch_rows // parallel.data_ranks // parallel.microbatches
        self.deferred = parallel.pp > 1 and parallel.schedule in V_SCHEDULES
        self.trace = trace(config, self.rows, self.deferred)
        n = self.trace.n_layers
        self.updates = update_cost(config, max(1, n - 1)), update_cost(config, n)
        model = part_of(config, n)
        tied = Tensors.of(model.embed) if config.model.tied else Tensors()
        self.tensors: dict[Place, Tensors] = {l: Tensors.of(block) for l, block in enumerate(model.blocks.values())}
        self.tensors["embed"] = Tensors.of(model.embed, model.token, model.position, model.rotary, model.stem)
        self.tensors["head"] = Tensors.of(model.final, model.head, model.logits)
        self.tied = tied
        positions = len(model.tp.positions(config.train.seq_len))
        self.stream_bytes = self.rows * positions * config.model.dim * self.tensors["embed"].element_bytes


class Stage:
    """A part of the stack in the memory of one rank."""

    def __init__(self, config: Config, costs: Costs, part: Part) -> None:
        self.config, self.costs, self.part = config, costs, part
        parallel = config.parallel
        self.sharded = parallel.engine == "torch" and parallel.dp_shard > 1
        self.buckets = (
            parallel.engine == "torch" and parallel.dp_replicate > 1 and not self.sharded and parallel.pp == 1
        )
        self.ranks = parallel.dp_shard if self.sharded else 1
        self.ends: list[Place] = (["embed"] if part.first else []) + (["head"] if part.last else [])
        self.size = blocks_per_unit(parallel, len(part.layers)) if self.sharded else len(part.layers) or 1
        self.units = [part.layers[i : i + self.size] for i in range(0, len(part.layers), self.size)]
        self.tensors = sum((self.of(place) for place in (*self.ends, *part.layers)), Tensors())
        self.root = sum((self.of(place) for place in self.ends), Tensors())

    def of(self, place: Place) -> Tensors:
        costs = self.costs
        if isinstance(place, int):
            return costs.tensors[costs.trace.like(place)]
        own = costs.tensors[place]
        return own + costs.tied if place == "head" and not self.part.first else own

    def gathered(self, tensors: Tensors) -> int:
        return self.ranks * tensors.bytes(self.ranks)

    def unit(self, layers: range) -> Tensors:
        return sum((self.of(l) for l in layers), Tensors())

    def forward(self, fresh: bool) -> Segment:
        """Of a microbatch; `fresh`: the parameters are not gathered yet."""
        passed = self.costs.trace.first.forward
        gathers = self.sharded and (fresh or reshards(self.config.parallel))
        drops = self.sharded and reshards(self.config.parallel)
        root, before = self.gathered(self.root), 0
        found = Segment()

        def gather(size: int) -> Segment:
            """Into a flat buffer, which stays until the next is there, and out of it."""
            nonlocal before
            there, before = before, size
            return Step(buffers=size) + Step(buffers=-there) + Step(gathered=size)

        found += gather(root) if gathers else Segment()
        if self.part.first:
            found += rise(passed["embed"], "logits")
        for layers in self.units:
            size = self.gathered(self.unit(layers))
            found += gather(size) if gathers else Segment()
            found += self.layers(layers, lambda l: rise(passed[l], "activations"))
            found += Step(gathered=-size) if drops else Segment()
        if self.part.last:
            found += rise(passed["head"], "logits")
        return found + Step(buffers=-before) + (Step(gathered=-root) if drops else Segment())

    def backward(self, first: bool, last: bool) -> Segment:
        """Of a microbatch. The `first` makes the gradients; the `last` has them reduced."""
        passed = self.costs.trace.first.backward if first else self.costs.trace.later.backward
        gathers = self.sharded and reshards(self.config.parallel)
        drops = self.sharded and (self.config.parallel.pp == 1 or last)
        root, reduced = self.gathered(self.root), 0
        found = Step(buffers=root) + Step(gathered=root) + Step(buffers=-root) if gathers else Segment()

        def made(place: Place) -> Segment:
            kind = "activations" if isinstance(place, int) else "logits"
            new = self.of(place).bytes() if first and not self.costs.deferred else 0
            segment = rise(passed[place], kind, new)
            return segment + Step(gradients=-self.of(place).bytes()) if self.buckets and last else segment

        def end(tensors: Tensors) -> Segment:
            nonlocal reduced
            size = self.gathered(tensors)
            segment = Step(gathered=-size) if drops else Segment()
            if self.sharded and last:
                segment += Step(buffers=-reduced) + Step(buffers=size)
                segment += Step(gradients=-tensors.bytes()) + Step(gradients=tensors.bytes(self.ranks))
                reduced = size
            return segment

        if self.part.last:
            found += made("head")
        ahead = 0
        for i, layers in reversed(list(enumerate(self.units))):
            unit = self.unit(layers)
            if gathers:
                here, ahead = ahead, self.gathered(self.unit(self.units[i - 1])) if i else 0
                found += Step(gathered=self.gathered(unit)) + Step(buffers=-here) + Step(buffers=ahead)
            found += self.layers(layers[::-1], made) + end(unit)
        if self.part.first:
            found += made("embed")
        return found + end(self.root) + Step(buffers=-reduced)

    def weight_gradients(self, first: bool) -> Segment:
        """Of a microbatch whose backward has put them off: made while all that it has kept for them is there."""
        kept = self.forward(False).net + self.backward(first, False).net
        made = self.tensors.bytes() if first else 0
        product = max((self.tensors.element_bytes * prod(shape) for shape in self.tensors.shapes), default=0)
        return Step(gradients=made) + Step(gradients=product) + Step(gradients=-product) + Segment(-kept, 0 * kept)

    def layers(self, layers: range, of: Callable[[int], Segment]) -> Segment:
        """One after another; those of one kind cost the same."""
        found = Segment()
        for l, alike in groupby(layers, self.costs.trace.like):
            found += of(l) * len(list(alike))
        return found


def rise(of: Rise, kind: str, gradients: int = 0) -> Segment:
    """Of a kind, but for gradients that stay."""
    return Segment(
        bytes_of(**{kind: of.net - gradients}, gradients=gradients),
        bytes_of(**{kind: of.peak - gradients}, gradients=gradients),
    )


def rank_memory(config: Config, costs: Costs, rank: int = 0) -> np.ndarray:
    """[KINDS]: bytes at the moment of a step when a pipeline rank has most."""
    parallel, model = config.parallel, config.model
    if parallel.pp == 1:
        stages = {0: Stage(config, costs, Part(range(model.n_layers), first=True, last=True))}
    else:
        parts = split(model, config.train.seq_len, parallel.n_stages)
        stages = {s: Stage(config, costs, parts[s]) for s in stages_of(rank, parallel)}
    there = _static(config, costs, list(stages.values()))
    return (there + _passes(stages, orders(parallel)[rank]) + _end(config, costs, list(stages.values()))).peak


def _static(config: Config, costs: Costs, stages: list[Stage]) -> Segment:
    """What is there from step to step."""
    parallel = config.parallel
    weights = sum(stage.tensors.bytes(stage.ranks) + stage.tensors.buffer_bytes for stage in stages)
    found = Step(weights=weights, optimizer=_optimizer(config, costs, stages))
    if stages[0].buckets:
        found += Step(gradients=sum(stage.tensors.bytes() for stage in stages))
    if parallel.pp > 1:  # a buffer for what comes in, of each microbatch, forward and backward
        stream = costs.stream_bytes * parallel.microbatches
        ends = sum((not stage.part.first) + (not stage.part.last) for stage in stages)
        found += Step(buffers=stream * ends)
    return found


def _passes(stages: dict[int, Stage], order: Sequence[Action]) -> Segment:
    """All microbatches. A stage does the same to most of them, which is not computed again."""
    started: set[tuple[str, int]] = set()
    left = Counter((action.kind, action.stage) for action in order)
    known: dict[tuple[str, int, bool, bool], Segment] = {}
    found = Segment()
    for kind, s, _ in order:
        first, last = (kind, s) not in started, left[kind, s] == 1
        started.add((kind, s))
        left[kind, s] -= 1
        key = kind, s, first, last
        if key not in known:
            known[key] = _done(stages[s], kind, first, last)
        found += known[key]
    return found


def _done(stage: Stage, kind: str, first: bool, last: bool) -> Segment:
    match kind:
        case "F":
            return stage.forward(fresh=first or stage.config.parallel.pp == 1)
        case "W":
            return stage.weight_gradients(first)
        case "B" if stage.costs.deferred:
            return stage.backward(first, last) + stage.weight_gradients(first)
    return stage.backward(first, last)


def _end(config: Config, costs: Costs, stages: list[Stage]) -> Segment:
    """Gradients are joined and clipped; what statistics need of the weights is copied; the update."""
    parallel = config.parallel
    pieces = sum(stage.tensors.bytes(parallel.dp_shard) for stage in stages)
    found = Segment()
    if parallel.pp > 1 and parallel.dp_replicate > 1:
        largest = max(4 * prod(shape) for stage in stages for shape in stage.tensors.shapes)
        found += Step(buffers=(flat := min(pieces, 4 * BUCKET_ELEMENTS + largest))) + Step(buffers=-flat)
    found += Step(update=(most := _line(costs, pieces, "clip"))) + Step(update=-most)
    found += Step(update=pieces if config.statistics.enabled else 0)
    return found + Step(update=_line(costs, pieces, "update"))


def _optimizer(config: Config, costs: Costs, stages: list[Stage]) -> float:
    whole = sum(stage.tensors.bytes() for stage in stages)
    return _line(costs, whole, "state") / config.parallel.dp_shard + _line(costs, whole, "kept")


def _line(costs: Costs, weights: float, name: str) -> float:
    """What the update costs with so many bytes of weights, on the line through the two that were traced."""
    a, b = costs.updates
    at_a, at_b = getattr(a, name), getattr(b, name)
    if a.weights == b.weights:
        return float(at_b * weights / b.weights)
    return float(max(0.0, at_b + (at_b - at_a) * (weights - b.weights) / (b.weights - a.weights)))
