"""Where the numbers of a step go: the console, `metrics.jsonl`, `layers/` and what shows them elsewhere."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from nlm.config import Config
from nlm.environment import device_name, write_environment
from nlm.plan.flops import flops_per_token
from nlm.plan.gpus import peak_flops
from nlm.runtime import pick_device
from nlm.sinks import pixels, sinks
from nlm.statistics.draw import live_figures
from nlm.statistics.health import Alarm
from nlm.statistics.store import LayerWriter, StoredLayers
from nlm.timing import Straggler, Table, record, summary

Scalars = Mapping[str, float]


class Log:
    """Writes what each logged step measured. A run that resumes after step `start` forgets what came later."""

    def __init__(self, run: Path, config: Config, start: int) -> None:
        self.run, self.config, self.start = run, config, start
        self.steps = config.train.steps
        self.name = run.name

    def __enter__(self) -> Self:
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
        write_environment(self.run, self.config, device := pick_device())
        self._efficiency = Efficiency(self.config, device_name(device))
        self._stack = ExitStack()
        self._jsonl, self._alarms = (self._go_on(f"{name}.jsonl") for name in ("metrics", "alarms"))
        self._timing, self._timed = self._go_on("timing.jsonl"), deque[dict[str, Any]](maxlen=1000)
        self._layers = None
        if self.config.statistics.enabled:
            writer = LayerWriter(self.run, self.config.model.n_all_layers, self.start)
            self._layers = self._stack.enter_context(writer)
        self._sinks = [self._stack.enter_context(sink) for sink in sinks(self.run, self.config, self.start)]
        self._progress = self._stack.enter_context(_progress(self.name))
        self._task = self._progress.add_task(self.name, total=self.steps, completed=self.start, summary="")
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._timed:
            self.say(summary(self._timed))
        self._stack.__exit__(kind, error, trace)

    def _go_on(self, name: str) -> TextIO:
        file = self.run / name
        _forget_after(file, self.start)
        return self._stack.enter_context(file.open("a", encoding="utf-8"))

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self._progress.console.print(f"{self.name}: {text}", highlight=False)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def eta_s(self, step: int) -> float:
        return (time.perf_counter() - self._began) / (step - self.start) * (self.steps - step)

    def timing(self, step: int, steps: int, table: Table, hosts: Sequence[str]) -> None:
        """Times of the ranks over the last `steps` steps, kept in `timing.jsonl`."""
        self._timed.append(record(steps, table, hosts))
        self._timing.write(json.dumps({"step": step} | self._timed[-1]) + "\n")
        self._timing.flush()

    def alarm(self, alarm: Alarm | Straggler) -> None:
        """Says it, and keeps it in `alarms.jsonl`."""
        self._alarms.write(json.dumps(asdict(alarm)) + "\n")
        self._alarms.flush()
        since = f" since step {alarm.since}" if alarm.since < alarm.step else ""
        self.say(f"step {alarm.step}: ALARM{since}: {alarm.text}")

    def write(
        self,
        step: int,
        scalars: Scalars,
        vectors: Mapping[str, np.ndarray] | None,
        facts: Mapping[str, int],
        worst: str | None = None,
    ) -> None:
        """One logged step: scalars by name; with statistics a vector [L] a quantity; facts, which nobody draws; and, in
        words, the layer that is farthest from what it should be."""
        scalars = {**scalars, **self._efficiency.of(scalars["tokens_s"])}
        line = {"step": step, **scalars, **facts} | ({} if worst is None else {"worst_layer": worst})
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        if vectors is not None and self._layers is not None:
            self._layers.write(step, dict(vectors))
        for sink in self._sinks:
            sink.scalars(step, scalars)
        draws = step % self.config.statistics.images_every == 0 or step == self.steps
        if self._sinks and vectors is not None and draws:
            for name, figure in live_figures(StoredLayers(self.run)):
                picture = pixels(figure)
                for sink in self._sinks:
                    sink.picture(step, name, picture)
        summary = _summary(scalars, worst)
        self._progress.update(self._task, summary=summary)
        if self._progress.disable:
            eta = _clock(self.eta_s(step))
            self.say(f"step {step}/{self.steps}  {summary}  ETA {eta}")


class Efficiency:
    """How much a rank computes a second, and the share of what it could: of model FLOPs, recomputation not counted."""

    def __init__(self, config: Config, device: str) -> None:
        self._flops = flops_per_token(config) / config.parallel.ranks
        given = config.log.peak_tflops
        self._peak = given * 1e12 if given else peak_flops(device, config.train.precision)

    def of(self, tokens_s: float) -> dict[str, float]:
        """Tokens a second of all ranks -> "tflops_per_rank" and, of a device whose peak is known, "mfu"."""
        flops_s = tokens_s * self._flops
        return {"tflops_per_rank": flops_s / 1e12} | ({"mfu": flops_s / self._peak} if self._peak else {})


def _summary(scalars: Scalars, worst: str | None) -> str:
    text = f"loss {scalars['loss']:.3f}"
    if "validation_loss" in scalars:
        text += f"  validation {scalars['validation_loss']:.3f}"
    efficiency = f"MFU {scalars['mfu']:.1%}" if "mfu" in scalars else f"{scalars['tflops_per_rank']:.2g} TFLOP/s a rank"
    text += (
        f"  grad {scalars['grad_norm']:.2e}  lr {scalars['lr']:.1e}  {scalars['tokens_s']:,.0f} tokens/s  "
        f"{efficiency}  {scalars['peak_memory_gib']:.1f} GiB"
    )
    return text if worst is None else f"{text}  {worst}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Eta(ProgressColumn):
    def render(self, task: Task) -> Text:
        remaining = task.time_remaining
        return Text(f"ETA {'-:--' if remaining is None else _clock(remaining)}")


def _progress(name: str) -> Progress:
    """A bar on a terminal; a log file gets plain lines instead."""
    console = Console(file=sys.stdout, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), _Eta())
    return Progress(
        *columns,
        TextColumn("{task.fields[summary]}"),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )


def _forget_after(metrics: Path, step: int) -> None:
    """Drops the lines of steps that will be made again, and a last line that a killed process left unfinished."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = (line for line in lines if line.endswith("\n"))
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    partial = metrics.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, metrics)
