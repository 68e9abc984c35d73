"""`nlm remove-norms`: the training in which a model's norms lose their statistics, from checkpoint to checkpoint."""

import os
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path

import torch

from nlm.build import build_engine, design, parse_config
from nlm.checkpoint import (
    Checkpointer,
    checkpoint_config,
    checkpoints,
    refuse_changed_data,
    refuse_changed_model,
    resume,
    saved_step,
)
from nlm.config import Config, ConfigError, read_table
from nlm.data.rank import RankData
from nlm.data.shards import shard_facts
from nlm.data.source import prefixes
from nlm.evaluate.loss import mean_loss
from nlm.fold import readings
from nlm.guard import Guard
from nlm.mesh import Mesh
from nlm.metrics import Log
from nlm.optim import learning_rate
from nlm.parallel.engine import Engine
from nlm.plan.choose import settled
from nlm.runtime import denormals_flushed, keep_freed_memory, peak_memory_gib, pick_device
from nlm.train import Clock, due
from nlm.transition import GAPS, ORDER, Event, Removal, plan

FROZEN = {"layernorm": "frozen_layernorm", "rmsnorm": "frozen_rmsnorm"}
KEPT = {"microbatches", "recompute"}
"""Of the layout that a checkpoint was trained in."""
LENGTH = 2.5
"""Of the training, in that of the plan; 300 steps to 116 for GPT-2 small."""


