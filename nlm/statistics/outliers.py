"""Layers that stand out at the last step: from their neighbours in depth, and from their own past."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from nlm.statistics.cells import ScaleKind

NEIGHBOURS = 4
"""On either side."""
PAST = 64
"""Recorded steps."""
LEAST = 8
"""How many values it takes to say what is usual."""
FLOOR = 0.01
"""The least standard deviation that is believed: in decades of a size, and in the spread of what has another scale."""
TO_SIGMA = 1.4826
"""Of a normal distribution, from its median absolute deviation."""


@dataclass(frozen=True)
class Outlier:
    """`usual` is the median of the neighbours, `was` that of the layer's own past; how far off the value is from what
    either lets expect, in standard deviations. Not finite values are infinitely far off."""

    layer: int
    value: float
    usual: float
    was: float
    from_neighbours: float
    from_past: float

    @property
    def sigma(self) -> float:
        return max(self.from_neighbours, self.from_past)


def outliers(values: NDArray[Any], kind: ScaleKind, sigma: float) -> Iterator[Outlier]:
    """values [steps L] -> the layers of the last step that are at least so many standard deviations off.

    Standard deviations are robust ones: over all layers, of the difference to the neighbours' median, and of the
    change since the median of the past, of which that of the median layer is taken off.
    """
    scaled = np.log10(np.where(values > 0, values, np.nan)) if kind == "log" else values.astype(np.float64)
    scaled = np.where(np.isfinite(scaled), scaled, np.nan)
    now, past = scaled[-1], scaled[-1 - PAST : -1]
    if np.isfinite(now).sum() < LEAST:
        return
    floor = FLOOR if kind == "log" else FLOOR * float(np.nanmax(now) - np.nanmin(now)) or 1.0
    padded = np.pad(now, NEIGHBOURS, mode="reflect", reflect_type="odd")  # goes on as it began
    usual = _median(sliding_window_view(padded, 2 * NEIGHBOURS + 1), 1)
    from_neighbours = _sigmas(now - usual, floor)
    was = _median(past, 0) if len(past) >= LEAST else np.full_like(now, np.nan)
    from_past = _sigmas(now - was, floor)
    back = (lambda x: 10.0**x) if kind == "log" else (lambda x: x)
    for layer in range(len(now)):
        value = float(values[-1, layer])
        seen = not np.isnan(values[:, layer]).all()
        far = (float(from_neighbours[layer]), float(from_past[layer])) if np.isfinite(value) else (np.inf, np.inf)
        if seen and max(far) >= sigma:
            yield Outlier(layer, value, float(back(usual[layer])), float(back(was[layer])), *far)


def _sigmas(differences: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """[L] -> [L]; where nothing can be said, 0."""
    centred = np.abs(differences - _median(differences, 0))
    sigma = max(float(np.nan_to_num(_median(centred, 0))) * TO_SIGMA, floor)
    return np.nan_to_num(centred / sigma)  # type: ignore[no-any-return]


def _median(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Of those that are numbers; NaN where none is."""
    none = np.isnan(values).all(axis=axis)
    median: NDArray[np.float64] = np.nanmedian(np.where(np.expand_dims(none, axis), 0.0, values), axis=axis)
    return np.where(none, np.nan, median)
