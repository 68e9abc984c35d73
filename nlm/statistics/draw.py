"""Layer × step heat maps of the statistics, and their curves over the layers."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from nlm.statistics.cells import ScaleKind, cells, chosen, described, envelope, scale_of
from nlm.statistics.store import STEP

Layers = Mapping[str, NDArray[Any]]
"""What `read_layers` gives: "step" [steps] and "quantity/part" [steps L]."""

COLOURS: dict[ScaleKind, str] = {"log": "magma", "linear": "magma", "symmetric": "PuOr_r"}
NOT_FINITE = "#30c0ff"  # no colour of the maps
ABSENT = "#c4c4c4"
COLUMNS = 4
CELLS = 160  # a side: no more than a panel has pixels, or matplotlib would leave some out
PANEL, MARGIN = (2.7, 2.1), (0.65, 0.5)  # inches: width and height


MAIN = ("stream_rms_out", "branch_rms", "stream_grad_rms", "grad_norm", "update_ratio", "max_logit")
"""The quantities that are drawn while the run goes on; `nlm report` draws all."""


def live_figures(layers: Layers) -> Iterator[tuple[str, Figure]]:
    """Pictures by name, of MAIN as far as they were recorded; the names do not depend on the depth."""
    for quantity in (quantity for quantity in quantities(layers) if quantity in MAIN):
        drawn = {name: layers[name] for name in layers if name == STEP or name.startswith(f"{quantity}/")}
        yield f"layers/{quantity}", quantity_figure(drawn, quantity)
        yield f"profiles/{quantity}", profile_figure(drawn, quantity)


def quantities(layers: Layers) -> list[str]:
    """The first words of the names "quantity/part", in order, each once."""
    return list(dict.fromkeys(name.partition("/")[0] for name in layers if name != STEP))


def parts(layers: Layers, quantity: str) -> dict[str, NDArray[Any]]:
    """part -> [steps L]."""
    return {name.partition("/")[2]: layers[name] for name in layers if name.startswith(f"{quantity}/")}


def quantity_figure(layers: Layers, quantity: str, title: str = "") -> Figure:
    """A heat map for each part of a quantity, all in one colour scale."""
    kind, panels = described(quantity).scale, parts(layers, quantity)
    scale = scale_of(panels.values(), kind)
    figure, grid = _grid(quantity, title, panels, "step", "layer")
    for axes, values in zip(grid, panels.values(), strict=True):
        heat_map(axes, layers[STEP], values, scale, kind)
    width = figure.get_figwidth()
    bar = figure.add_axes((1 - 0.75 / width, 0.25, 0.12 / width, 0.5))
    figure.colorbar(colours(scale, kind), cax=bar)
    return figure


def profile_figure(layers: Layers, quantity: str, title: str = "") -> Figure:
    """A panel for each part of a quantity, with its curves over the layers at a few steps, all in one scale."""
    kind, panels = described(quantity).scale, parts(layers, quantity)
    scale = scale_of(panels.values(), kind)
    figure, grid = _grid(quantity, title, panels, "layer", "")
    for axes, values in zip(grid, panels.values(), strict=True):
        _profile(axes, layers[STEP], values, scale)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="center right", title="step", frameon=False)
    return figure


def heat_map(axes: Axes, steps: NDArray[Any], values: NDArray[Any], scale: Normalize, kind: ScaleKind = "log") -> None:
    """values [steps L] at `steps` [steps], drawn with the step to the right and the layer upwards."""
    drawn = cells(values, scale, (CELLS, CELLS))
    middles = (steps[1:] + steps[:-1]) / 2
    borders = np.concatenate([steps[:1] - 0.5, middles, steps[-1:] + 0.5])[drawn.columns]
    shown = np.ma.masked_array(np.where(np.isnan(drawn.levels), 2.0, drawn.levels), drawn.absent)
    axes.pcolormesh(borders, drawn.rows, shown, norm=Normalize(0, 1), cmap=colour_map(kind))


def colours(scale: Normalize, kind: ScaleKind) -> ScalarMappable:
    """What a colour bar beside heat maps shows."""
    return ScalarMappable(scale, COLOURS[kind])


def colour_map(kind: ScaleKind) -> Colormap:
    """Of levels: what is not finite is drawn as one above 1."""
    return colormaps[COLOURS[kind]].with_extremes(bad=ABSENT, over=NOT_FINITE)


def _profile(axes: Axes, steps: NDArray[Any], values: NDArray[Any], scale: Normalize) -> None:
    """values [steps L] over the layers at the chosen ones of `steps` [steps], the last of them the palest."""
    at, n_layers = chosen(len(steps)), values.shape[1]
    for i, shade in zip(at, np.linspace(0, 0.85, len(at)), strict=True):
        curve = values[i].astype(np.float64)
        curve[~np.isfinite(curve) | (isinstance(scale, LogNorm) & (curve <= 0))] = np.nan  # no logarithm
        colour, marker = to_hex(colormaps["viridis"](shade)), "." if n_layers < 64 else None
        axes.plot(*envelope(curve), color=colour, linewidth=1.2, marker=marker, label=f"{steps[i]}")
    if isinstance(scale, LogNorm):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(scale.vmin, scale.vmax)
    axes.set_xlim(-0.5, n_layers - 0.5)


def _grid(quantity: str, title: str, panels: Mapping[str, object], x: str, y: str) -> tuple[Figure, list[Axes]]:
    """A panel a part, at most COLUMNS in a row, with room for a colour bar or legend; laid out by hand, since
    matplotlib's own layout takes longer than all the drawing."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = MARGIN[0] + columns * PANEL[0] + 1.0, MARGIN[1] + rows * PANEL[1] + 0.6
    figure = Figure(figsize=(width, height), dpi=100)
    figure.suptitle(f"{title}  {described(quantity).title}".strip(), y=1 - 0.12 / height, va="top", fontsize=11)
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
        gridspec_kw={
            "left": MARGIN[0] / width,
            "right": 1 - 1.0 / width,
            "bottom": MARGIN[1] / height,
            "top": 1 - 0.6 / height,
            "wspace": 0.08,
            "hspace": 0.18,
        },
    )
    for i, (panel, part) in enumerate(zip(axes.flat, panels, strict=False)):
        panel.set_title(part, fontsize=10, y=1.0)  # placed by itself it takes a third of the time
        if i + columns >= len(panels):
            panel.set_xlabel(x)
            panel.tick_params(labelbottom=True)
        if i % columns == 0:
            panel.set_ylabel(y)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    return figure, list(axes.flat[: len(panels)])
