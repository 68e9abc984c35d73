"""Curves over the layers inside a page, as paths of SVG: in small numbers, and by the hundred in a second."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from numpy.typing import NDArray

from nlm.statistics.cells import chosen, envelope

WIDTH, HEIGHT = 1000, 400
"""Units of a path."""
TICKS = 6
"""At most."""


@dataclass(frozen=True)
class Profile:
    """`paths` of the chosen steps, from the first to the last; `ticks` are heights, from the top, and their words."""

    paths: list[str]
    ticks: list[tuple[float, str]]


def profile(values: NDArray[Any], scale: Normalize) -> Profile:
    """values [steps L]."""
    assert scale.vmin is not None and scale.vmax is not None
    rows = values[chosen(len(values))].astype(np.float64)
    drawn = np.isfinite(rows) & ((rows > 0) | (not isinstance(scale, LogNorm)))
    levels = np.full(rows.shape, np.nan)
    levels[drawn] = scale(np.clip(rows[drawn], scale.vmin, scale.vmax))
    return Profile([_path(row) for row in levels], _ticks(scale))


def _path(levels: NDArray[np.float64]) -> str:
    """[L]; interrupted where there is no level."""
    x, y = envelope(levels)
    words, pen = [], "M"
    for across, up in zip(((x + 0.5) * WIDTH / len(levels)).round(), (1 - y) * HEIGHT, strict=True):
        if np.isnan(up):
            pen = "M"
            continue
        words.append(f"{pen}{across:.0f} {up:.0f}")
        pen = "L"
    if len(words) == 1:
        words.append("h1")  # a point
    return "".join(words)


def _ticks(scale: Normalize) -> list[tuple[float, str]]:
    """Whole decades, or the quarters of another scale."""
    assert scale.vmin is not None and scale.vmax is not None
    if isinstance(scale, LogNorm):
        decades = np.arange(round(np.log10(scale.vmin)), round(np.log10(scale.vmax)) + 1)
        at = 10.0 ** decades[:: -(-len(decades) // TICKS)]
    else:
        at = np.linspace(scale.vmin, scale.vmax, 5)
    return [(100 * (1 - float(scale(value))), f"{value:g}") for value in at]
