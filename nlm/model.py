"""The Transformer: FeedForward, Block, Transformer, and `weights`, which yields every parameter with its Weight."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import SLOTS, Axis, Role, Site, Weight
from nlm.attention import Heads, Rotary, Softmax, rotate, sinusoidal
from nlm.config import ModelConfig
from nlm.schemes.base import Norm, Scheme, Slot
from nlm.schemes.module import MakeNorm, ResidualModule, SlotModule

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}


@dataclass(frozen=True)
class Design:
    """What a config chose by name, ready to build with: the scheme, the norm layer, the attention score."""

    scheme: Scheme
    norm: MakeNorm
    score: Callable[[], Softmax]
    sizes: dict[Axis, int]

    def residual(self, site: Site) -> ResidualModule:
        module = ResidualModule(self.scheme.residual(site), self.sizes, ("dim",), self.norm)
        module.site = site
        return module

    def slot(self, site: Site, name: str) -> nn.Module:
        """What the scheme puts into a slot; a slot left empty passes its tensor on."""
        match self.scheme.slots(site).get(name):
            case Norm():
                return self.norm(prod(self.sizes[axis] for axis in SLOTS[name]))
            case Slot() as slot:
                return SlotModule(slot, self.sizes, SLOTS[name], self.norm)
        return nn.Identity()

    def slots(self, site: Site, *names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.slot(site, name) for name in names})


class Linear(nn.Linear):
    """[… in] -> [… out]; weight [out, in]. Filled by `init`, never by itself."""

    def __init__(self, role: Role, in_features: int, out_features: int, bias: bool) -> None:
        self.roles = {"weight": role, "bias": Role.BIAS}
        self.initial = {"bias": 0.0}
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Module):
    """indices [B S] -> [B S D]."""

    roles = {"weight": Role.EMBED}

    def __init__(self, n: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, dim))

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)


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
    """Causal self-attention, [B S D] -> [B S D]."""

    def __init__(self, config: ModelConfig, design: Design, site: Site) -> None:
        super().__init__()
        self.site = site
        self.head_dim, self.interleaved = config.head_dim, config.position == "rope_interleaved"
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(Role.Q, config.dim, heads, config.bias)
        self.wk = Linear(Role.K, config.dim, kv_heads, config.bias)
        self.wv = Linear(Role.V, config.dim, kv_heads, config.bias)
        self.wo = Linear(Role.O, heads, config.dim, config.bias)
        self.score = design.score()
        self.slots = design.slots(site, "q", "k", "heads")

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # [B S H Dh]
        q, k = self.score.normalize(q, k)
        if rotary is not None:
            q, k = rotate(q, *rotary, self.interleaved), rotate(k, *rotary, self.interleaved)
        out = self.score(self.slots["q"](q), self.slots["k"](k), v)
        return self.wo(self.slots["heads"](out.flatten(2)))  # [B S H Dh] -> [B S H·Dh]


class FeedForward(nn.Module):
    """[B S D] -> [B S D]: down(act(up x)), or down(act(gate x) · up x) for the gated activations."""

    def __init__(self, config: ModelConfig, design: Design, site: Site) -> None:
        super().__init__()
        self.site = site
        self.activation = ACTIVATIONS[config.activation]
        self.w_gate = Linear(Role.GATE, config.dim, config.ffn_dim, config.bias) if config.gated else None
        self.w_up = Linear(Role.UP, config.dim, config.ffn_dim, config.bias)
        self.w_down = Linear(Role.DOWN, config.ffn_dim, config.dim, config.bias)
        self.slots = design.slots(site, *(["gate"] if config.gated else []), "up", "hidden")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.slots["up"](self.w_up(x))
        if self.w_gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(self.slots["gate"](self.w_gate(x))) * hidden
        return self.w_down(self.slots["hidden"](hidden))


class Block(nn.Module):
    """One layer: an attention and an FFN sublayer, each joined to the stream by the scheme's equation."""

    def __init__(self, config: ModelConfig, design: Design, layer: int) -> None:
        super().__init__()
        attn = Site(layer, config.n_layers, "attn", config.dim)
        ffn = Site(layer, config.n_layers, "ffn", config.dim)
        self.attn_residual = design.residual(attn)
        self.attn = Attention(config, design, attn)
        self.ffn_residual = design.residual(ffn)
        self.ffn = FeedForward(config, design, ffn)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, record: bool) -> tuple[Tensor, Tensor | None]:
        """x [B S D] -> x [B S D] and, to record, RMS [2 3]: stream in, branch, stream out of each sublayer."""
        signals: list[Tensor] | None = [] if record else None
        x = self.attn_residual(x, partial(self.attn, rotary=rotary), signals)
        x = self.ffn_residual(x, self.ffn, signals)
        return x, None if signals is None else torch.stack(signals).view(2, 3)


