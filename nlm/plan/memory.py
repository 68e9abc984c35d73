"""The memory of a rank through a step: the moment that takes most, and what takes it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Self

import numpy as np
from torch import nn

from nlm.config import Config
from nlm.layout import V_SCHEDULES
from nlm.model import Part
from nlm.parallel.pieces import BUCKET_ELEMENTS
from nlm.parallel.pipeline import split, stages_of
from nlm.parallel.recompute import inputs_kept, segment_length
from nlm.parallel.shard import blocks_per_unit, reshards
from nlm.plan.layers import Layers
from nlm.plan.schedule import Action, orders
from nlm.plan.segment import KINDS, Segment, bytes_of, joined
from nlm.plan.shapes import Shape
from nlm.plan.trace import Place, Rise, Trace, Update, part_of, update_cost

Step = Segment.step


@dataclass(frozen=True)
class Tensors:
    """Parameters and buffers of a place, on one of the tensor parallel ranks."""

    shapes: tuple[tuple[int, ...], ...]
    element_bytes: int
    buffer_bytes: int

    @classmethod
    def of(cls, *modules: nn.Module | None) -> Self:
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


class Parameters:
    """What a tensor parallel rank holds of the model, place by place, and what its update costs.

    `layers` are traced, the others like them; `tied` is what the head reads of the embedding.
    """

    def __init__(self, config: Config, updates: tuple[Update, Update] | None = None) -> None:
        layers = Layers(config).traced
        model = part_of(config, layers)
        stems = [module for stack in model.stacks for module in (stack.position, stack.rotary, stack.stem)]
        self.tensors: dict[Place, Tensors] = {l: Tensors.of(block) for l, block in model.layers.items()}
        self.tensors["embed"] = Tensors.of(model.embed, model.token, *stems)
        self.tensors["memory"] = Tensors.of(model.encoder and model.encoder.final)
        self.tensors["head"] = Tensors.of(model.final, model.head, model.logits)
        self.tied = Tensors.of(model.embed) if config.model.tied else Tensors.of()
        fewer = layers[:-1] if len(layers) > 1 else layers
        self.updates = updates or (update_cost(config, fewer), update_cost(config, layers))

    def update(self, name: str, weights: float) -> float:
        """A number of Update for so many bytes of weights, on the line through the two that were traced."""
        a, b = self.updates
        at_a, at_b = getattr(a, name), getattr(b, name)
        if a.weights == b.weights:
            return float(at_b * weights / b.weights)
        return float(max(0.0, at_b + (at_b - at_a) * (weights - b.weights) / (b.weights - a.weights)))


@dataclass(frozen=True)
class Costs:
    """What layouts share that have the same tensor parallelism, shape of a microbatch and recomputation.

    Where blocks are computed again, `trace` is of them one by one, and `kept` of a segment of them, whose activations
    are there together.
    """

    parameters: Parameters
    shape: Shape
    trace: Trace
    kept: Trace | None
    deferred: bool


def costs_of(config: Config, shape: Shape, parameters: Parameters, traced: Callable[[str], Trace]) -> Costs:
    """Of microbatches of a shape, which are `traced` by mode of recomputation."""
    mode = config.parallel.recompute
    kept = traced("none") if mode == "sqrt" else None
    by_itself = mode if mode in ("none", "selective") else "block"
    return Costs(parameters, shape, traced(by_itself), kept, defers(config))


def defers(config: Config) -> bool:
    """Whether weight gradients are put off."""
    return config.parallel.pp > 1 and config.parallel.schedule in V_SCHEDULES


def stream_bytes(config: Config, shape: Shape) -> tuple[int, int]:
    """Of the source's stream and of the target's, which go together from rank to rank of a pipeline."""
    parallel, size = config.parallel, 8 if config.train.precision == "fp64" else 4
    ranks = parallel.tp if parallel.sequence_parallel else 1
    source, target = (shape.rows * n // ranks * config.model.dim * size for n in (shape.source, shape.target))
    return source, target


class Run(NamedTuple):
    """Some of `n_blocks` consecutive layers of a stack, which are computed again, if at all, before anything of them
    goes; or what stands between two stacks.

    `stream` is of one layer's input, of which the forward keeps the share `kept`; beside them the backward has `again`.
    """

    places: "Counter[Place]"
    n_blocks: int = 0
    stream: int = 0
    kept: float = 1.0
    again: int = 0


class Stage:
    """A part of the stack in the memory of one rank."""

    def __init__(self, config: Config, costs: Costs, part: Part) -> None:
        self.config, self.costs, self.part = config, costs, part
        parallel = config.parallel
        self.sharded = parallel.dp_shard > 1
        self.ranks = parallel.dp_shard if self.sharded else 1
        replicated = parallel.dp_replicate > 1 and not self.sharded
        self.buckets = replicated and parallel.pp == 1  # of DDP, which keeps all gradients in them
        self.reshards = self.sharded and reshards(parallel)
        there: dict[Place, bool] = {"embed": part.first, "head": part.last}
        ends = [place for place, is_there in there.items() if is_there]
        border, layers = costs.trace.layers.n_encoder, part.layers
        self.streams = stream_bytes(config, costs.shape)
        self.stacks = _both(layers, border)
        if border in range(layers.start + 1, layers.stop + 1):
            ends.append("memory")
        size = blocks_per_unit(parallel, len(layers)) if self.sharded else max(1, len(layers))
        units = [layers[i : i + size] for i in range(0, len(layers), size)]
        self.root, self.units = self._holds(ends), [self._holds(unit) for unit in units]
        self.runs = [self._runs(unit, border) for unit in units]
        self.all = sum(self.units, self.root)
        self.splits, self.joins = border > 0 and not part.first, border > 0 and not part.last
        """Whether the two streams come as one tensor, and go as one."""
        self.reads, self.n_layers = border > 0 and len(self.stacks[1]) > 0, len(costs.trace.layers.kinds)
        """Whether layers here read what an encoder leaves; the layers of the model."""
        self.whole, self.shards = self.bytes(self.all), self.bytes(self.all, self.ranks)

    def _holds(self, places: Sequence[Place]) -> "Counter[Place]":
        """How often each traced place is among `places`."""
        like = self.costs.trace.layers.like
        return Counter(like(place) if isinstance(place, int) else place for place in places)

    def _runs(self, unit: range, border: int) -> list[Run]:
        found = []
        for here, stack, stream in zip(_both(unit, border), self.stacks, self.streams, strict=True):
            kept, again = inputs_kept(self.config.parallel.recompute, len(stack))
            length = segment_length(len(stack)) if self.costs.kept else max(1, len(here))
            for i in range(0, len(here), length):
                found.append(Run(self._holds(here[i : i + length]), len(stack), stream, kept / len(stack), again))
            if border - 1 in here:
                found.append(Run(Counter(["memory"])))
        return found

    def tensors(self, place: Place) -> tuple[Tensors, ...]:
        parameters = self.costs.parameters
        tied = (parameters.tied,) if place == "head" and not self.part.first else ()
        return parameters.tensors[place], *tied

    def bytes(self, places: "Counter[Place]", ranks: int = 1) -> int:
        return sum(n * of.bytes(ranks) for place, n in places.items() for of in self.tensors(place))

    def gathered(self, places: "Counter[Place]") -> int:
        return self.ranks * self.bytes(places, self.ranks)

    def forward(self, fresh: bool) -> Segment:
        """Of a microbatch; `fresh`: the parameters are not gathered yet."""
        passed = self.costs.trace.first.forward
        gathers = self.sharded and (fresh or self.reshards)
        root, before = self.gathered(self.root), 0

        def gather(size: int) -> Segment:
            """Into a flat buffer, which stays until the next is there, and out of it."""
            nonlocal before
            there, before = before, size
            return Step(buffers=size) + Step(buffers=-there) + Step(gathered=size) if gathers else Segment()

        found = gather(root)
        if self.part.first:
            found += rise(passed["embed"], "logits")
        copies = self.splits and self.costs.shape.rows > 1
        found += Step(activations=sum(self.streams) if copies else 0)
        for unit, runs in zip(self.units, self.runs, strict=True):
            size = self.gathered(unit)
            found += gather(size)
            for run in runs:
                goes = Step(activations=-run.stream * (1 - run.kept))
                found += joined((rise(passed[place], "activations") + goes) * n for place, n in run.places.items())
            found += Step(gathered=-size) if self.reshards else Segment()
        if self.part.last:
            found += rise(passed["head"], "logits")
        if self.joins:  # into one; of the two, a decoder's layers keep what they read of the encoder
            source, target = self.streams
            found += Step(activations=source + target)
            own = self.reads or copies or self.part.first  # and no part of what has come in
            found += Step(activations=-target * own - source * (not self.reads))
        found += Step(activations=-sum(n * self.costs.trace.passing.get(place, 0) for place, n in self.all.items()))
        found += Step(buffers=-before) if gathers else Segment()
        return found + (Step(gathered=-root) if self.reshards else Segment())

    def backward(self, first: bool, last: bool) -> Segment:
        """Of a microbatch. The `first` makes the gradients; the `last` has them reduced."""
        traces = (self.costs.trace, self.costs.kept or self.costs.trace)
        ends, layers = (of.first.backward if first else of.later.backward for of in traces)
        parallel, root, pending, ahead = self.config.parallel, self.gathered(self.root), 0, 0
        found = Step(buffers=root) + Step(gathered=root) + Step(buffers=-root) if self.reshards else Segment()

        def made(place: Place) -> Segment:
            size = self.bytes(Counter([place]))
            new = size if first and not self.costs.deferred else 0
            of = layers[place] if isinstance(place, int) else ends[place]
            segment = rise(of, "logits" if place in ("embed", "head") else "activations", new)
            return segment + Step(gradients=-size) if self.buckets and last else segment

        def end(unit: "Counter[Place]") -> Segment:
            nonlocal pending
            segment = self.drop(unit) if last or parallel.pp == 1 else Segment()
            if self.sharded and last:
                segment += self.reduce(unit, pending)
                pending = self.gathered(unit)
            return segment

        if self.part.last:
            found += made("head")
        if self.reads and self.stacks[1].stop < self.n_layers:  # the gradient of what is read, as by the last layer
            found += Step(activations=self.streams[0] * (parallel.tp if parallel.sequence_parallel else 1))
        for i in reversed(range(len(self.units))):
            if self.reshards:  # while this unit computes, the next comes into a flat buffer
                here, ahead = ahead, self.gathered(self.units[i - 1]) if i else 0
                size = self.gathered(self.units[i])
                found += Step(gathered=size) + Step(buffers=-here) + Step(buffers=ahead)
            for run in reversed(self.runs[i]):
                found += Step(activations=run.again * run.stream) + self.again(run)
                found += joined(made(place) * n for place, n in reversed(run.places.items()))
                ends_too = -run.kept if self.costs.kept else 1 - run.kept  # of its input, if the trace has kept it
                found += Step(activations=(ends_too * run.places.total() - run.again) * run.stream)
            found += end(self.units[i])
        if self.part.first:
            found += made("embed")
        if (self.splits or self.joins) and not self.costs.deferred:
            left = dict(zip(KINDS, self.forward(False).net + found.net, strict=True))
            found += Step(activations=-left["activations"], logits=-left["logits"])
        return found + end(self.root) + Step(buffers=-pending)

    def again(self, run: Run) -> Segment:
        """What is computed again before its backward."""
        if (kept := self.costs.kept) is None or not run.n_blocks:
            return Segment()
        found = joined(rise(kept.first.forward[place], "activations") * n for place, n in run.places.items())
        return found + Step(activations=-sum(n * kept.passing.get(place, 0) for place, n in run.places.items()))

    def weight_gradients(self, first: bool, last: bool) -> Segment:
        """Of a microbatch whose backward has put them off: made while all that it has kept for them is there."""
        kept = self.forward(False).net + self.backward(first, False).net
        shapes = [(of.element_bytes, *shape) for place in self.all for of in self.tensors(place) for shape in of.shapes]
        product = max(map(prod, shapes), default=0)
        found = Step(gradients=self.whole if first else 0) + Step(gradients=product) + Step(gradients=-product)
        found += Segment(-kept, 0 * kept)
        if self.sharded and last:
            found += joined(self.drop(unit) + self.reduce(unit, 0) for unit in (*self.units, self.root))
        return found

    def drop(self, unit: "Counter[Place]") -> Segment:
        return Step(gathered=-self.gathered(unit)) if self.sharded else Segment()

    def reduce(self, unit: "Counter[Place]", pending: int) -> Segment:
        """Gradients go into a flat buffer, when the one before is `pending` no longer, and out of it as a shard."""
        found = Step(buffers=-pending) + Step(buffers=self.gathered(unit))
        return found + Step(gradients=-self.bytes(unit)) + Step(gradients=self.bytes(unit, self.ranks))


def _both(layers: range, border: int) -> tuple[range, range]:
    """Of some layers those before a border and those from it on."""
    return range(layers.start, min(layers.stop, border)), range(max(layers.start, border), layers.stop)


def rise(of: Rise, kind: str, gradients: int = 0) -> Segment:
    """Of a kind, but for gradients that stay."""
    return Segment(
        bytes_of(**{kind: of.net - gradients}, gradients=gradients),
        bytes_of(**{kind: of.peak - gradients}, gradients=gradients),
    )


def rank_memory(config: Config, costs: Costs, rank: int = 0) -> np.ndarray:
    """[KINDS]: bytes at the moment of a step when a pipeline rank has most."""
    stages = stages_on(config, costs, rank)
    there = _static(config, costs, list(stages.values()))
    passes = _passes(stages, orders(config.parallel)[rank])
    return (there + passes + _end(config, costs, list(stages.values()))).peak


def stages_on(config: Config, costs: Costs, rank: int) -> dict[int, Stage]:
    """What a pipeline rank holds."""
    parallel, model = config.parallel, config.model
    if parallel.pp == 1:
        return {0: Stage(config, costs, Part(range(model.n_all_layers), first=True, last=True))}
    parts = split(model, config.train.seq_len, parallel.n_stages, config.source_len)
    return {s: Stage(config, costs, parts[s]) for s in stages_of(rank, parallel)}


def _static(config: Config, costs: Costs, stages: list[Stage]) -> Segment:
    """What is there from step to step."""
    parallel, update = config.parallel, costs.parameters.update
    buffers = sum(
        n * of.buffer_bytes for stage in stages for place, n in stage.all.items() for of in stage.tensors(place)
    )
    whole = sum(stage.whole for stage in stages)
    state = update("state", whole) / parallel.dp_shard + update("kept", whole)
    found = Step(weights=sum(stage.shards for stage in stages) + buffers, optimizer=state)
    if stages[0].buckets:
        found += Step(gradients=whole)
    if parallel.pp > 1:  # a buffer for what comes in, of each microbatch, forward and backward
        neighbours = sum((not stage.part.first) + (not stage.part.last) for stage in stages)
        found += Step(buffers=sum(stages[0].streams) * parallel.microbatches * neighbours)
    return found


def _passes(stages: dict[int, Stage], order: Sequence[Action]) -> Segment:
    """All microbatches. A stage does the same to most of them, which is not computed again."""
    does = {"F": "forward", "I": "input", "B": "gradients", "W": "gradients"}
    left = Counter((does[kind], s) for kind, s, _ in order)
    all_of, known = left.copy(), dict[tuple[str, int, bool, bool], Segment]()
    found = Segment()
    for kind, s, _ in order:
        what = does[kind], s
        first, last = left[what] == all_of[what], left[what] == 1
        left[what] -= 1
        if (key := (kind, s, first, last)) not in known:
            known[key] = _done(stages[s], kind, first, last)
        found += known[key]
    return found


def _done(stage: Stage, kind: str, first: bool, last: bool) -> Segment:
    match kind:
        case "F":
            return stage.forward(fresh=first or stage.config.parallel.pp == 1)
        case "I":
            return stage.backward(first, False)
        case "W":
            return stage.weight_gradients(first, last)
        case _ if stage.costs.deferred:
            return stage.backward(first, False) + stage.weight_gradients(first, last)
    return stage.backward(first, last)


def _end(config: Config, costs: Costs, stages: list[Stage]) -> Segment:
    """Gradients are joined and clipped; what statistics need of the weights is copied; the update."""
    parallel, update = config.parallel, costs.parameters.update
    pieces = sum(stage.whole for stage in stages) / parallel.dp_shard
    found = Segment()
    if parallel.pp > 1 and parallel.dp_replicate > 1:
        flat = min(pieces, 4 * BUCKET_ELEMENTS)
        found += Step(buffers=flat) + Step(buffers=-flat)
    found += Step(update=(most := update("clip", pieces))) + Step(update=-most)
    found += Step(update=pieces if config.statistics.enabled else 0)
    return found + Step(update=update("update", pieces))
