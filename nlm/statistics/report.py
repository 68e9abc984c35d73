"""The verb `nlm report`: what runs did, as PNG files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlm.config import read_table
from nlm.data.shards import shard_facts
from nlm.statistics.draw import Layers, colour_scale, heat_map, quantities, quantity_figure
from nlm.statistics.store import STEP, read_layers

OVERVIEW = {"grad_norm/layer": "gradient norm", "stream_rms_out/ffn": "residual stream RMS"}
"""The statistics that the overview shows below the loss curves."""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, under a name that tells it from the others."""

    name: str
    records: list[dict[str, Any]]  # of metrics.jsonl
    layers: Layers  # empty without statistics
    unigram_entropy_nats: float | None  # of the training tokens, where `nlm tokenize` left word of it


def report(paths: Sequence[Path], out: Path) -> Iterator[Path]:
    """Draws `out/overview.png`, of all runs, and `out/NAME/QUANTITY.png` of each; yields what it has written.

    Errors: ValueError for a folder that is not a run, or has no logged step yet.
    """
    runs = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    yield _save(_overview(runs), out / "overview.png")
    for run in runs:
        for quantity in quantities(run.layers):
            yield _save(quantity_figure(run.layers, quantity, run.name), out / run.name / f"{quantity}.png")


def _read(path: Path, name: str) -> Run:
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{path}: expected the folder of a run, with metrics.jsonl in it; give a config's log.dir")
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a running process may be at the last
    if not records:
        raise ValueError(f"{path}: no step is logged yet; wait for the first")
    config = read_table(path / "config.toml")
    layers = read_layers(path) if config["statistics"]["enabled"] else {}
    train = config["data"]["train"]
    facts = shard_facts(train) if isinstance(train, str) else {}
    return Run(name, records, layers, facts.get("unigram_entropy_nats"))


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, parts))):
        names = ["-".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different runs, got {', '.join(map(str, paths))}; name each once")


def _overview(runs: Sequence[Run]) -> Figure:
    """Loss curves over each other; below, a column a run, the heat maps, in one colour scale for all runs."""
    drawn = [run for run in runs if run.layers]
    rows = len(OVERVIEW) if drawn else 0
    figure = Figure(figsize=(max(8, 4.5 * len(drawn)), 4 + 3 * rows), dpi=100, layout="constrained")
    grid = figure.add_gridspec(1 + rows, max(1, len(drawn)), height_ratios=[1.3] + [1.0] * rows)
    _losses(figure.add_subplot(grid[0, :]), runs)
    for row, (name, title) in enumerate(OVERVIEW.items() if drawn else (), start=1):
        scale = colour_scale(run.layers[name] for run in drawn)
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(drawn))]
        for panel, run in zip(axes, drawn, strict=True):
            image = heat_map(panel, run.layers[STEP], run.layers[name], scale)
            panel.set_title(f"{run.name}: {title}")
        figure.colorbar(image, ax=axes)
    return figure


def _losses(axes: Axes, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        axes.plot([r["step"] for r in run.records], [r["loss"] for r in run.records], color=f"C{i}", label=run.name)
        validated = [(r["step"], r["validation_loss"]) for r in run.records if "validation_loss" in r]
        if validated:
            axes.plot(*zip(*validated, strict=True), "o", color=f"C{i}", label=f"{run.name}, validation")
    for entropy in sorted({run.unigram_entropy_nats for run in runs if run.unigram_entropy_nats}):
        label = f"unigram entropy, {entropy:.2f}"
        axes.axhline(entropy, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend()


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
