"""Layer × step heat maps of the statistics."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from nlm.statistics.store import STEP

Layers = Mapping[str, NDArray[Any]]
"""What `read_layers` gives: "step" [steps] and "quantity/part" [steps L]."""

COLOURS = "magma"
NOT_FINITE = "#30c0ff"  # no colour of the map
COLUMNS = 4
DECADES = 12  # shown below the largest value: an exact zero or a vanished gradient must not wash out the rest


def tensorboard_images(board: SummaryWriter, layers: Layers, step: int) -> None:
    """One image a quantity, under tags whose number does not depend on the depth."""
    for quantity in quantities(layers):
        board.add_figure(f"layers/{quantity}", quantity_figure(layers, quantity), step)


def quantities(layers: Layers) -> list[str]:
    """The first words of the names "quantity/part", in order, each once."""
    return list(dict.fromkeys(name.partition("/")[0] for name in layers if name != STEP))


def quantity_figure(layers: Layers, quantity: str, title: str = "") -> Figure:
    """A heat map for each part of a quantity, all in one colour scale."""
    parts = {name.partition("/")[2]: values for name, values in layers.items() if name.startswith(f"{quantity}/")}
    columns = min(COLUMNS, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(1 + 3 * columns, 0.5 + 2.4 * rows), dpi=80, layout="constrained")
    figure.suptitle(f"{title} {quantity}".strip())
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    scale = colour_scale(parts.values())
    for axes, (part, values) in zip(grid.flat, parts.items(), strict=False):
        image = heat_map(axes, layers[STEP], values, scale)
        axes.set_title(part)
    for axes in grid.flat[len(parts) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=grid)
    return figure


def heat_map(axes: Axes, steps: NDArray[Any], values: NDArray[Any], scale: LogNorm) -> QuadMesh:
    """values [steps L] at `steps` [steps], drawn with the step to the right and the layer upwards."""
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([steps[:1] - 0.5, middles, steps[-1:] + 0.5])
    shown = np.ma.masked_invalid(values.T.astype(np.float64))
    shown = np.ma.maximum(shown, scale.vmin or 0.0)  # zero has no logarithm: it takes the lowest colour
    axes.set_facecolor(NOT_FINITE)
    image = axes.pcolormesh(edges, np.arange(len(shown) + 1), shown, norm=scale, cmap=COLOURS, rasterized=True)
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.label_outer()
    return image


def colour_scale(arrays: Iterable[NDArray[Any]]) -> LogNorm:
    """One logarithmic scale for several arrays: their positive values, and a decade at least.

    A decade, so that what hardly varies looks as if it hardly varied.
    """
    positive = np.concatenate([a[np.isfinite(a) & (a > 0)] for a in arrays])
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    low = max(low, high * 10.0**-DECADES)
    widen = max(1.0, 10 * low / high) ** 0.5
    return LogNorm(low / widen, high * widen)
