"""Training: the loop."""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nlm.batch import Batch
from nlm.build import build_engine
from nlm.checkpoint import (
    Checkpointer,
    checkpoints,
    refuse_changed_data,
    refuse_changed_model,
    refuse_other_model,
    resume,
    saved_step,
    start_from,
)
from nlm.config import Config
from nlm.data.corpus import Corpus
from nlm.data.pairs import PairCorpus
from nlm.data.rank import RankData
from nlm.evaluate.loss import accuracy, also_called, mean_loss
from nlm.faults import Faults, Rollback
from nlm.guard import Guard
from nlm.mesh import Mesh
from nlm.metrics import Log
from nlm.optim import learning_rate
from nlm.parallel.engine import Engine
from nlm.parallel.launch import process_group
from nlm.plan.choose import settled
from nlm.preflight import preflight
from nlm.runtime import collected_by_hand, denormals_flushed, keep_freed_memory, peak_memory_gib, pick_device
from nlm.sinks import refuse_missing_libraries
from nlm.statistics.diagnose import first_bad_layer
from nlm.statistics.health import resumed_monitor
from nlm.statistics.record import LayerStatistics
from nlm.statistics.store import read_layers
from nlm.stop import Stopped, StopRequest
from nlm.timing import StepTimes, Stragglers


def train(config: Config) -> Path:
    """Trains to train.steps, from the newest checkpoint of log.dir if it has one; returns log.dir.

    Errors: ValueError before anything is allocated, for data or a checkpoint that does not fit the config; Unfit for
    ranks, hosts or links with which train.preflight is not content; FloatingPointError when steps had to be left out
    again after the run went back, or it has no checkpoint to go back to; Stopped when a signal or train.max_minutes
    ended it early, its checkpoint written.
    """
    refuse_missing_libraries(config)
    if config.train.preflight:
        preflight(config)
    device = pick_device()
    with process_group(config, device) as step_ended, denormals_flushed():
        mesh = Mesh(config.parallel, device)
        with StopRequest(mesh, config.train.max_minutes) as stop:
            reason = _train(config, mesh, stop, step_ended)
        told = not mesh.speaks
    if reason is not None:
        raise Stopped(f"{reason}: stopped early, after a checkpoint; the same command goes on", told)
    return Path(config.log.dir)


@dataclass(frozen=True)
class Run:
    """What takes part in every step."""

    folder: Path
    config: Config
    mesh: Mesh
    data: RankData
    engine: Engine
    guard: Guard
    faults: Faults
    statistics: LayerStatistics | None
    translations: Callable[[], dict[str, float]] | None
    times: StepTimes
    stop: StopRequest
    step_ended: Callable[[], None]


def _train(config: Config, mesh: Mesh, stop: StopRequest, step_ended: Callable[[], None]) -> str | None:
    """-> why it ended early, if it did."""
    folder, data = Path(config.log.dir), RankData(config, mesh)
    if begins_with := config.train.start if not checkpoints(folder) else None:
        refuse_other_model(Path(begins_with), config)
    for checkpoint in checkpoints(folder)[-1:]:
        refuse_changed_model(checkpoint, config)
        refuse_changed_data(checkpoint, data.corpus, config)
        if (done := saved_step(checkpoint)) >= last_step(config):
            if mesh.speaks:
                print(f"{folder}: already trained, {done} steps; nothing to do")
            return None

    keep_freed_memory()
    torch.manual_seed(config.train.seed)
    engine, guard = build_engine(settled(config, mesh.device), mesh), Guard(config.faults, mesh.device)
    if begins_with is not None:
        start_from(Path(begins_with), engine)
    statistics = LayerStatistics(engine, config.statistics) if config.statistics.enabled else None
    faults = Faults(folder, writes=mesh.speaks)
    translations = None
    if config.evaluate.translations:
        from nlm.decode.translate import ValidationScores  # scored by an optional extra

        translations = ValidationScores(engine, data.validation_pairs)
    times = StepTimes(mesh)
    run = Run(folder, config, mesh, data, engine, guard, faults, statistics, translations, times, stop, step_ended)
    with Checkpointer(folder, engine, data.corpus, guard) as checkpointer, times:
        while True:
            latest = checkpoints(folder)[-1:]
            start = resume(latest[0], engine, data.corpus, guard) if latest else 0
            faults.start_after(start)
            with Log(folder, config, start) if mesh.speaks else nullcontext() as log, collected_by_hand():
                ended = _steps(run, start, checkpointer, log)
            if not isinstance(ended, Rollback):
                return ended


