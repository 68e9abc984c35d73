"""A statistic [steps L] as the cells of a picture: levels of a scale, condensed so that no outlier is hidden."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from numpy.typing import NDArray

from nlm.statistics.quantities import QUANTITIES, Quantity

ScaleKind = Literal["log", "linear", "symmetric"]

CURVES = 5
"""Over the layers, at so many steps."""
STRETCHES = 250
"""Of a long curve, of each of which the least and the largest value are drawn."""
DECADES = 12  # shown below the largest value: an exact zero or a vanished gradient must not wash out the rest


def described(quantity: str) -> Quantity:
    """Title and scale; of one that an older version recorded, its bare name and the scale of sizes."""
    return QUANTITIES.get(quantity) or Quantity(quantity.replace("_", " "))


def scale_of(arrays: Iterable[NDArray[Any]], kind: ScaleKind) -> Normalize:
    """One scale for several arrays, rounded outward, so that it stays the same from picture to picture of a run.

    "log": whole decades around the positive values, "linear" and "symmetric": from and to 1, 2 or 5 · 10^k, or 0.
    What hardly varies looks as if it hardly varied.
    """
    finite = [array[np.isfinite(array)].astype(np.float64) for array in arrays]
    values = np.concatenate(finite) if finite else np.zeros(0)
    if kind == "log":
        positive = values[values > 0]
        bottom, top = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        low, high = np.floor(np.log10(bottom)), np.ceil(np.log10(top))
        high = max(high, low + 1)
        return LogNorm(10.0 ** max(low, high - DECADES), 10.0**high)
    bottom, top = (values.min(), values.max()) if values.size else (0.0, 0.0)
    low, high = -_rounded_up(-bottom), _rounded_up(top)
    if kind == "symmetric":
        low, high = -max(-low, high), max(-low, high)
    return Normalize(low, high) if high > low else Normalize(low - (kind == "symmetric"), high + 1)


def _rounded_up(value: float) -> float:
    """To 1, 2 or 5 · 10^k; what is not positive, to 0."""
    if value <= 0:
        return 0.0
    decade = 10.0 ** np.floor(np.log10(value))
    return float(next((m * decade for m in (1, 2, 5) if value <= m * decade * (1 + 1e-6)), 10 * decade))


def absent(values: NDArray[Any]) -> NDArray[np.bool_]:
    """[steps L] -> [steps L]: where there is nothing to record, unlike a NaN that came up in the run.

    That is a layer which never had a number, or the steps before the first at which any layer had one.
    """
    none = np.isnan(values)
    begun = np.maximum.accumulate(~none.all(axis=1)) if len(values) else np.zeros(0, bool)
    return none & (none.all(axis=0)[None] | ~begun[:, None])


@dataclass(frozen=True)
class Cells:
    """`levels` [rows columns]: 0 to 1 of the scale, NaN for what is not finite; `absent` [rows columns] has no level.

    Row i is the layers from rows[i] to before rows[i + 1], column j the recorded steps likewise.
    """

    levels: NDArray[np.float64]
    absent: NDArray[np.bool_]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def cells(values: NDArray[Any], scale: Normalize, most: tuple[int, int]) -> Cells:
    """values [steps L] -> at most so many rows (layers) and columns (steps).

    Where several values share a cell it shows the one that is farthest from the median of all, or that one is not
    finite: a single layer that is off at a single step is seen.
    """
    missing = absent(values).T
    numbers = values.T.astype(np.float64)
    finite = np.isfinite(numbers)
    levels = np.full(numbers.shape, np.nan)
    levels[finite] = scale(np.clip(numbers[finite], scale.vmin, scale.vmax))
    rows, columns = edges(values.shape[1], most[0]), edges(values.shape[0], most[1])
    high = _blocks(np.maximum, np.where(missing, -np.inf, levels), rows, columns)  # a NaN wins
    low = _blocks(np.minimum, np.where(missing, np.inf, levels), rows, columns)
    middle = np.median(levels[finite]) if finite.any() else 0.5
    chosen = np.where(high - middle >= middle - low, high, low)
    return Cells(chosen, np.isneginf(chosen), rows, columns)


def chosen(steps: int) -> list[int]:
    """Of so many recorded steps: the first, the last and the quarter points between."""
    return sorted(set(np.linspace(0, steps - 1, CURVES).round().astype(int).tolist()))


def envelope(curve: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[N] -> x and y of a curve of at most 2 · STRETCHES points that keeps every extreme."""
    n = len(curve)
    if n <= 2 * STRETCHES:
        return np.arange(n, dtype=np.float64), curve
    borders = edges(n, STRETCHES)
    low, high = (f.reduceat(curve, borders[:-1]) for f in (np.fmin, np.fmax))  # NaN only where all are
    rises = np.arange(STRETCHES) % 2 == 0
    y = np.stack([np.where(rises, low, high), np.where(rises, high, low)], axis=1)
    return np.repeat((borders[1:] + borders[:-1] - 1) / 2, 2), y.ravel()


def edges(n: int, most: int) -> NDArray[np.int64]:
    """0 to n in at most so many parts of nearly equal size."""
    parts = min(n, most)
    return np.arange(parts + 1) * n // max(parts, 1)


def _blocks(
    function: np.ufunc, values: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    by_rows = function.reduceat(values, rows[:-1], axis=0)
    return function.reduceat(by_rows, columns[:-1], axis=1)  # type: ignore[no-any-return]
