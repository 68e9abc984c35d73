"""The Transformer: FeedForward, Block, Stack, Transformer, and `weights`, every parameter of it with its Weight."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nlm.activations import ACTIVATIONS, soft_cap
from nlm.anatomy import IGNORED, MATRICES, SLOTS, WRITES, Axis, Kind, Role, Site, Span, StackName, Weight
from nlm.cache import Cache
from nlm.config import ModelConfig
from nlm.kernels.rows import sum_over_rows
from nlm.norms import NormSite, precise
from nlm.parallel.tensor import Ranks, TensorParallel
from nlm.positions import Rotary, rotate, sinusoidal
from nlm.runtime import autocast
from nlm.schemes.base import Norm, Scheme, Slot, Slots
from nlm.schemes.module import MakeNorm, ResidualModule, SlotModule, flat
from nlm.scores import Heads, Score, document_mask, keys_seen, uniform_entropy
from nlm.signals import INSIDE, Signals, View, Watch, that_count
from nlm.weight_norms import MakeWeightNorm, WeightNorm


@dataclass(frozen=True)
class Design:
    """What a config chose by name, and this rank's part of each logical axis, ready to build with.

    `slots` are those that the norm layers ask for; where the scheme has something of its own, that counts.
    `weight_norms` are what the config has for roles, where the scheme has nothing. It is of one `stack`, of the context
    length `seq_len`; a decoder with an encoder also attends to `memory_len` positions.
    """

    config: ModelConfig
    scheme: Scheme
    norm: MakeNorm
    score: Callable[[int], Score]
    weight_norms: Mapping[Role, MakeWeightNorm]
    slots: Callable[[Site], Slots] | None
    spans: dict[Axis, Span]
    tp: TensorParallel
    stack: StackName
    seq_len: int
    memory_len: int | None = None

    def site(self, layer: int, kind: Kind | Literal["stack"], place: int = 0) -> Site:
        c = self.config
        n_layers, other = c.n_layers, c.n_encoder_layers or 0
        if other and self.stack == "encoder":
            n_layers, other = other, n_layers
        return Site(layer, n_layers, kind, c.dim, place, c.activation, self.stack, other)

    def residual(self, site: Site, first: ResidualModule | None = None) -> ResidualModule:
        drop = self.config.stochastic_depth
        share = drop * site.layer / max(1, site.n_layers - 1) if drop else None
        return ResidualModule(self.scheme.residual(site), site, self.spans, self.norm, first, share)

    def slot(self, site: Site, name: str) -> nn.Module:
        """What the scheme puts into a slot; a slot left empty passes its tensor on."""
        slots = {**(self.slots(site) if self.slots else {}), **self.scheme.slots(site)}
        match slots.get(name):
            case Norm():
                return self.norm(flat(SLOTS[name], self.spans), site)
            case Slot() as slot:
                return SlotModule(slot, site, self.spans, SLOTS[name], self.norm)
        return nn.Identity()

    def slot_dict(self, site: Site, *names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.slot(site, name) for name in names})

    def linear(self, role: Role, inputs: Span, outputs: Span, bias: bool, site: Site | None = None) -> "Linear":
        linear = (Writer if role in WRITES else Linear)(role, inputs, outputs, bias, self.tp)
        linear.weight_norm = self.normalizer(role, outputs, inputs, site)
        return linear

    def normalizer(self, role: Role, outputs: Span, inputs: Span, site: Site | None) -> WeightNorm | None:
        c = self.config
        weight = Weight(role, (outputs.full, inputs.full), site, c.n_layers, c.n_encoder_layers or 0)
        make = self.scheme.weight_norm(weight) or self.weight_norms.get(role)
        return make and make(outputs, inputs, self.tp)


class Linear(nn.Linear):
    """[… in] -> [… out]; weight [out, in]. Filled by `init`, never by itself."""

    def __init__(self, role: Role, inputs: Span, outputs: Span, bias: bool, tp: TensorParallel) -> None:
        self.roles = {"weight": role, "bias": Role.BIAS}
        self.spans = {"weight": (outputs, inputs), "bias": (outputs,)}
        self.initial = {"bias": 0.0}
        super().__init__(len(inputs), len(outputs), bias)
        self.tp = tp
        self.weight_norm: nn.Module | None = None
        self.multiply: Callable[..., Tensor] = F.linear

    def reset_parameters(self) -> None:
        pass

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight if self.weight_norm is None else self.weight_norm(self.weight).to(x.dtype)
        return self.multiply(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class Writer(Linear):
    """A Linear whose inputs are divided: its product is a partial sum, which it completes before it adds the bias."""

    inside = False

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return super().forward(x)
        y = self.tp.leave(self.product(x, None))
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """indices [B S] -> the stream [B S D]. Of a divided table [V D], each rank looks up the rows it has."""

    roles = {"weight": Role.EMBED}

    def __init__(self, indices: Span, dim: Span, tp: TensorParallel) -> None:
        super().__init__()
        self.indices, self.tp = indices, tp
        self.spans = {"weight": (indices, dim)}
        self.weight = nn.Parameter(torch.empty(len(indices), len(dim)))
        self.weight_norm: nn.Module | None = None

    def table(self) -> Tensor:
        """[V/n D]."""
        return self.weight if self.weight_norm is None else self.weight_norm(self.weight)

    def forward(self, indices: Tensor) -> Tensor:
        if self.indices.is_whole:
            return F.embedding(indices, self.table())
        others = (indices < self.indices.start) | (indices >= self.indices.stop)
        rows = F.embedding((indices - self.indices.start).masked_fill(others, 0), self.table())
        return self.tp.leave(rows.masked_fill(others[..., None], 0.0))


class Sinusoidal(nn.Module):
    """indices [S] -> [S D]: the fixed table of sinusoidal positions."""

    def __init__(self, seq_len: int, dim: int) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.empty(seq_len, dim), persistent=False)
        self.initial = {"table": partial(sinusoidal, seq_len, dim)}

    def forward(self, indices: Tensor) -> Tensor:
        return self.table[indices]


class Attention(nn.Module):
    """[B S D] -> [B S D], to the stream itself or, where the site is "cross", to an encoder's memory; the heads are
    divided among the tensor parallel ranks."""

    inside = True

    def __init__(self, config: ModelConfig, design: Design, site: Site) -> None:
        super().__init__()
        self.site, self.tp = site, design.tp
        self.head_dim, self.interleaved = config.head_dim, config.position == "rope_interleaved"
        dim = design.spans["dim"]
        heads, kv_heads = (design.spans[axis] * config.head_dim for axis in ("head", "kv_head"))
        self.wq = design.linear(Role.Q, dim, heads, config.bias, site)
        self.wk = design.linear(Role.K, dim, kv_heads, config.bias, site)
        self.wv = design.linear(Role.V, dim, kv_heads, config.bias, site)
        self.wo = design.linear(Role.O, heads, dim, config.bias, site)
        n_keys = design.memory_len if site.kind == "cross" else design.seq_len
        assert n_keys is not None
        self.score = design.score(n_keys)
        self.slots = design.slot_dict(site, "q", "k", "heads")

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None = None,
        watch: Watch | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Keys and values are of `memory` [B T D], unless None. It shows signals.INSIDE."""
        x = self.tp.enter(x)
        read = x if memory is None else memory

        def keys_and_values() -> tuple[Tensor, ...]:
            return tuple(w(read).unflatten(-1, (-1, self.head_dim)) for w in (self.wk, self.wv))  # [B T Hkv Dh]

        q, keep = self.wq(x).unflatten(-1, (-1, self.head_dim)), None  # [B S H Dh]
        if cache is not None and memory is not None:
            k, v = cache.once(self.site, keys_and_values)
        else:
            k, v = keys_and_values()
            keep = None if cache is None else partial(cache.keep, self.site)

        def place(slot: nn.Module, x: Tensor) -> Tensor:
            return slot(x if rotary is None else rotate(x, *rotary, self.interleaved))  # type: ignore[no-any-return]

        out = self.score(q, k, v, mask, partial(place, self.slots["q"]), partial(place, self.slots["k"]), watch, keep)
        return self.wo(self.slots["heads"](out.flatten(2)))  # [B S H Dh] -> [B S H·Dh]