def _steps(run: Run, start: int, checkpointer: Checkpointer, log: Log | None) -> str | Rollback | None:
    """The steps after `start` -> why they ended early, if they did."""
    config, mesh, engine, guard, times = run.config, run.mesh, run.engine, run.guard, run.times
    steps, until = config.train.steps, last_step(config)
    if log:
        log.say(_greeting(engine, mesh))
        if isinstance(run.data.corpus, PairCorpus):
            log.say(run.data.corpus.said)
        if start:
            log.say(f"resuming after step {start}")
    monitor = resumed_monitor(run.folder, engine.whole, steps, start) if log and run.statistics else None
    stragglers = Stragglers(times.hosts, times.stages, start)
    times.restart()
    clock = Clock(config.train.batch_tokens)
    for step in range(start + 1, until + 1):
        evaluates, saves = due(step, steps, config.evaluate.every), due(step, until, config.checkpoint.every)
        logs = due(step, steps, config.log.every) or step == 1 or evaluates or saves
        logs |= run.statistics is not None and run.statistics.due(step)
        recording = run.statistics if logs else None

        times.begin()
        rows = run.data.rows(batch := run.faults.batch(step))
        times.has_data()
        if recording:
            recording.begin(rows, step)
        loss = engine.total(engine.forward_backward(rows))
        grad_norm, grad_norms = engine.clip()
        left_out = guard.judge(step, batch, loss, grad_norm)
        if recording:
            recording.before_update()
        lr = learning_rate(config.optim, step, steps)
        engine.update(lr, left_out)

        gc.collect()
        clock.count()
        run.step_ended()
        reason = run.stop.agreed()
        times.end()
        if logs:
            vectors = recording.vectors(grad_norms) if recording else None
            scalars = {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr, **clock.read()}
            scalars["peak_memory_gib"] = peak_memory_gib(mesh.device)
            scalars |= passes(run.data.corpus, batch)
            if evaluates and (batches := run.data.validation_batches()) is not None:
                scalars["validation_loss"] = mean_loss(engine, batches)
                names = also_called(scalars["validation_loss"], run.data.validation_bytes_per_token)
                scalars |= {f"validation_{name}": value for name, value in names.items()}
                scalars |= run.translations() if run.translations else {}
                if config.model.is_encoder and (batches := run.data.validation_batches()) is not None:
                    scalars["validation_accuracy"] = accuracy(engine, batches)
            facts = {"batch": batch, "batch_digest": run.data.digest(rows)}
            steps_timed, table = times.table()
            if log:
                alarms = monitor.judge(step, vectors) if monitor and vectors else []
                log.write(step, scalars, vectors, facts, monitor.worst if monitor else None)
                log.timing(step, steps_timed, table, times.hosts)
                for alarm in alarms:
                    log.alarm(alarm)
                for straggler in stragglers.judge(step, steps_timed, table):
                    log.alarm(straggler)
        elif log:
            log.advance(step)
        if logs or reason:
            if (in_a_row := _left_out(run, log)) >= config.faults.rollback_after:
                return _roll_back(run, step, rows, in_a_row, checkpointer, log)
            saves = bool(reason) or (saves and (not in_a_row or step == until))
            if saves and (said := checkpointer.save(step)) and log:
                log.say(said)
        if reason:
            return reason
        if logs:
            clock.restart()
    if (said := checkpointer.finish()) and log:
        log.say(said)
    return None


