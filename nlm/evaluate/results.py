"""What was found of checkpoints: JSON files beside the run, a table, and a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlm.plain import plain

COLUMNS = {
    "loss": ".4f",
    "perplexity": ".2f",
    "bits_per_byte": ".4f",
    "accuracy": ".4f",
    "calibration_error": ".4f",
    "tokens": ",",
}


KINDS = "text", "tasks", "translation"


@dataclass
class Result:
    """Of one checkpoint, by the name of the data and of the task; of data that are pairs, by direction."""

    checkpoint: Path
    text: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    translation: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        parent = self.checkpoint.parent
        return parent.parent if parent.name == "checkpoints" else parent

    @property
    def step(self) -> int | None:
        number = self.checkpoint.name.removeprefix("step-")
        return int(number) if number.isdecimal() else None

    @property
    def name(self) -> str:
        return self.checkpoint.name if self.step is None else f"step {self.step}"

    @property
    def file(self) -> Path:
        """Where it is kept if nothing else is said."""
        return self.run / "evaluation" / f"{self.checkpoint.name}.json"

    def to_json(self) -> dict[str, Any]:
        return {"checkpoint": str(self.checkpoint), "step": self.step} | {kind: getattr(self, kind) for kind in KINDS}


def keep(result: Result) -> Path:
    """Into its file, beside what was found on other data and tasks before -> the file."""
    file, found = result.file, result.to_json()
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        found |= {kind: before.get(kind, {}) | found[kind] for kind in KINDS}
    write(file, found)
    return file


def write(file: Path, found: Any) -> None:
    """As JSON, whole or not at all; what is not finite is null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def header(results_of: str) -> str:
    return f"{results_of:16}" + "".join(f"{name.replace('_', ' '):>18}" for name in COLUMNS)


def line(name: str, found: Mapping[str, Any]) -> str:
    """A row of the table under `header`."""
    values = (f"{found[name]:{form}}" if found.get(name) is not None else "-" for name, form in COLUMNS.items())
    return f"{name:16}" + "".join(f"{value:>18}" for value in values)


def picture(results: Sequence[Result], data: str) -> Figure:
    """Reliability of every checkpoint, a decoder's loss by position and, of several, what the table says over their
    steps: the accuracy where no bits per byte are known."""
    found = [(result, result.text[data]) for result in results if data in result.text]
    over = [(result.step, text) for result, text in found if result.step is not None]
    steps = sorted({step for step, _ in over})
    figure = Figure(figsize=(11, 8 if len(steps) > 1 else 4.2), dpi=100, layout="constrained")
    figure.suptitle(data)
    grid = figure.add_gridspec(2 if len(steps) > 1 else 1, 12)
    shades = [colormaps["viridis"](0.85 * i / max(1, len(found) - 1)) for i in range(len(found))]
    several = len({result.run for result, _ in found}) > 1
    labels = [f"{result.run.name} {result.name}" if several else result.name for result, _ in found]
    has_positions = any("by_position" in text for _, text in found)
    if has_positions:
        by_position = figure.add_subplot(grid[0, :6])
        for (_, text), shade, label in zip(found, shades, labels, strict=True):
            _by_position(by_position, text.get("by_position", ()), shade, label)
        by_position.legend(fontsize=8)
    reliability = figure.add_subplot(grid[0, 6 if has_positions else 0 :])
    for (_, text), shade, label in zip(found, shades, labels, strict=True):
        _reliability(reliability, text["reliability"], shade, label)
    reliability.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    if not has_positions:
        reliability.legend(fontsize=8)
    second = "bits_per_byte" if any(text.get("bits_per_byte") is not None for _, text in found) else "accuracy"
    for i, name in enumerate(("loss", second, "calibration_error") if len(steps) > 1 else ()):
        axes = figure.add_subplot(grid[1, 4 * i : 4 * i + 4])
        for run in dict.fromkeys(result.run for result, _ in found):
            mine = sorted(
                (result.step, text[name])
                for result, text in found
                if result.run == run and result.step is not None and text.get(name) is not None
            )
            axes.plot([step for step, _ in mine], [value for _, value in mine], marker=".", label=run.name)
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
        if several:
            axes.legend(fontsize=8)
    return figure


def _by_position(axes: Axes, buckets: Sequence[Mapping[str, Any]], colour: Any, label: str) -> None:
    known = [bucket for bucket in buckets if bucket["loss"] is not None]
    middles = [(bucket["from"] * bucket["to"]) ** 0.5 for bucket in known]
    axes.plot(middles, [bucket["loss"] for bucket in known], color=colour, marker=".", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("tokens of context")
    axes.set_title("loss, nats a token")


def _reliability(axes: Axes, bins: Sequence[Mapping[str, Any]], colour: Any, label: str) -> None:
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=colour, marker=".", label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_title("share of right predictions")
