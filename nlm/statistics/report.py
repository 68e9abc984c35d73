"""The verb `nlm report`: what runs did, as one HTML page and PNG files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlm.statistics.cells import scale_of
from nlm.statistics.draw import MAIN, colours, heat_map, profile_figure, quantities, quantity_figure
from nlm.statistics.page import write_page
from nlm.statistics.runs import Run, read_runs
from nlm.statistics.store import STEP

OVERVIEW = {"grad_norm/layer": "gradient norm", "stream_rms_out/ffn": "residual stream RMS"}
"""The statistics that the overview shows below the loss curves."""


def report(paths: Sequence[Path], out: Path) -> Iterator[Path]:
    """Writes `out/report.html` and `out/overview.png`, of all runs, and of each `out/NAME/QUANTITY.png` and, of the
    main quantities, `out/NAME/QUANTITY-profile.png`; yields what it has written.

    Errors: ValueError for a folder that is not a run, or has no logged step yet.
    """
    runs = read_runs(paths)
    yield write_page(runs, out / "report.html")
    yield _save(_overview(runs), out / "overview.png")
    for run in runs:
        for quantity in quantities(run.layers):
            yield _save(quantity_figure(run.layers, quantity, run.name), out / run.name / f"{quantity}.png")
            if quantity in MAIN:
                yield _save(profile_figure(run.layers, quantity, run.name), out / run.name / f"{quantity}-profile.png")


def _overview(runs: Sequence[Run]) -> Figure:
    """Loss curves over each other; below, a column a run, the heat maps, in one colour scale for all runs."""
    drawn = [run for run in runs if all(name in run.layers for name in OVERVIEW)]
    rows = len(OVERVIEW) if drawn else 0
    figure = Figure(figsize=(max(8, 4.5 * len(drawn)), 4 + 3 * rows), dpi=100, layout="constrained")
    grid = figure.add_gridspec(1 + rows, max(1, len(drawn)), height_ratios=[1.3] + [1.0] * rows)
    _losses(figure.add_subplot(grid[0, :]), runs)
    for row, (name, title) in enumerate(OVERVIEW.items() if drawn else (), start=1):
        scale = scale_of((run.layers[name] for run in drawn), "log")
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(drawn))]
        for panel, run in zip(axes, drawn, strict=True):
            heat_map(panel, run.layers[STEP], run.layers[name], scale)
            panel.set_title(f"{run.name}: {title}")
            panel.set_xlabel("step")
            panel.set_ylabel("layer")
            panel.label_outer()
        figure.colorbar(colours(scale, "log"), ax=axes)
    return figure


def _losses(axes: Axes, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        axes.plot(*run.series("loss"), color=f"C{i}", label=run.name)
        if (validated := run.series("validation_loss"))[0]:
            axes.plot(*validated, "o", color=f"C{i}", label=f"{run.name}, validation")
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
