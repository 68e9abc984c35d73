"""Which layer went bad first, told from its statistics."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Vectors = Mapping[str, NDArray[np.float32]]


SIGNALS = ("stream_rms_in", "branch_rms", "stream_rms_out")
"""In the order in which a sublayer computes them."""
LEAST = 8
"""How many steps it takes to say what is usual."""


def first_bad_layer(vectors: Vectors, before: Vectors, sigma: float) -> str | None:
    """Statistics [L] of a bad step and [steps L] of those before it -> the first in the order of the computation that
    is not finite or else more than `sigma` standard deviations above its mean, in words; None where there is none.

    A bad value spreads: that order is up the stack for weights and the forward, then down it for the gradients.
    """
    for name, layer in _in_order(vectors):
        value, usual = float(vectors[name][layer]), before[name][:, layer]
        absent = np.isnan(value) and len(usual) and np.isnan(usual).all()  # a layer that has no such sublayer
        if not np.isfinite(value) and not absent:
            return f"layer {layer}: {name} is {value}"
    for name, layer in _in_order(vectors):
        value, usual = float(vectors[name][layer]), before[name][:, layer].astype(np.float64)
        usual = usual[np.isfinite(usual)]
        if len(usual) >= LEAST and value > usual.mean() + sigma * usual.std():
            return f"layer {layer}: {name} is {value:.3g}, was {usual.mean():.3g} ± {usual.std():.1g}"
    return None


def _in_order(vectors: Vectors) -> Iterator[tuple[str, int]]:
    backward = [name for name in vectors if name.startswith("grad_norm/") and name != "grad_norm/layer"]
    names = [name for name in vectors if name.partition("/")[0] in SIGNALS]
    parts = list(dict.fromkeys(name.partition("/")[2] for name in names))
    forward = [name for name in vectors if name.startswith("weight_norm/")]
    forward += sorted(
        names, key=lambda name: (parts.index(name.partition("/")[2]), SIGNALS.index(name.partition("/")[0]))
    )
    layers = range(len(next(iter(vectors.values()))))
    yield from ((name, layer) for layer in layers for name in forward)
    yield from ((name, layer) for layer in reversed(layers) for name in backward)
