"""Laws over depth: what the statistics of a healthy model look like from the first layer to the last."""

import numpy as np
from numpy.typing import NDArray

from nlm.schemes.base import Growth

Vector = NDArray[np.float64]


def stream_law(variance: Vector, growth: Growth) -> Vector:
    """Variance of the stream after each layer [L] -> [L], what the scheme's law makes of it.

    "constant": the median. "linear" and "logarithmic": a + c·g(l) with g = l or the harmonic number 1 + … + 1/l, the
    line through the medians of the lower and the upper half. "exponential": such a line of the logarithms over l.
    Medians, since a layer that breaks a law should not bend it.
    """
    layers = np.arange(1, len(variance) + 1, dtype=np.float64)
    match growth:
        case "constant":
            return np.full_like(layers, np.median(variance))
        case "linear":
            return _line(layers, variance)
        case "logarithmic":
            return _line((1 / layers).cumsum(), variance)
        case "exponential":
            return np.exp(_line(layers, np.log(variance)))


def gradient_law(gradient_rms: Vector, stream_rms: Vector) -> Vector:
    """RMS [L] of the loss's gradient by the stream after each layer, and of that stream -> [L]: what the first should
    be, inversely proportional to the second, seen from the last hundredth of the layers, where it comes from.

    A norm divides what it reads by its size, and so the gradient by what it reads. At initialization it holds within a
    factor of six for every scheme.
    """
    last = -max(1, len(stream_rms) // 100)
    return np.median((gradient_rms * stream_rms)[last:]) / stream_rms  # type: ignore[no-any-return]


def _line(x: Vector, y: Vector) -> Vector:
    """Through the medians of both halves; where that goes below the least of y, the least of y."""
    half = len(x) // 2
    if not half:
        return y.copy()
    (x0, y0), (x1, y1) = ((np.median(x[part]), np.median(y[part])) for part in (slice(half), slice(half, None)))
    return np.maximum(y0 + (x - x0) * (y1 - y0) / (x1 - x0), y.min())


def rate(steps: Vector, values: NDArray[np.float64]) -> tuple[Vector, Vector]:
    """Values [n L] at n steps -> [L] each: slope of their logarithms over the steps, and the slope in units of its
    standard error."""
    x = steps - steps.mean()
    logs = np.log(values)
    slope = x @ logs / (x @ x)
    rest = logs - logs.mean(0) - np.outer(x, slope)
    error = np.sqrt((rest**2).sum(0) / max(1, len(x) - 2) / (x @ x))
    return slope, slope / np.maximum(error, 1e-12)
