"""Training: the loop."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from math import isfinite, prod
from pathlib import Path

import numpy as np
import torch

from nlm.build import build_engine
from nlm.checkpoint import Checkpointer, checkpoints, refuse_changed_data, refuse_changed_model, resume, saved_step
from nlm.config import Config
from nlm.data.corpus import Corpus
from nlm.data.rank import RankData
from nlm.evaluate.loss import mean_loss
from nlm.mesh import Mesh
from nlm.metrics import Log
from nlm.optim import learning_rate
from nlm.parallel.engine import Engine
from nlm.parallel.launch import process_group
from nlm.runtime import denormals_flushed, keep_freed_memory, peak_memory_gib, pick_device
from nlm.statistics.record import LayerStatistics


def train(config: Config) -> Path:
    """Trains to train.steps, from the newest checkpoint of log.dir if it has one; returns log.dir.

    Errors: ValueError before anything is allocated, for data or a checkpoint that does not fit the config;
    FloatingPointError when a logged step finds a loss or gradient that is not finite.
    """
    device = pick_device()
    with process_group(config, device), denormals_flushed():
        return _train(config, Mesh(config.parallel, device))


def _train(config: Config, mesh: Mesh) -> Path:
    run = Path(config.log.dir)
    data = RankData(config, mesh)
    latest = checkpoints(run)[-1:]
    for checkpoint in latest:
        refuse_changed_model(checkpoint, config)
        refuse_changed_data(checkpoint, data.corpus, config)
        if (done := saved_step(checkpoint)) >= config.train.steps:
            if mesh.speaks:
                print(f"{run}: already trained, {done} steps; nothing to do")
            return run

    steps = config.train.steps
    keep_freed_memory()
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, mesh)
    start = resume(latest[0], engine, data.corpus) if latest else 0
    statistics = LayerStatistics(engine.pieces, config.model.n_layers) if config.statistics.enabled else None

    with (
        Log(run, config, start) if mesh.speaks else nullcontext() as log,
        Checkpointer(run, engine, data.corpus) as checkpointer,
    ):
        if log:
            log.say(_greeting(engine, mesh))
            if start:
                log.say(f"resuming after step {start}")
        clock = Clock(config.train.batch_tokens)
        for step in range(start + 1, steps + 1):
            evaluates, saves = due(step, steps, config.evaluate.every), due(step, steps, config.checkpoint.every)
            logs = due(step, steps, config.log.every) or step == 1 or evaluates or saves
            recording = statistics if logs else None

            engine.record(recording is not None)
            loss = engine.forward_backward(data.rows(step))
            grad_norm, grad_norms = engine.clip()
            if recording:
                recording.before_update()
            lr = learning_rate(config.optim, step, steps)
            engine.update(lr)

            clock.count()
            if not logs:
                if log:
                    log.advance(step)
                continue
            vectors = recording.vectors(engine.signals(), grad_norms) if recording else None
            engine.record(False)
            scalars = {"loss": engine.total(loss).item(), "grad_norm": grad_norm.item(), "lr": lr, **clock.read()}
            scalars["peak_memory_gib"] = peak_memory_gib(mesh.device)
            scalars |= epochs(data.corpus, step)
            if evaluates and (batches := data.validation_batches()) is not None:
                scalars["validation_loss"] = mean_loss(engine, batches)
            if log:
                log.write(step, scalars, vectors)
            require_finite(step, scalars, vectors)
            if saves and (problem := checkpointer.save(step)) and log:
                log.say(problem)
            clock.restart()
    return run


def _greeting(engine: Engine, mesh: Mesh) -> str:
    n_parameters = sum(prod(weight.shape) for weight in engine.pieces.weights.values())
    ranks = [f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1]
    layout = f"{mesh.device.type} x " + " x ".join(ranks) if ranks else f"{mesh.device}"
    return f"{n_parameters:,} parameters in {engine.config.model.n_layers} layers on {layout}"


def epochs(corpus: Corpus, step: int) -> dict[str, float]:
    """Passes over the corpus, or over each source of a mixture."""
    passes = corpus.epochs(step)
    return {"epoch": next(iter(passes.values()))} if len(passes) == 1 else {f"epoch/{k}": v for k, v in passes.items()}


def due(step: int, steps: int, every: int) -> bool:
    """Whether `step` is one of every `every` (0: none), or the last."""
    return step == steps or (every > 0 and step % every == 0)


class Clock:
    """Time a step since `restart`, pauses for validation and checkpoints left out."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.restart()

    def restart(self) -> None:
        self.began, self.steps = time.perf_counter(), 0

    def count(self) -> None:
        self.steps += 1

    def read(self) -> dict[str, float]:
        step_s = (time.perf_counter() - self.began) / self.steps
        return {"step_s": step_s, "tokens_s": self.batch_tokens / step_s}


def require_finite(step: int, scalars: Mapping[str, float], vectors: Mapping[str, np.ndarray] | None) -> None:
    """Errors: FloatingPointError, with the first layer that went bad where statistics know it."""
    if isfinite(scalars["loss"]) and isfinite(scalars["grad_norm"]):
        return
    bad = {name: np.flatnonzero(~np.isfinite(vector)) for name, vector in (vectors or {}).items()}
    first = min(((int(layers[0]), name) for name, layers in bad.items() if layers.size), default=None)
    where = "" if first is None else f"; the lowest layer that went bad is {first[0]} ({first[1]})"
    raise FloatingPointError(
        f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}{where}; "
        "lower optim.lr, lengthen optim.warmup_steps or choose another scheme; the last checkpoint is intact"
    )
