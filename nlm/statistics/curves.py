"""Curves over layers and over depth, on logarithmic scales."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nlm.statistics.cells import scale_of

Curves = Mapping[str, NDArray[Any]]


def layer_figure(panels: Mapping[str, Curves], title: str) -> Figure:
    """A panel for each quantity, with its curves [L] over the layers; zeros, which have no logarithm, are left out."""
    figure = Figure(figsize=(4.5 * len(panels), 4), dpi=100, layout="constrained")
    figure.suptitle(title)
    for axes, (quantity, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(_positive(values), marker="." if len(values) < 64 else None, label=name)
        _scale(axes, curves.values())
        axes.set_xlabel("layer")
        axes.set_title(quantity)
        axes.legend()
    return figure


def depth_figure(depths: NDArray[Any], totals: Curves, exponents: Sequence[float], title: str) -> Figure:
    """A panel for each total [depths], with the power of depth that was fitted to it, if there is one."""
    figure = Figure(figsize=(4.5 * len(totals), 4), dpi=100, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(totals), squeeze=False)[0]
    for axes, (name, values), exponent in zip(panels, totals.items(), exponents, strict=True):
        axes.plot(depths, _positive(values), "o")
        if np.isfinite(exponent):
            middle = np.exp(np.log(values).mean() - exponent * np.log(depths).mean())
            axes.plot(depths, middle * depths**exponent, label=f"depth^{exponent:z.2f}")
            axes.legend()
        axes.set_xscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        _scale(axes, [values])
        axes.set_xlabel("layers")
        axes.set_title(name)
    return figure


def _scale(axes: Axes, arrays: Iterable[NDArray[Any]]) -> None:
    """As that of the heat maps: what hardly varies looks as if it hardly varied."""
    scale = scale_of(arrays, "log")
    axes.set_yscale("log")
    axes.set_ylim(scale.vmin, scale.vmax)


def _positive(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
