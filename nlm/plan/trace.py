"""What the real code does to memory: a step of a few layers of the model, on tensors that have none.

Nothing here knows a scheme, a norm, a score or an optimizer: forward, backward, clipping and update are those of
training, and what they allocate and free is written down where the stream goes from one layer to the next.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nlm.batch import Batch
from nlm.build import design, loss_rows
from nlm.config import Config
from nlm.data.rank import batch_of
from nlm.float8 import multiply_in_float8, refuse_missing_float8
from nlm.model import Part, Run, Stack, Transformer
from nlm.parallel.deferred import DeferredGradients
from nlm.parallel.recompute import recompute
from nlm.plan.fake import ImaginedEngine, ImaginedTensorParallel, faked
from nlm.plan.layers import Layers
from nlm.plan.ledger import Ledger
from nlm.plan.shapes import Shape

Place = int | Literal["embed", "memory", "head"]
"""A layer; what comes before all layers; what stands between an encoder's and a decoder's; what comes after, the loss
included."""


class Rise(NamedTuple):
    """What happens in a place: bytes beyond those at its start, at its end and when they are most; and the
    work that a Ledger counts."""

    net: float
    peak: float
    flops: float
    slow_flops: float
    moved: float
    kernels: float
    sent: float


@dataclass(frozen=True)
class Pass:
    """What one microbatch does, place by place."""

    forward: dict[Place, Rise]
    backward: dict[Place, Rise]


@dataclass(frozen=True)
class Update:
    """The end of a step with parameters of so many bytes: optimizer state of the pieces, what else every rank keeps,
    of which checkpoints have `saved`; what clipping and the update take for a while, and the bytes that they move."""

    weights: float
    state: float
    kept: float
    saved: float
    clip: float
    update: float
    moved: float


@dataclass(frozen=True)
class Trace:
    """`first` and `later` are microbatches: the first makes the gradients that later ones add to.

    `passing`, by place, are bytes that a layer's forward leaves and its backward does not find: they are gone when the
    whole forward has ended, as are autocast's copies of weights that nothing has saved. What a decoder's first and last
    layer do beside the others, with what its encoder has left, counts there, in "memory".
    """

    layers: Layers
    first: Pass
    later: Pass
    passing: dict[Place, float]


def trace(config: Config, shape: Shape, mode: str, deferred: bool = False) -> Trace:
    """Of a microbatch of a shape on a tensor parallel rank of the config's, whose blocks the backward computes again as
    `mode` has it, "none", "selective" or "block". `deferred`: it leaves out the weight gradients, as in the schedules
    that put them off."""
    layers = Layers(config)
    model = part_of(config, layers.traced)
    with FakeTensorMode(), Ledger(model.tp.size, config.train.precision == "fp8") as ledger:
        faked(model).loss_rows = loss_rows(config, shape.tokens)
        recompute(model, mode)
        take = DeferredGradients(model).take if deferred else lambda: lambda: None
        levels = _levels(ledger, model)
        batch = blank(config, shape._replace(rows=2 * shape.rows))
        passes, places = [], _places(layers)
        for part in batch.chunk(2):
            levels.mark()
            loss = model(*part.arguments()) * 1.0
            levels.mark()
            loss.backward()
            del loss
            levels.mark()
            passes.append(_pass(levels.rises(), places))
            take()()
    first, later = passes
    passing: dict[Place, float] = {}
    if not deferred:  # there it is the weight gradients that end what the backward leaves
        passing = {place: later.forward[place].net + later.backward[place].net for place in places[1:-1]}
    if passing and layers.n_encoder:
        ends = {layers.n_encoder, layers.traced[-1]}
        others = {layers.kinds[l]: passing[l] for l in layers.traced if l not in ends}
        for end in ends:
            own, passing[end] = passing[end], others.get(layers.kinds[end], passing[end])
            passing["memory"] += own - passing[end]
    gone = sum(passing.values())
    for of in passes:  # as if the head ended nothing but its own
        of.forward["head"] = of.forward["head"]._replace(net=of.forward["head"].net + gone)
    return Trace(layers, first, later, passing)


def blank(config: Config, shape: Shape) -> Batch:
    """Rows of a shape, in which all tokens are 0."""
    batch = batch_of(config, tuple(torch.zeros(2, shape.rows, shape.target + 1, dtype=torch.int64)), 0)
    if not config.model.reads_source:
        return batch
    source = torch.zeros(shape.rows, shape.source, dtype=torch.int64)
    return replace(batch, source=source, padding=config.model.padding)


def between(few: Trace, many: Trace, share: float) -> Trace:
    """What lies at that share of the way from one trace to one of more rows. Bytes and work grow evenly with rows, but
    for peaks, which are at most this high: of several moments that grow evenly, one may take over from another."""

    def mean(a: Pass, b: Pass) -> Pass:
        return Pass(_mean(a.forward, b.forward, share), _mean(a.backward, b.backward, share))

    passing = {l: x + share * (many.passing[l] - x) for l, x in few.passing.items()}
    return Trace(few.layers, mean(few.first, many.first), mean(few.later, many.later), passing)


def _mean(a: dict[Place, Rise], b: dict[Place, Rise], share: float) -> dict[Place, Rise]:
    return {place: Rise(*(x + share * (y - x) for x, y in zip(a[place], b[place], strict=True))) for place in a}


def update_cost(config: Config, layers: range) -> Update:
    """Of these layers with both ends."""
    model = part_of(config, layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with FakeTensorMode(), Ledger() as ledger:
        faked(model)
        before = ledger.now
        engine = ImaginedEngine(config, model)
        state = sum(t.numel() * t.element_size() for of in engine.optimizer.state for t in of.values())
        kept = ledger.now - before - state
        saved = sum(t.numel() * t.element_size() for t in engine.shared.values())
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        levels = _Levels(ledger)
        levels.mark()
        engine.clip()
        levels.mark()
        engine.update(1e-3, torch.zeros((), dtype=torch.bool))
        levels.mark()
        clip, update = levels.rises()
    return Update(weights, state, kept, saved, clip.peak, update.peak, clip.moved + update.moved)


def part_of(config: Config, layers: range) -> Transformer:
    """Some layers and both ends of the model, of them what a tensor parallel rank of the config's holds."""
    tp = ImaginedTensorParallel(config.parallel.tp, config.parallel.sequence_parallel)
    model = design(config, tp, Part(layers, first=True, last=True))
    if config.train.precision == "fp64":
        model.double()
    model.cross_entropy.sparse_k = config.train.sparse_softmax_k
    model.cross_entropy.smoothing = config.train.label_smoothing
    if config.train.precision == "fp8":
        refuse_missing_float8("fp8", torch.device("cpu"))
        multiply_in_float8(model, emulate=False)
    model.precision = config.train.precision
    return model


