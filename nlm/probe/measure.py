"""Forward, backward and the first step of a model at initialization, layer by layer and over depth.

Everything is measured in float64 on a few tokens. A large model is narrowed first: what its scheme does with depth
shows at any width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm.anatomy import MATRICES
from nlm.batch import Batch
from nlm.build import build_model
from nlm.config import Config, ModelConfig
from nlm.data.corpus import Corpus
from nlm.data.rank import batch_of, tensors
from nlm.model import Transformer, weights
from nlm.signals import Signals

Vector = NDArray[np.float64]

ROWS, ROW_TOKENS = 2, 64
LEAST_DEPTH, LEAST_HEAD_DIM = 4, 8
STEP_LOSS = 1e-7
"""How much a step may lower the loss, in nats: small enough to be linear, large enough for float64 to see it."""


@dataclass(frozen=True)
class Signal:
    """What a model of L layers shows at initialization.

    `rms` [L 2 3] is of the stream in, the branch and the stream out of each sublayer; `grad_norm` [L] of all matrices
    of a layer, `stream_grad_norm` [L] of the stream out of it. `update[direction]` [L] is ‖Δh‖/‖h‖ of that stream for
    each unit of learning rate in the limit of small ones, when one step moves the matrices of all blocks along their
    gradient ("sgd") or its sign ("sign", Adam's first step). `off` [L] says which layers pass the stream on as it is.
    """

    loss: float
    rms: Vector
    grad_norm: Vector
    stream_grad_norm: Vector
    update: Mapping[str, Vector]
    off: NDArray[np.bool_]


@dataclass(frozen=True)
class Probe:
    """`signals` by depth, that of the config among them; `dim` is the width probed, `tokens` what went in."""

    config: Config
    dim: int
    tokens: str
    signals: Mapping[int, Signal]

    @property
    def own(self) -> Signal:
        return self.signals[self.config.model.n_layers]

    @property
    def totals(self) -> dict[str, Vector]:
        """Of the stream that leaves the last block, at each depth: its variance and its update by direction."""
        signals = self.signals.values()
        totals = {"stream_variance": [signal.rms[-1, 1, 2] ** 2 for signal in signals]}
        totals |= {direction: [signal.update[direction][-1] for signal in signals] for direction in DIRECTIONS}
        return {name: np.array(values) for name, values in totals.items()}

    @property
    def exponents(self) -> dict[str, float]:
        """The power of depth by which each total grows; NaN where one of them has no logarithm."""
        return {name: slope(list(self.signals), values) for name, values in self.totals.items()}

    @property
    def width_factor(self) -> float:
        """By how much a sign step moves the config's model further than the narrow one.

        Its entries do not shrink as those of a matrix do, so that the change grows as the width (Yang et al. 2022,
        arXiv:2203.03466, table 3).
        """
        return self.config.model.dim / self.dim


def probe(config: Config, width: int = 64) -> Probe:
    """The config's model, narrowed to `width` where it is wider, at its own depth and at fractions of it.

    Errors: ValueError for a width that holds no head, and for two stacks.
    """
    if config.model.reads_source:
        raise ValueError(
            "model.architecture: what is probed is one stream from the first layer to the last; probe the scheme with "
            "model.architecture = 'decoder' and 'encoder'"
        )
    if width < LEAST_HEAD_DIM:
        raise ValueError(f"--width: expected at least {LEAST_HEAD_DIM}, got {width}")
    model = narrowed(config.model, width)
    batch, tokens = first_rows(config)
    signals = {}
    for n_layers in depths(config.model.n_layers):
        at_depth = config.model_copy(update={"model": model.model_copy(update={"n_layers": n_layers})})
        signals[n_layers] = measure(build_model(at_depth).double(), batch)
    return Probe(config, model.dim, tokens, signals)


def depths(n_layers: int) -> list[int]:
    """A sixteenth of the layers and its doubles, ascending; beyond `n_layers` where three do not fit below."""
    chosen = [n for shift in (4, 3, 2, 1) if (n := n_layers >> shift) >= LEAST_DEPTH] + [n_layers]
    while len(chosen) < 3:
        chosen.append(2 * chosen[-1])
    return chosen


def narrowed(model: ModelConfig, width: int) -> ModelConfig:
    """The same model at most `width` wide, in its proportions: D : F : H·Dh, and query heads to a kv head.

    Heads become fewer where they would have less than LEAST_HEAD_DIM channels.
    """
    if model.dim <= width:
        return model
    scale, group = width / model.dim, model.n_heads // model.n_kv_heads
    inner = model.n_heads * model.head_dim * scale
    fits = [n for n in range(1, model.n_kv_heads + 1) if model.n_kv_heads % n == 0]
    kv_heads = max((n for n in fits if n * group * LEAST_HEAD_DIM <= inner), default=1)
    shape = {
        "dim": width,
        "n_heads": kv_heads * group,
        "n_kv_heads": kv_heads,
        "head_dim": max(2, round(inner / (kv_heads * group) / 2) * 2),  # rotary positions turn pairs
        "ffn_dim": max(1, round(model.ffn_dim * scale)),
    }
    return model.model_copy(update=shape)


def first_rows(config: Config) -> tuple[Batch, str]:
    """The beginning of the first rows of the training data, or random tokens where there is none -> also which."""
    seq_len = min(config.train.seq_len, ROW_TOKENS)
    two_rows = config.train.model_copy(update={"batch_tokens": ROWS * config.train.seq_len})
    try:
        rows = Corpus(config.model_copy(update={"train": two_rows})).batch(1)
    except ValueError as problem:
        generator = torch.Generator().manual_seed(config.train.seed)
        tokens = torch.randint(config.model.n_tokens, (ROWS, seq_len + 1), generator=generator)
        random = tokens, torch.zeros_like(tokens)
        return batch_of(config, random, 0, training=False), f"{ROWS} x {seq_len} random tokens ({problem})"
    read = [tensor[:, : seq_len + 1] for tensor in tensors(rows)]
    return batch_of(config, read, 0, training=False), f"{ROWS} x {seq_len} tokens of the training data"


def measure(model: Transformer, batch: Batch) -> Signal:
    """What a model in float64 shows on a batch; it is left as it came, but for gradients."""
    matrices = [
        (parameter, weight.site.layer, model.scheme.group(weight).lr)
        for _, parameter, weight in weights(model)
        if weight.site and weight.role in MATRICES
    ]
    model.signals = Signals(queries=1)
    loss, streams = run(model, batch)
    rms, model.signals = model.signals.rms(), None
    for _, out in streams:
        out.retain_grad()
    loss.backward()

    squares = torch.zeros(len(streams), dtype=torch.float64)
    for parameter, layer, _ in matrices:
        squares[layer] += gradient(parameter).square().sum()
    outs = [out.detach() for _, out in streams]
    update = {}
    for name, direction in DIRECTIONS.items():
        steps: list[tuple[Tensor, Tensor]] = [(p, lr * direction(gradient(p))) for p, _, lr in matrices]
        update[name] = moved(model, batch, steps, outs)
    return Signal(
        loss=float(loss.detach()),
        rms=rms.numpy(),
        grad_norm=squares.sqrt().numpy(),
        stream_grad_norm=np.array([float(gradient(out).norm()) for _, out in streams]),
        update=update,
        off=np.array([torch.equal(x, out) for x, out in streams]),
    )


DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sgd": lambda gradient: gradient, "sign": torch.sign}
"""What a step of learning rate 1 subtracts from a matrix, given its gradient."""


@torch.no_grad()
def moved(model: Transformer, batch: Batch, steps: list[tuple[Tensor, Tensor]], outs: list[Tensor]) -> Vector:
    """-> [L]: ‖Δh‖/‖h‖ of the streams `outs` for each unit of learning rate; 0 if the step is none at all, NaN if it is
    not finite.

    A finite difference, since not every operation of every scheme has a forward-mode derivative. Its length follows
    from the loss that it is to take away, whatever the size of the gradients.
    """
    descent = float(sum((step * gradient(parameter)).sum() for parameter, step in steps))
    if descent == 0 or not isfinite(descent):
        return np.full(len(outs), nan if descent else 0.0)
    lr = STEP_LOSS / descent
    for parameter, step in steps:
        parameter.sub_(step, alpha=lr)
    _, after = run(model, batch)
    for parameter, step in steps:
        parameter.add_(step, alpha=lr)
    return np.array([float((new - old).norm() / old.norm()) for (_, new), old in zip(after, outs, strict=True)]) / lr


def run(model: Transformer, batch: Batch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> mean cross-entropy [], and the stream [B S D] into and out of each block."""
    streams: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, outputs: streams.append((inputs[0], outputs[0])))
        for block in model.blocks.values()
    ]
    try:
        loss = model(*batch.arguments()[:4]) / batch.n_targets()
    finally:
        for hook in hooks:
            hook.remove()
    return loss, streams


def gradient(tensor: Tensor) -> Tensor:
    """0 for what had no part in the loss, such as a branch that was left out."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def slope(x: list[int], y: Vector) -> float:
    """The power of x by which y grows, fitted in logarithms; NaN where y has none."""
    if not (np.isfinite(y) & (y > 0)).all():
        return nan
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
