"""Whether a config is likely to survive its first steps, as far as initialization can tell.

Thresholds were calibrated on 200-step trainings of 6 to 128 layers; docs/probe.md has the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

from nlm.optim import learning_rate
from nlm.probe.measure import Probe, Signal, Vector

SURVIVES, UNCERTAIN, FAILS, NEVER = "likely to survive", "uncertain", "likely to fail", "will not train"
OUTCOMES = (SURVIVES, UNCERTAIN, FAILS, NEVER)

GRADIENT_RATIO = 20.0
"""Of the gradients of the first and the last eighth of the layers, either way. Schemes that train stay within 11; at a
hundred layers Post-LN, which does not, is at 1/22 (Xiong et al. 2020, arXiv:2002.04745, for its gradients)."""
LARGEST_RMS = 65504.0
"""The largest number of float16, and in bfloat16 or float32 a stream beside which no branch counts any more."""
GROWTH = 8.0
"""Of the stream's RMS over the second half of the layers. What grows as a power of depth, l, grows by 2 there and
as its square by 4: beyond, it is exponential."""
FIXED_REACH, FREE_REACH = (0.6, 2.0), (100.0, inf)
"""How many times its own size a step may move the last hidden state: up to the first number trainings survived, beyond
the second none did. A stream that every layer normalizes stays where it is thrown; one that may grow does, and so makes
the steps that follow smaller."""
FIXED_RMS = 1.01
"""Largest over smallest RMS of a stream that every layer normalizes."""


@dataclass(frozen=True)
class Finding:
    """Something measured, and what it alone would make of the config."""

    outcome: str
    text: str


@dataclass(frozen=True)
class Verdict:
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> str:
        """The worst that any finding says."""
        return max((finding.outcome for finding in self.findings), key=OUTCOMES.index)


def judge(probe: Probe) -> Verdict:
    signal = probe.own
    if findings := tuple(_not_finite(signal)):
        return Verdict(findings)
    return Verdict((*_stream(signal), *_gradients(signal), *_switched_off(signal), *_step(probe)))


def eighths(values: Vector) -> tuple[slice, slice]:
    """The first and the last eighth of the layers, one at least."""
    n = max(1, len(values) // 8)
    return slice(0, n), slice(len(values) - n, len(values))


def gradient_ratio(signal: Signal) -> float:
    """First over last eighth of the layers, mean gradient norm of their matrices; NaN where either has none.

    A matrix behind a branch that is off has no gradient though the stream has one: that is not vanishing.
    """
    idle = (signal.grad_norm == 0) & (signal.stream_grad_norm > 0)
    first, last = (signal.grad_norm[part][~idle[part]] for part in eighths(signal.grad_norm))
    return float(first.mean() / last.mean()) if len(first) and len(last) and last.any() else float("nan")


def _not_finite(signal: Signal) -> Iterator[Finding]:
    forward = ~np.isfinite(signal.rms).all(axis=(1, 2))
    backward = ~(np.isfinite(signal.grad_norm) & np.isfinite(signal.stream_grad_norm))
    if forward.any():
        yield Finding(NEVER, f"the stream is not finite from layer {forward.argmax()} on")
    elif backward.any():
        yield Finding(NEVER, f"gradients are not finite in layer {np.flatnonzero(backward)[-1]} and below")
    elif not np.isfinite(signal.loss):
        yield Finding(NEVER, f"the loss is {signal.loss}")


def _stream(signal: Signal) -> Iterator[Finding]:
    rms = signal.rms[:, 1, 2]
    growth = rms[-1] / rms[(len(rms) - 1) // 2]
    last = f"the stream's RMS is {rms[-1]:.3g} after the last layer"
    if rms[-1] > LARGEST_RMS:
        yield Finding(FAILS, f"{last}, above {LARGEST_RMS:,.0f}")
    elif growth > GROWTH:
        yield Finding(FAILS, f"{last}, {growth:.3g} times that of the middle one: it grows exponentially")
    else:
        yield Finding(SURVIVES, f"{last}, {growth:.3g} times that of the middle one (at most {GROWTH:g})")


def _gradients(signal: Signal) -> Iterator[Finding]:
    ratio = gradient_ratio(signal)
    if np.isnan(ratio):
        return
    first, last = eighths(signal.grad_norm)
    found = f"the gradients of {_named(first)} are {ratio:.3g} times those of {_named(last)}"
    if ratio < 1 / GRADIENT_RATIO:
        yield Finding(FAILS, f"{found}, below 1/{GRADIENT_RATIO:g}: they vanish towards the bottom, which never learns")
    elif ratio > GRADIENT_RATIO:
        yield Finding(FAILS, f"{found}, above {GRADIENT_RATIO:g}: they explode towards the bottom")
    else:
        yield Finding(SURVIVES, f"{found} (1/{GRADIENT_RATIO:g} to {GRADIENT_RATIO:g})")


def _named(layers: slice) -> str:
    first, last = layers.start, layers.stop - 1
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _switched_off(signal: Signal) -> Iterator[Finding]:
    n_layers = len(signal.off)
    if off := int(signal.off.sum()):
        yield Finding(
            SURVIVES,
            f"the branches of {off} of {n_layers} layers are off at the start: the stream passes them unchanged, "
            "and what they do once they are on is not seen here",
        )
    if idle := int((signal.grad_norm == 0).sum()):
        yield Finding(SURVIVES, f"no matrix moves in the first step in {idle} of {n_layers} layers")


def _step(probe: Probe) -> Iterator[Finding]:
    signal, optim = probe.own, probe.config.optim
    outs = signal.rms[..., 2]
    fixed = outs.max() < FIXED_RMS * outs.min() and not signal.off.any()
    safe, lost = FIXED_REACH if fixed else FREE_REACH
    rate = signal.update["sign"][-1] * probe.width_factor
    first_lr = learning_rate(optim, 1, probe.config.train.steps)
    first, peak = rate * first_lr, rate * optim.lr
    found = f"Adam's first step, at lr {first_lr:.3g}, moves the last hidden state by {first:.2g} times its size"
    if optim.warmup_steps > 1:
        found += f", one at the peak of {optim.lr:.3g} would by {peak:.2g}"
    allowed = f"{safe:g} is safe for a stream that {'every layer normalizes' if fixed else 'may grow'}"
    if first > lost:
        yield Finding(
            FAILS, f"{found}: {allowed}, beyond {lost:g} the model is thrown away; try optim.lr={safe / rate:.1g}"
        )
    elif first > safe:
        yield Finding(UNCERTAIN, f"{found}: {allowed}; optim.lr={safe / rate:.1g} would be")
    elif peak > safe:
        yield Finding(UNCERTAIN, f"{found}: {allowed}; all hangs on what the warmup makes of the model")
    else:
        yield Finding(SURVIVES, f"{found} ({allowed})")