def remove_norms(
    checkpoint: str | Path,
    out: str | Path,
    overrides: Iterable[str] = (),
    *,
    start: int = 20,
    gaps: Sequence[int] = GAPS,
    order: Sequence[str] = ORDER,
    steps: int | None = None,
    auxiliary: float = 0.0,
) -> Path:
    """Trains a checkpoint's model for `steps` more (2.5 times as many as the plan takes), on the data that come next,
    into the run `out` -> its checkpoint, whose norms are frozen ones.

    The learning rate begins at optim.lr and falls to half of it along a cosine; steps are left out only where something
    is not finite. `overrides` change that, and what else the config says. One process.

    Errors: ValueError before anything is allocated, for a model whose norms cannot be removed, and a config or plan
    that does not fit; FloatingPointError when it diverges.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    before = checkpoint_config(checkpoint)
    events = plan(before.model.n_layers, start, gaps, order)
    steps = round(LENGTH * events[-1].step) if steps is None else steps
    if not (checkpoint / "data.json").exists():
        raise ConfigError([f"{checkpoint}: expected a checkpoint of a run, such as RUN/checkpoints/step-00000100"])
    if steps < events[-1].step:
        raise ConfigError([f"--steps: expected at least the {events[-1].step} that the plan takes, got {steps}"])
    if checkpoints(out):
        raise ConfigError([f"--out: {out} has checkpoints already; remove them, or give another folder"])
    done = saved_step(checkpoint)
    config = _config(checkpoint, overrides, [f"log.dir={out}", f"train.steps={done + steps}"])
    mesh = Mesh(config.parallel, pick_device())
    data = RankData(config, mesh)
    refuse_changed_data(checkpoint, data.corpus, config)

    keep_freed_memory()
    with denormals_flushed():
        engine, guard = build_engine(settled(config, mesh.device), mesh), Guard(config.faults, mesh.device)
        resume(checkpoint, engine, data.corpus, guard)
        (model,) = engine.models
        if before.model.norm.fields.get("one_plus", False):
            with torch.no_grad():
                for reading in readings(model):
                    model.get_parameter(f"{reading.norm}.weight").add_(1)
        removal = Removal(model, end_of_text(config), auxiliary)
        with Checkpointer(out, engine, data.corpus, guard) as checkpointer, Log(out, config, done) as log:
            log.say(f"validation loss with its norms: {_validation(engine, data):.4f}")
            _train(config, engine, guard, data, removal, events, done, log)
            removal.end()
            log.say(f"validation loss without them: {_validation(engine, data):.4f}")
            checkpointer.save(config.train.steps)
    return checkpoints(out)[-1]


def _config(checkpoint: Path, overrides: Iterable[str], fixed: Sequence[str]) -> Config:
    """Of the training, in one process, and of the model that comes out. Errors: ConfigError for what cannot be done."""
    overrides = list(overrides)
    problems = [
        f"{override}: for this there is {flag}; remove the key"
        for override in overrides
        for key, flag in (("train.steps", "--steps"), ("log.dir", "--out"))
        if override.startswith(f"{key}=")
    ]
    path, done = checkpoint / "config.toml", saved_step(checkpoint)
    # Counted on from the checkpoint's steps, a warmup that is over has the schedule begin at its top.
    usual = ["optim.schedule=cosine", f"optim.warmup_steps={done}", "optim.final_lr_frac=0.5"]
    usual += ["faults.sigma=0", "statistics.enabled=false"]
    saved, table = read_table(path), read_table(path, [*usual, *overrides, *fixed])
    for limit in ("stop_after", "max_minutes"):
        table["train"].pop(limit, None)
    layout = table["parallel"]
    table["parallel"] = {key: layout[key] for key in layout if key in KEPT or layout[key] != saved["parallel"].get(key)}
    config = parse_config(table)
    refuse_changed_model(checkpoint, config)
    readings(design(config))
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        problems.append(f"remove-norms: expected one process, got WORLD_SIZE = {ranks}; start it without a launcher")
    for key in sorted(table["parallel"].keys() - KEPT):
        problems.append(f"parallel.{key}: norms are removed in one process, block by block as written; remove the key")
    norm = config.model.norm
    if norm.name not in FROZEN or norm.fields.get("eps_outside", False) or not norm.fields.get("gain", True):
        problems.append(
            "model.norm: expected layernorm, or rmsnorm with eps inside the root, and with a gain, for the average to "
            f"become part of; got {norm.model_dump()}"
        )
    if problems:
        raise ConfigError(problems)
    table["model"]["norm"] = {"name": FROZEN[norm.name]}
    return parse_config(table)


def _train(
    config: Config,
    engine: Engine,
    guard: Guard,
    data: RankData,
    removal: Removal,
    events: Sequence[Event],
    done: int,
    log: Log,
) -> None:
    last, clock = config.train.steps, Clock(config.train.batch_tokens)
    for step in range(done + 1, last + 1):
        for event in (event for event in events if event.step == step - done):
            removal.happen(event)
        loss = engine.forward_backward(data.rows(step))
        grad_norm, _ = engine.clip()
        lr = learning_rate(config.optim, step, last)
        engine.update(lr, guard.judge(step, step, loss, grad_norm))
        removal.follow()
        clock.count()
        evaluates = due(step, last, config.evaluate.every)
        if not (evaluates or due(step, last, config.log.every)):
            log.advance(step)
            continue
        scalars = {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr, **clock.read()}
        scalars["peak_memory_gib"] = peak_memory_gib(engine.mesh.device)
        if guard.judged() and guard.in_a_row:
            raise FloatingPointError(
                f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}; lower optim.lr, or leave "
                "more steps between the norms"
            )
        if evaluates and not isnan(validation_loss := _validation(engine, data)):
            scalars["validation_loss"] = validation_loss
        log.write(step, scalars, None, {})
        clock.restart()


def _validation(engine: Engine, data: RankData) -> float:
    """nan where the config has no data for it."""
    batches = data.validation_batches()
    return float("nan") if batches is None else mean_loss(engine, batches)


def end_of_text(config: Config) -> int | None:
    """The token after every text of the training data; None where that is not known, or not the same everywhere."""
    ends: set[int | None] = set()
    for source in config.data.sources:
        if source.path is not None:
            ends |= {shard_facts(prefix).get("eod") for prefix in prefixes(source.path)}
        elif source.tokenizer is not None:
            from nlm.data.tokenizer import load_tokenizer

            ends.add(load_tokenizer(source.tokenizer).eod)
    return ends.pop() if len(ends) == 1 else None