class FeedForward(nn.Module):
    """[B S D] -> [B S D]: down(act(up x)), or down(act(gate x) · up x) for the gated activations.

    The hidden units are divided among the tensor parallel ranks. `observe`, unless None, sees what they give [B S F].
    """

    inside = True

    def __init__(self, config: ModelConfig, design: Design, site: Site) -> None:
        super().__init__()
        self.site, self.tp = site, design.tp
        self.activation = ACTIVATIONS[config.activation]
        dim, hidden = design.spans["dim"], design.spans["hidden"]
        self.w_gate = design.linear(Role.GATE, dim, hidden, config.bias, site) if config.gated else None
        self.w_up = design.linear(Role.UP, dim, hidden, config.bias, site)
        self.w_down = design.linear(Role.DOWN, hidden, dim, config.bias, site)
        self.slots = design.slot_dict(site, *(["gate"] if config.gated else []), "up", "hidden")
        self.observe: nn.Module | None = None

    def forward(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        """It shows the activity Σ |a| of its hidden units [F/n], and nothing for signals.INSIDE."""
        x = self.tp.enter(x)
        hidden = self.slots["up"](self.w_up(x))
        if self.w_gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(self.slots["gate"](self.w_gate(x))) * hidden
        hidden = self.slots["hidden"](hidden)
        if self.observe is not None:
            self.observe(hidden)
        if watch is not None:
            activity = that_count(precise(hidden.detach()), watch.view.positions).abs().sum((0, 1))
            watch.seen.extend((activity, activity.new_zeros(len(INSIDE))))
        return self.w_down(hidden)


class Memory(NamedTuple):
    """What an encoder has made of the source, `x` [B T D], of which all tensor parallel ranks have all positions.

    `mask` [B 1 1 T] says which of them are no padding; positions count where `counted` [B T] is true.
    """

    x: Tensor
    mask: Tensor
    counted: Tensor | None
    view: View | None = None


class Block(nn.Module):
    """One layer: its sublayers, as a rule attention and FFN, with cross-attention between them in a decoder that has an
    encoder, each joined to the stream by the scheme's equation.

    A sublayer bears the name of its kind, a second one of the same kind `ffn_2`.
    """

    def __init__(self, config: ModelConfig, design: Design, layer: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.n_units = len(design.spans["hidden"])
        first: ResidualModule | None = None
        for place, kind in enumerate(design.scheme.sublayers(layer, design.memory_len is not None)):
            site = design.site(layer, kind, place)
            residual = design.residual(site, first)
            name = f"{kind}_2" if kind in self.names else kind
            self.names.append(name)
            self.add_module(f"{name}_residual", residual)
            self.add_module(name, (FeedForward if kind == "ffn" else Attention)(config, design, site))
            first = first or residual

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        keys: Tensor | None,
        view: View | None,
        memory: Memory | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B S D] -> x [B S D] and, with a view, what sublayers show."""
        watch = None if view is None else Watch(view, [])
        for name in self.names:
            sublayer = getattr(self, name)
            branch = partial(sublayer, watch=watch)
            if isinstance(sublayer, Attention):
                branch = partial(branch, rotary=rotary, mask=mask, cache=cache)
                if sublayer.site.kind == "cross":
                    assert memory is not None
                    of_memory = None if watch is None or memory.view is None else Watch(memory.view, watch.seen)
                    branch = partial(branch, watch=of_memory, rotary=None, mask=memory.mask, memory=memory.x)
                if watch is not None:
                    watch.seen.append(torch.zeros(self.n_units, device=x.device))
            x = getattr(self, f"{name}_residual")(x, branch, watch, keys)
        return x, None if watch is None else torch.cat(watch.seen).view(len(self.names), -1)


class CrossEntropy(nn.Module):
    """logits [B S V/n], targets [B S] -> []: -ln softmax(logits)[target], in float32, summed over all targets
    that are not IGNORED. In training, with a `sparse_k`, the softmax is over so many of the largest logits only, and
    the share `smoothing` of each target is spread over the vocabulary."""

    def __init__(self, vocab: Span, tp: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.tp = vocab, tp
        self.sparse_k: int | None = None
        self.smoothing = 0.0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows, targets = precise.flatten(0, 1), targets.flatten()
        if self.training and self.sparse_k is not None:
            return self.tp.sparse_cross_entropy(rows, targets, self.vocab, self.sparse_k)
        return self.tp.cross_entropy(rows, targets, self.vocab, self.smoothing if self.training else 0.0)


Run = Callable[[range, Tensor], Tensor]
"""Through the blocks at these places of a part of the stack: the stream [B S D] before them -> after them."""


@dataclass(frozen=True)
class Part:
    """The consecutive layers that one module holds, and whether it holds the ends. Of an encoder–decoder all layers are
    counted, the encoder's first."""

    layers: range
    first: bool
    last: bool

    def of_stacks(self, n: int) -> tuple["Part", "Part"]:
        """What of it is in the encoder, which has n layers, and what in the decoder, each in numbers of its own."""
        start, stop = self.layers.start, self.layers.stop
        ends = start < n <= stop or (self.first and self.last)
        encoder = Part(range(min(start, n), min(stop, n)), self.first, ends)
        return encoder, Part(range(max(start - n, 0), max(stop - n, 0)), self.first, self.last)


class Stack(nn.Module):
    """Layers through which one stream goes, or some of them, and what stands at the ends: positions and stem, and the
    final slot. `before` are modules that come first in the order of the parameters."""

    def __init__(self, design: Design, part: Part, **before: nn.Module | None) -> None:
        super().__init__()
        for name, module in before.items():
            setattr(self, name, module)
        config, ends = design.config, design.site(0, "stack")
        self.design = design
        self.position: Embedding | Sinusoidal | None = None
        self.rotary: Rotary | None = None
        match config.position:
            case "learned" if part.first:
                self.position = Embedding(Span.whole(design.seq_len), design.spans["dim"], design.tp)
            case "sinusoidal" if part.first:
                self.position = Sinusoidal(design.seq_len, config.dim)
            case "rope" | "rope_interleaved" as kind:
                self.rotary = Rotary(config.head_dim, design.seq_len, config.rope_base, kind == "rope_interleaved")
        self.stem = design.slot(ends, "embed") if part.first else None
        # Keyed by the layer's number in the whole stack, so that a part of it keeps its names.
        self.blocks = nn.ModuleDict({str(l): Block(config, design, l) for l in part.layers})
        self.final = design.slot(ends, "final") if part.last else None
        self.first_number = ends.number
        """Of layer 0 among all of the model."""
        self.n_sublayers = len(design.scheme.sublayers(0, ends.reads_memory))
        self.through: Callable[[Run, range, Tensor], Tensor] = lambda run, places, x: run(places, x)
        """How the stream goes through runs of blocks."""
        self.recomputing = False
        # An attribute, not an argument: what wraps a model copies its arguments, lists among them.
        self.signals: Signals | None = None

    def run(
        self,
        x: Tensor,
        seq_len: int,
        mask: Tensor | None,
        keys: Tensor | None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """The stream [B S/n D] of so many positions, before the blocks -> after them; `signals`, unless None, collects
        what they show, of the positions that are `counted` [B S]."""
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary(seq_len) if cache is None else self.rotary.at(cache.positions)
        signals, view = self.signals, None
        if signals is not None:
            part = self.design.tp.positions(seq_len)
            seen = partial(keys_seen, seq_len=seq_len, n=signals.queries, device=x.device)
            here = None if counted is None else counted[:, part.start : part.stop]
            view = View(seen(mask), here, counted, counted)
            uniform = {"attn": uniform_entropy(view, len(x), seq_len)}
            if memory is not None:
                of_memory = view._replace(visible=seen(memory.mask), keys=memory.counted)
                memory = memory._replace(view=of_memory)
                uniform["cross"] = uniform_entropy(of_memory, len(x), seq_len)
            signals.begin(x, len(self.blocks), self.n_sublayers, view, uniform)
        blocks = [(self.first_number + int(layer), block) for layer, block in self.blocks.items()]

        def run(places: range, x: Tensor) -> Tensor:
            for place in places:
                layer, block = blocks[place]
                x, shown = block(x, rotary, mask, keys, view, memory, cache)
                if signals is not None and shown is not None and not self.recomputing:
                    signals.add(place, shown, x, layer)
            return x

        return self.through(run, range(len(blocks)), x)


class Transformer(Stack):
    """A language model, tokens [B S] -> logits [B S V], or a part of its layers: a decoder, of which each position sees
    those before it; an encoder, of which it sees all; or a decoder with an `encoder`, target [B S], source [B T] ->
    logits of the target.

    Its parameters are unfilled until `init`; tensor parallel ranks hold parts of them. `seq_len` is the context length
    of training: learned and tabulated positions end there, those of a source at `source_len`.
    """

    embed: Embedding | None
    token: nn.Module | None
    encoder: Stack | None

    def __init__(
        self,
        config: ModelConfig,
        seq_len: int,
        scheme: Scheme,
        norm: Callable[[NormSite], nn.Module],
        score: Callable[[Heads], Score],
        weight_norms: Mapping[Role, MakeWeightNorm] | None = None,
        slots: Callable[[Site], Slots] | None = None,
        tp: TensorParallel | None = None,
        part: Part | None = None,
        data: tuple[Ranks, ...] = (),
        source_len: int | None = None,
    ) -> None:
        part = part or Part(range(config.n_all_layers), first=True, last=True)
        tp = tp or TensorParallel()
        sizes: dict[Axis, int] = {
            "dim": config.dim,
            "head": config.n_heads,
            "kv_head": config.n_kv_heads,
            "head_dim": config.head_dim,
            "hidden": config.ffn_dim,
            "vocab": config.vocab_size,
        }
        spans = {axis: tp.span(axis, size) for axis, size in sizes.items()}
        heads = Heads(spans["head"], spans["kv_head"], config.head_dim, seq_len, config.norm_eps, tp)

        def norm_at(width: Span, site: Site) -> nn.Module:
            return norm(NormSite(width, tp, config.norm_eps, config.bias, site, data))

        def score_of(n_keys: int) -> Score:
            return score(replace(heads, seq_len=n_keys))

        stack: StackName = "encoder" if config.is_encoder else "decoder"
        design = Design(config, scheme, norm_at, score_of, weight_norms or {}, slots, spans, tp, stack, seq_len)
        encoder = None
        if config.n_encoder_layers:
            source_len = source_len or seq_len
            of_encoder, of_decoder = part.of_stacks(config.n_encoder_layers)
            encoder = Stack(replace(design, stack="encoder", seq_len=source_len), of_encoder)
            design = replace(design, memory_len=source_len)
        # A tied table stands at both ends.
        embeds = part.first or (part.last and config.tied)
        embed = Embedding(spans["vocab"], spans["dim"], tp) if embeds else None
        if embed is not None:
            embed.weight_norm = design.normalizer(Role.EMBED, spans["vocab"], spans["dim"], None)
        ends = design.site(0, "stack")
        token = design.slot(ends, "token") if part.first else None
        super().__init__(design, part if encoder is None else of_decoder, embed=embed, token=token, encoder=encoder)
        self.config, self.scheme, self.tp, self.part = config, scheme, tp, part
        self.n_layers, self.n_encoder_layers = config.n_layers, config.n_encoder_layers or 0
        has_head = part.last and not config.tied
        self.head = design.linear(Role.HEAD, spans["dim"], spans["vocab"], config.head_bias) if has_head else None
        self.logits = design.slot(ends, "logits") if part.last else None
        if self.logits is not None:
            self.logits.inside = True  # type: ignore[assignment]
        self.cross_entropy = CrossEntropy(spans["vocab"], tp)
        self.loss_rows: int | None = None
        """Of how many positions there are logits at a time, for their loss; None: of all."""
        self.precision = "fp32"

    @property
    def stacks(self) -> list[Stack]:
        """In the order of the computation."""
        return [self] if self.encoder is None else [self.encoder, self]

    @property
    def layers(self) -> dict[int, nn.Module]:
        """All blocks that are here, in the order of the computation, by their numbers among all of the model."""
        return {
            stack.first_number + int(layer): block for stack in self.stacks for layer, block in stack.blocks.items()
        }

    def weight_norm_of(self, weight: Weight) -> WeightNorm | None:
        """What the forward makes of a matrix, whichever part of the stack has it; a description, without memory."""
        if weight.role not in MATRICES:
            return None
        outputs, inputs = (Span.whole(size) for size in weight.shape)
        with torch.device("meta"):
            return self.design.normalizer(weight.role, outputs, inputs, weight.site)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        keys: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """tokens [B S] -> logits [B S V/n] or, with targets [B S], their summed cross-entropy [].

        `source` [B T] is what an encoder reads, filled up with `config.padding`, which nothing attends to.
        With `segments`, the document of each position [B S], none attends to another document. With `keys` [B], random
        numbers of the samples, samples skip sublayers (stochastic depth).
        A part without the first layers takes the stream [B S D] instead, one without the last gives the stream; that of
        an encoder–decoder [B S+T D] is the target's and, after it, the source's.
        With a `cache`, tokens are those that come after what it has, the source is given with the first, and logits
        [B 1 V] are those of each row's last.

        Errors: ValueError for an encoder–decoder without a source, and for another model with one.
        """
        reads = self.encoder is not None and (cache is None or not cache.width)
        if (source is not None) != reads:
            raise ValueError(
                "expected a source beside the target: model(target, source)"
                if reads
                else "expected no source: it has been read, or model.architecture is not 'encoder_decoder'"
            )
        with autocast(self.precision, x.device):
            return self._forward(x, source, targets, segments, keys, cache)

    def _forward(
        self,
        x: Tensor,
        source: Tensor | None,
        targets: Tensor | None,
        segments: Tensor | None,
        keys: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        mask = None if cache is None else cache.enter(x.shape[1], x.device)
        source_stream = None
        if self.part.first:
            seq_len, x = x.shape[1], self._embedded(self, x, None if cache is None else cache.positions)
        else:
            if source is not None:
                n_source = len(self.tp.positions(source.shape[1]))
                # Contiguous, as in the first part, so that all parts share their blocks' graphs.
                x, source_stream = (y.contiguous() for y in x.split([x.shape[1] - n_source, n_source], 1))
            seq_len = x.shape[1] * (self.tp.size if self.tp.sequence else 1)
        memory = counted = None
        if self.encoder is not None:
            counted_source = None
            if targets is not None and source is not None:
                counted = targets != IGNORED
                counted_source = (source != self.config.padding) & counted.any(1, keepdim=True)
            read = partial(self._read, source, source_stream, keys, counted_source)
            source_stream, unmasked = read() if cache is None else cache.once("memory", read)
            if self.blocks:
                memory = Memory(self.tp.enter(source_stream), unmasked, counted_source)
        if segments is None and self.config.is_encoder:
            segments = torch.zeros(1, seq_len, dtype=torch.int64, device=x.device)
        if segments is not None:
            mask = document_mask(segments, causal=not self.config.is_encoder)
        x = self.run(x, seq_len, mask, keys, memory, cache, counted)
        if not self.part.last:
            return x if source_stream is None else torch.cat([x, source_stream], 1)
        assert self.final is not None
        if cache is not None:
            x = x[torch.arange(len(x), device=x.device), cache.last][:, None]  # [B S D] -> [B 1 D]
        x = self.tp.enter(self.final(x))
        if targets is None:
            return self._logits(x)
        reads = [module for module in (self.head or self.embed, self.logits) if module is not None]
        parameters = [parameter for module in reads for parameter in module.parameters()]
        return sum_over_rows(self._loss, x, targets, parameters, self.loss_rows or targets.numel())

    def _read(
        self, source: Tensor | None, stream: Tensor | None, keys: Tensor | None, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A source [B T], and its stream where the first layers are elsewhere -> its stream [B T D] after the encoder's
        layers that are here, and which of its positions are no padding [B 1 1 T]."""
        assert self.encoder is not None and source is not None
        if stream is None:
            stream = self._embedded(self.encoder, source, None)
        real = source != self.config.padding
        real = real | ~real.any(1, keepdim=True)  # of a row that is all padding, so that no softmax is over nothing
        unmasked = real[:, None, None]
        stream = self.encoder.run(stream, source.shape[1], unmasked, keys, counted=counted)
        return stream if self.encoder.final is None else self.encoder.final(stream), unmasked

    def _embedded(self, stack: Stack, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """[B S] -> [B S D], the stream of a stack, by default at the positions from 0 on."""
        assert self.embed is not None and self.token is not None and stack.stem is not None
        x = self.token(self.embed(tokens))
        if stack.position is not None:
            if positions is None:
                here = self.tp.positions(tokens.shape[1])
                positions = torch.arange(here.start, here.stop, device=tokens.device)
            x = x + stack.position(positions).to(x.dtype)
        return stack.stem(x)  # type: ignore[no-any-return]

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """What the head reads [B S D], targets [B S] -> []."""
        return self.cross_entropy(self._logits(x), targets)  # type: ignore[no-any-return]

    def _logits(self, x: Tensor) -> Tensor:
        """What the head reads [B S D] -> [B S V/n]."""
        assert self.logits is not None
        if self.head is None:
            assert self.embed is not None
            logits = self.logits(F.linear(x, self.embed.table()))
        else:
            logits = self.logits(self.head(x))
        cap = self.config.logits_cap
        return logits if cap is None else soft_cap(logits, cap)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Held:
    """What a rank holds of a parameter: `tensor`, a plain tensor that shares the parameter's memory.

    `spans` says which part of the whole it is, dim by dim; `divided`, whether tensor parallelism cuts it. One that
    is `inside` a sublayer, where the tensor parallel ranks compute different things, has on each of them a
    gradient of its own, even where all hold the whole of it.
    """

    name: str
    parameter: nn.Parameter
    tensor: Tensor
    weight: Weight
    spans: tuple[Span, ...]
    divided: bool
    inside: bool

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the part that the rank holds lies in the whole parameter."""
        return tuple(slice(span.start, span.stop) for span in self.spans)

    def is_partial(self, tp: TensorParallel) -> bool:
        """Whether its gradient is the sum of what the tensor parallel ranks have."""
        return tp.size > 1 and not self.divided and (self.inside or tp.sequence)

    def part_of(self, whole: Tensor) -> Tensor:
        """The part that the rank holds of a whole parameter, a view."""
        return whole[self.slices]


def held(
    module: nn.Module,
    prefix: str = "",
    site: Site | None = None,
    inside: bool = False,
    n_layers: tuple[int, int] = (0, 0),
) -> Iterator[Held]:
    """Every parameter exactly once, under its canonical name."""
    site, inside = getattr(module, "site", site), getattr(module, "inside", inside)
    site = None if site and site.kind == "stack" else site
    if isinstance(module, Transformer):
        n_layers = module.n_layers, module.n_encoder_layers
    for name, parameter in module.named_parameters(recurse=False):
        roles: Mapping[str, Role] = module.roles  # type: ignore[assignment]
        spans: tuple[Span, ...] = module.spans[name]  # type: ignore[index, assignment]
        weight = Weight(roles[name], tuple(span.full for span in spans), site, *n_layers)
        divided = not all(span.is_whole for span in spans)
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            spans = (_shard(tensor, spans[0]), *spans[1:])
            tensor = tensor.to_local()
        yield Held(prefix + name, parameter, tensor, weight, spans, divided, inside)
    for name, child in module.named_children():
        yield from held(child, f"{prefix}{name}.", site, inside, n_layers)


def _shard(parameter: DTensor, rows: Span) -> Span:
    """This rank's rows of a parameter that FSDP2 divides, as it does, into chunks of equal length but for the end."""
    mesh = parameter.device_mesh
    chunk = -(-len(rows) // mesh.size(-1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, len(rows))
    return rows.inner(start, min(start + chunk, len(rows)))


def weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Weight]]:
    """Every parameter exactly once, with its canonical name and what the rules need to know of it."""
    return ((h.name, h.parameter, h.weight) for h in held(module))
