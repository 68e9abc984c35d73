"""Whether the layers behave: what a run's statistics are compared with, and the alarms that come of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf, log
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy.typing import NDArray

from nlm.anatomy import MATRICES
from nlm.model import Transformer
from nlm.schemes.base import Growth
from nlm.statistics.laws import gradient_law, rate, stream_law
from nlm.statistics.store import STEP, StoredLayers

Vectors = Mapping[str, NDArray[Any]]

WINDOW = 32
"""How many recorded steps are looked back on."""
LEAST = 8
"""How many it takes to say what is usual."""
JUMPS = {  # causes before effects
    "weight_norm": 3.0,
    "branch_rms": 20.0,
    "stream_rms_out": 20.0,
    "grad_norm": 100.0,
}
"""By which factor a layer may differ from its own past, beside what the other layers do."""
SPREADS = 8.0
"""Or by how many times the spread of its past."""
LAW = 30.0
"""By which factor a layer may differ from a law over depth."""
UPDATE = 0.5
"""Up to which share of a matrix a step may change, again and again."""
COLLAPSED = 0.02
"""Down to which share of the entropy of uniform attention."""
SHARE = 0.95
"""Up to which share of queries may be saturated, or of hidden units dead."""
LOGITS = 100.0
"""Up to where |q||k|/√Dh may grow: a softmax of logits of this size has one key."""
FP16 = 65504.0
"""The largest number of fp16."""
PATIENCE = {"jump": 1, "law": 4, "share": 8, "forecast": 4}
"""How many recorded steps in a row a kind of finding must be there."""
CERTAIN = 20.0
"""From how many standard errors on growth is extrapolated."""
AHEAD = 4
"""And how far, in units of the time that it was seen."""


@dataclass(frozen=True)
class Finding:
    """A layer whose `metric` is not what was `expected`; it is bad where `severity` is 1 or more."""

    kind: str
    metric: str
    layer: int
    expected: float
    seen: float
    severity: float
    why: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.metric} is {self.seen:.3g}, expected {self.why}"


@dataclass(frozen=True)
class Alarm:
    """A finding that has been there `since` a step, in a row up to `step`."""

    step: int
    layer: int
    metric: str
    expected: float
    seen: float
    since: int
    text: str


class Monitor:
    """Compares every recorded step with the scheme's law, with the steps before, and with what no model survives.

    `last_step` is how far forecasts are of interest. `n_first`: so many of the layers are an encoder's, whose stream is
    not that of the others.
    """

    def __init__(self, growth: Growth, head_dim: int, last_step: int, n_first: int = 0) -> None:
        self.growth, self.head_dim, self.last_step, self.n_first = growth, head_dim, last_step, n_first
        self.steps: list[int] = []
        self.past: dict[str, list[NDArray[np.float64]]] = {}
        self.since: dict[tuple[str, str], tuple[int, int]] = {}
        """By kind and metric of what is bad now: since which step, and for how many recorded steps."""
        self.worst: str | None = None
        """Of the last step, the layer that is nearest to an alarm, or furthest beyond it."""

    def judge(self, step: int, vectors: Vectors) -> list[Alarm]:
        """The alarms that begin with this recorded step; one that goes on is not told again."""
        now: Vectors = {name: vector.astype(np.float64) for name, vector in vectors.items()}
        with np.errstate(all="ignore"), catch_warnings():
            simplefilter("ignore", RuntimeWarning)  # of medians of nothing: not every layer has every sublayer
            found = [finding for check in CHECKS for finding in check(self, step, now)]
            self._remember(step, now)
        bad = {(f.kind, f.metric): f for f in found if f.severity >= 1}
        self.since = {key: self.since.get(key, (step, 0)) for key in bad}
        self.since = {key: (since, times + 1) for key, (since, times) in self.since.items()}
        worst = max(found, key=lambda finding: finding.severity, default=None)
        self.worst = None if worst is None else f"layer {worst.layer}: {worst.metric} {worst.seen:.2g}"
        return [
            Alarm(step, f.layer, f.metric, f.expected, f.seen, self.since[key][0], str(f))
            for key, f in bad.items()
            if self.since[key][1] == PATIENCE[f.kind]
        ]

    def series(self, name: str, now: Vectors) -> NDArray[np.float64]:
        """[n L]: what is remembered, and now."""
        return np.stack([*self.past.get(name, []), now[name]])

    def by_stack(self, law: Callable[..., NDArray[np.float64]], *vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """A law over depth [L] -> [L], each stack by itself."""
        stacks = [slice(self.n_first)] if self.n_first else []
        return np.concatenate([law(*(v[stack] for v in vectors)) for stack in (*stacks, slice(self.n_first, None))])

    def _remember(self, step: int, now: Vectors) -> None:
        self.steps = [*self.steps[-WINDOW + 1 :], step]
        for name in now:
            if name.partition("/")[0] in (*JUMPS, "stream_max_out", "q_norm", "k_norm"):
                self.past[name] = [*self.past.get(name, [])[-WINDOW + 1 :], now[name]]


def resumed_monitor(run: Path, whole: Transformer, last_step: int, start: int) -> Monitor:
    """Of a run that goes on after step `start`: knows what it recorded, and told, before."""
    monitor = Monitor(whole.scheme.growth, whole.config.head_dim, last_step, whole.config.n_encoder_layers or 0)
    layers = dict(StoredLayers(run))
    steps = layers.pop(STEP, np.empty(0))
    for i in np.flatnonzero(steps <= start)[-WINDOW:]:
        monitor.judge(int(steps[i]), {name: vectors[i] for name, vectors in layers.items()})
    return monitor


def _jumps(monitor: Monitor, step: int, now: Vectors) -> Iterator[Finding]:
    """Layers that leave their own past behind while the others do not."""
    for quantity, name in ((quantity, name) for quantity in JUMPS for name in monitor.past):
        of, _, part = name.partition("/")
        if of != quantity or (of in ("weight_norm", "grad_norm") and part not in MATRICES):
            continue
        past = np.log(np.stack(monitor.past[name]))
        usual = np.nanmedian(past, 0)
        usual = np.where(np.isfinite(usual), usual, np.nan)  # of what was 0 nothing can be said
        moved = np.log(now[name]) - usual
        common = np.nanmedian(moved)
        # How each layer used to move beside the others.
        beside = past - usual - np.nanmedian(past - usual, 1, keepdims=True)
        spread = 1.5 * np.nanmedian(np.abs(beside), 0)
        if len(past) < LEAST:
            continue
        tolerance = np.maximum(log(JUMPS[quantity]), SPREADS * spread)
        yield from _worst(
            "jump", name, np.exp(usual + common), now[name], (moved - common) / tolerance, "{} as in the steps before"
        )


def _stream(monitor: Monitor, step: int, now: Vectors) -> Iterator[Finding]:
    name = _last(now, "stream_variance_out")
    expected = monitor.by_stack(partial(stream_law, growth=monitor.growth), now[name])
    severity = np.abs(np.log(now[name] / expected)) / log(LAW)
    yield from _worst("law", name, expected, now[name], severity, f"{{}} by the {monitor.growth} law over depth")


def _gradient(monitor: Monitor, step: int, now: Vectors) -> Iterator[Finding]:
    gradients, stream = now["stream_grad_rms/layer"], now[_last(now, "stream_rms_out")]
    expected = monitor.by_stack(gradient_law, gradients, stream)
    severity = np.abs(np.log(gradients / expected)) / log(LAW)
    yield from _worst(
        "law",
        "stream_grad_rms/layer",
        expected,
        gradients,
        severity,
        "{} as near the last layers, relative to the stream",
    )


def _shares(monitor: Monitor, step: int, now: Vectors) -> Iterator[Finding]:
    for name, values in now.items():
        quantity, _, part = name.partition("/")
        if quantity == "update_ratio" and part in MATRICES:
            yield from _worst("share", name, UPDATE, values, values / UPDATE, "less than {} of the weights a step")
        if quantity in ("attention_saturated", "dead_units"):
            yield from _worst("share", name, SHARE, values, values / SHARE, "less than {}")
        if quantity == "attention_entropy":
            least = COLLAPSED * now[f"attention_uniform/{part}"]
            yield from _worst(
                "share", name, least, values, least / values, f"more than {{}}, {COLLAPSED} of uniform attention's"
            )


def _forecasts(monitor: Monitor, step: int, now: Vectors) -> Iterator[Finding]:
    """Growth that is steady enough to say when it meets a limit: within the run, and no further ahead than AHEAD times
    what was seen of it."""
    for name in now:
        quantity, _, part = name.partition("/")
        if quantity == "stream_max_out":
            values, limit, what = monitor.series(name, now), FP16, "the largest number of fp16"
        elif quantity == "q_norm":
            values = monitor.series(name, now) * monitor.series(f"k_norm/{part}", now) / monitor.head_dim**0.5
            name, limit, what = f"q_norm * k_norm / sqrt(head_dim) of {part}", LOGITS, "where softmax sees one key only"
        else:
            continue
        steps = np.array([*monitor.steps, step], dtype=np.float64)[-len(values) :]
        severity, when = np.log(values[-1]) / log(limit), np.full(len(values[-1]), step)
        if len(values) >= 2 * LEAST:
            half = len(values) // 2
            slope, certainty = rate(steps, values)
            slowing = rate(steps[half:], values[half:])[0] < 0.8 * rate(steps[:half], values[:half])[0]
            left = np.log(limit / values[-1]) / slope
            near = (left < AHEAD * (steps[-1] - steps[0])) & (step + left < monitor.last_step)
            grows = (slope > 0) & (certainty > CERTAIN) & ~slowing & near
            severity, when = np.where(grows, np.maximum(severity, 1.0), severity), np.where(grows, step + left, when)
        for finding in _worst("forecast", name, limit, values[-1], severity, f"less than {{}}, {what}"):
            reached = when[finding.layer]
            soon = f", which it will reach at step {reached:.0f}" if reached > step else ""
            yield replace(finding, why=finding.why + soon)


def _last(now: Vectors, quantity: str) -> str:
    """The name of a quantity of a layer's last sublayer; where any is finite, of one that is."""
    names = [name for name in now if name.startswith(f"{quantity}/")]
    return ([name for name in names if np.isfinite(now[name]).any()] or names)[-1]


def _worst(
    kind: str, name: str, expected: NDArray[np.float64] | float, seen: NDArray[np.float64], severity: Any, why: str
) -> Iterator[Finding]:
    """The one layer of all that is worst, if any can be told."""
    severity = np.nan_to_num(severity, nan=-inf, posinf=np.finfo(np.float64).max)
    layer = int(severity.argmax())
    if np.isfinite(severity[layer]):
        of = float(np.broadcast_to(expected, severity.shape)[layer])
        yield Finding(kind, name, layer, of, float(seen[layer]), float(severity[layer]), why.format(f"{of:.3g}"))


CHECKS = (_jumps, _stream, _gradient, _shares, _forecasts)