class CrossEntropy(nn.Module):
    """logits [B S V], targets [B S] -> []: -ln softmax(logits)[target], in float32, summed over all targets."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


class Transformer(nn.Module):
    """A decoder-only language model, tokens [B S] -> logits [B S V].

    Its parameters are unfilled until `init`. `seq_len` is the context length of training: learned and tabulated
    positions end there.
    """

    def __init__(
        self,
        config: ModelConfig,
        seq_len: int,
        scheme: Scheme,
        norm: MakeNorm,
        score: Callable[[Heads], Softmax],
    ) -> None:
        super().__init__()
        self.config, self.scheme = config, scheme
        heads = Heads(config.n_heads, config.n_kv_heads, config.head_dim, seq_len, config.norm_eps)
        sizes: dict[Axis, int] = {
            "dim": config.dim,
            "head": config.n_heads,
            "kv_head": config.n_kv_heads,
            "head_dim": config.head_dim,
            "hidden": config.ffn_dim,
            "vocab": config.vocab_size,
        }
        design = Design(scheme, norm, partial(score, heads), sizes)
        ends = Site(0, config.n_layers, "stack", config.dim)

        self.embed = Embedding(config.vocab_size, config.dim)
        self.position: Embedding | Sinusoidal | None = None
        self.rotary: Rotary | None = None
        match config.position:
            case "learned":
                self.position = Embedding(seq_len, config.dim)
            case "sinusoidal":
                self.position = Sinusoidal(seq_len, config.dim)
            case "rope" | "rope_interleaved" as kind:
                self.rotary = Rotary(config.head_dim, seq_len, config.rope_base, kind == "rope_interleaved")
        self.stem = design.slot(ends, "embed")
        # Keyed by the layer's number in the whole model, so that a part of the stack keeps its names.
        self.blocks = nn.ModuleDict({str(l): Block(config, design, l) for l in range(config.n_layers)})
        self.final = design.slot(ends, "final")
        self.head = None if config.tied else Linear(Role.HEAD, config.dim, config.vocab_size, bias=False)
        self.logits = design.slot(ends, "logits")
        self.cross_entropy = CrossEntropy()
        self.call_block: Callable[..., tuple[Tensor, Tensor | None]] = lambda block, *args: block(*args)

    def forward(self, tokens: Tensor, signals: list[Tensor] | None = None) -> Tensor:
        """tokens [B S] -> logits [B S V]. `signals`, when given, receives the RMS [L 2 3] of `Block.forward`."""
        seq_len = tokens.shape[1]
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(torch.arange(seq_len, device=tokens.device)).to(x.dtype)
        rotary = None if self.rotary is None else self.rotary(seq_len)
        x = self.stem(x)
        recorded: list[Tensor] = []
        for block in self.blocks.values():
            x, signal = self.call_block(block, x, rotary, signals is not None)
            if signal is not None:
                recorded.append(signal)
        if signals is not None:
            signals.append(torch.stack(recorded))
        x = self.final(x)
        return self.logits(F.linear(x, self.embed.weight) if self.head is None else self.head(x))


def weights(
    module: nn.Module, prefix: str = "", site: Site | None = None
) -> Iterator[tuple[str, nn.Parameter, Weight]]:
    """Every parameter exactly once, with its canonical name and what the rules need to know of it."""
    site = getattr(module, "site", site)
    roles: Mapping[str, Role] = getattr(module, "roles", {})
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, Weight(roles[name], tuple(parameter.shape), site)
    for name, child in module.named_children():
        yield from weights(child, f"{prefix}{name}.", site)
