"""What a probe has found: as text, as pictures and as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nlm.plain import plain
from nlm.probe.measure import Probe, Signal
from nlm.probe.verdict import Verdict, gradient_ratio
from nlm.statistics.curves import depth_figure, layer_figure

LINES = 16
COLUMNS = ("layer", "rms in", "rms out", "attn", "ffn", "gradient", "of stream", "sgd/lr", "sign/lr")
LIMITS = "Only initialization was seen: not the data beyond these tokens, nor any step after the first."


def text(probe: Probe, verdict: Verdict) -> str:
    """Lines for the console, at most LINES of them for the layers."""
    model, seed = probe.config.model, probe.config.train.seed
    lines = [f"{_title(probe)}: {probe.tokens}, seed {seed}"]
    if probe.dim < model.dim:
        lines.append(
            f"probed {probe.dim} wide instead of {model.dim}; what a sign step does is scaled up for the verdict"
        )
    lines += ["", "".join(f"{name:>10}" for name in COLUMNS)]
    rows = _by_layer(probe.own)
    shown = np.unique(np.linspace(0, len(rows) - 1, min(LINES, len(rows))).round().astype(int))
    lines += [f"{layer:10}" + "".join(f"{value:10.3g}" for value in rows[layer]) for layer in shown]
    lines += ["", f"{'at depth':16}" + "".join(f"{depth:10}" for depth in probe.signals) + "  exponent"]
    for name, values in probe.totals.items():
        lines.append(f"{_words(name):16}" + "".join(f"{v:10.3g}" for v in values) + f"{probe.exponents[name]:z10.2f}")
    lines += ["", f"{verdict.outcome}:"] + [f"  - {finding.text}" for finding in verdict.findings] + [LIMITS]
    return "\n".join(lines)


def save(probe: Probe, verdict: Verdict, out: Path) -> Iterator[Path]:
    """Writes the pictures `layers.png` and `depth.png` and all numbers, `probe.json`; yields what it has written."""
    out.mkdir(parents=True, exist_ok=True)
    own = probe.own
    panels = {
        "RMS": {"stream out": own.rms[:, 1, 2], "attn": own.rms[:, 0, 1], "ffn": own.rms[:, 1, 1]},
        "gradient norm": {"matrices": own.grad_norm, "stream": own.stream_grad_norm},
        "relative update of the stream / lr": own.update,
    }
    title = _title(probe)
    layer_figure(panels, title).savefig(path := out / "layers.png")
    yield path
    totals = {_words(name): values for name, values in probe.totals.items()}
    exponents = list(probe.exponents.values())
    depth_figure(np.array(list(probe.signals)), totals, exponents, title).savefig(path := out / "depth.png")
    yield path
    (path := out / "probe.json").write_text(
        json.dumps(plain(_numbers(probe, verdict)), indent=1, allow_nan=False), encoding="utf-8"
    )
    yield path


def _title(probe: Probe) -> str:
    model = probe.config.model
    return f"{model.scheme.name}, {model.n_layers} layers, at initialization"


def _by_layer(signal: Signal) -> np.ndarray:
    """-> [L 8]: the columns of the table behind the layer."""
    rms, update = signal.rms, signal.update
    columns = [rms[:, 0, 0], rms[:, 1, 2], rms[:, 0, 1], rms[:, 1, 1]]
    columns += [signal.grad_norm, signal.stream_grad_norm, update["sgd"], update["sign"]]
    return np.stack(columns, axis=1)


def _words(name: str) -> str:
    return {"stream_variance": "stream variance", "sgd": "sgd update/lr", "sign": "sign update/lr"}[name]


def _numbers(probe: Probe, verdict: Verdict) -> dict[str, Any]:
    return {
        "model": probe.config.model.model_dump(),
        "dim": probe.dim,
        "tokens": probe.tokens,
        "seed": probe.config.train.seed,
        "signals": {depth: asdict(signal) for depth, signal in probe.signals.items()},
        "gradient_ratio": gradient_ratio(probe.own),
        "exponents": probe.exponents,
        "verdict": verdict.outcome,
        "findings": [asdict(finding) for finding in verdict.findings],
    }