class _Levels:
    """What there was at each mark."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.seen = ledger, list[Rise]()

    def mark(self) -> None:
        of = self.ledger
        self.seen.append(Rise(of.now, of.read_peak(), of.flops, of.slow_flops, of.moved, of.kernels, of.sent))

    def rises(self) -> list[Rise]:
        """From mark to mark, which are forgotten."""
        seen, self.seen = self.seen, []
        return [
            Rise(*(b - a for a, b in zip(before, after, strict=True)))._replace(peak=after.peak - before.net)
            for before, after in pairwise(seen)
        ]


def _levels(ledger: Ledger, model: Transformer) -> _Levels:
    """Marks where the stream comes to a block and leaves the last of its stack, and where its gradient does."""
    levels, reads = _Levels(ledger), model._read

    def comes_back(x: Tensor) -> None:
        x.register_hook(lambda gradient: levels.mark())

    def watch(stack: Stack) -> None:
        through = stack.through
        # A decoder's first gradient waits until its encoder's backward has ended: there, that of the memory tells.
        waits = stack is model and model.encoder is not None

        def watched(run: Run, places: range, x: Tensor) -> Tensor:
            for place in places:
                levels.mark()
                if place or not waits:
                    comes_back(x)
                x = through(run, range(place, place + 1), x)
            levels.mark()
            comes_back(x)
            return x

        stack.through = watched

    def read(
        source: Tensor | None, stream: Tensor | None, keys: Tensor | None, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        memory, mask = reads(source, stream, keys, counted)
        comes_back(memory)
        return memory, mask

    for stack in model.stacks:
        watch(stack)
    model._read = read  # type: ignore[method-assign]
    return levels


def _places(layers: Layers) -> list[Place]:
    """In the order of the computation."""
    n, traced = layers.n_encoder, layers.traced
    memory: list[Place] = [*range(traced.start, n), "memory"] if n else []
    return ["embed", *memory, *range(n, traced.stop), "head"]


def _pass(rises: list[Rise], places: list[Place]) -> Pass:
    assert len(rises) == 2 * len(places), "the stream has taken another way than from block to block"
    forward, backward = rises[: len(places)], rises[len(places) :]
    return Pass(dict(zip(places, forward, strict=True)), dict(zip(reversed(places), backward, strict=True)))