def _left_out(run: Run, log: Log | None) -> int:
    """Keeps record of the steps left out since it last did -> how many of the very last were, in a row."""
    for judged in run.guard.judged():
        if judged.left_out:
            run.faults.left_out(judged)
            if log:
                log.say(f"step {judged.step} left out: loss {judged.loss}, gradient norm {judged.grad_norm}")
    return run.guard.in_a_row


def _roll_back(
    run: Run, step: int, rows: Batch, in_a_row: int, checkpointer: Checkpointer, log: Log | None
) -> Rollback:
    """The last `in_a_row` steps up to `step`, which read `rows`, were left out.

    Errors: FloatingPointError when going back is no way out.
    """
    first = run.faults.records[-in_a_row]
    suspect = _suspect(run, first["step"], run.data.rows(first["batch"]) if run.data.corpus.seeks else rows)
    if (said := checkpointer.finish()) and log:
        log.say(said)
    to = next((saved_step(checkpoint) for checkpoint in reversed(checkpoints(run.folder))), None)
    again = any(rollback.to == to for rollback in run.faults.rollbacks)
    if to is None or again:
        raise FloatingPointError(
            f"step {first['step']}: loss {first['loss']}, gradient norm {first['grad_norm']}, and {in_a_row - 1} such "
            f"steps after it; {suspect}; "
            + (f"the run had gone back to step {to} before" if again else "there is no checkpoint to go back to")
            + "; lower optim.lr, lengthen optim.warmup_steps or choose another scheme"
        )
    rollback = Rollback(step, to, run.faults.batch(step) + 1, suspect)
    run.faults.roll_back(rollback)
    if log:
        log.say(f"{in_a_row} steps in a row left out; {suspect}; back to step {to}, without the batches since")
    return rollback


def _suspect(run: Run, step: int, rows: Batch) -> str:
    """Does the bad step once more, since nothing has changed -> which layer was the first to go bad in it."""
    if run.statistics is None:
        return "with statistics.enabled = true it would say which layer went bad"
    engine = run.engine
    run.statistics.begin(rows)
    engine.forward_backward(rows)
    _, norms = engine.clip()
    run.statistics.before_update()
    vectors = run.statistics.vectors(norms)
    engine.update(0.0, left_out=torch.tensor(True, device=run.mesh.device))
    suspect = None
    if run.mesh.speaks:
        layers = read_layers(run.folder)
        faults = run.config.faults
        before = {name: vector[layers["step"] < step][-faults.window :] for name, vector in layers.items()}
        suspect = first_bad_layer(vectors, before, faults.sigma)
    suspect = run.mesh.told(suspect)
    return "no layer stands out" if suspect is None else f"the first to go bad is {suspect}"


def _greeting(engine: Engine, mesh: Mesh) -> str:
    n_parameters = sum(prod(weight.shape) for weight in engine.pieces.weights.values())
    ranks = [f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1]
    layout = f"{mesh.device.type} x " + " x ".join(ranks) if ranks else f"{mesh.device}"
    mode = engine.config.parallel.recompute
    again = f", recompute = {mode!r}" if mode != "none" else ""
    return f"{n_parameters:,} parameters in {engine.config.model.n_all_layers} layers on {layout}{again}"


def passes(corpus: Corpus | PairCorpus, batches: int) -> dict[str, float]:
    """Passes over the corpus, or over each source of a mixture, and how many rows of each were read."""
    epochs = corpus.epochs(batches)
    if len(epochs) == 1:
        return {"epoch": next(iter(epochs.values()))}
    rows = corpus.rows(batches)
    return {f"epoch/{name}": n for name, n in epochs.items()} | {f"rows/{name}": n for name, n in rows.items()}


def last_step(config: Config) -> int:
    return min(config.train.steps, config.train.stop_after or config.train.steps)


def due(step: int, last: int, every: int) -> bool:
    """Whether `step` is one of every `every` (0: none), or the last."""
    return step == last or (every > 0 and step % every == 0)


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
