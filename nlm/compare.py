"""How far two runs of the same config are apart: in what they read, their losses, statistics, parameters and optimizer
state."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm.checkpoint import TENSORS, checkpoints
from nlm.statistics.store import STEP, read_layers
from nlm.storage import read_all


class Difference(NamedTuple):
    """The largest relative difference of one kind, and where the first is, if there is any."""

    size: float = 0.0
    first: str | None = None


def differences(run: Path, reference: Path, number_by_number: bool = False) -> dict[str, Difference]:
    """By kind: "batch_digest" (infinite for another batch), "loss" and "grad_norm" of every logged step, each statistic
    of the layers, "parameters" and "optimizer" of the newest checkpoint.

    Tensors and vectors over layers are compared by the norm of their difference, the latter also `number_by_number`.

    Errors: ValueError for runs that did not log the same steps, or whose tensors are not of the same names.
    """
    found: dict[str, Difference] = {}
    for kind, place, size in chain(
        _metrics(run, reference), _layers(run, reference, number_by_number), _tensors(run, reference)
    ):
        before = found.get(kind, Difference())
        found[kind] = Difference(max(before.size, size), before.first or (place if size else None))
    return found


def _metrics(run: Path, reference: Path) -> Iterator[tuple[str, str, float]]:
    ours, theirs = (
        {line["step"]: line for line in map(json.loads, (r / "metrics.jsonl").read_text(encoding="utf-8").splitlines())}
        for r in (run, reference)
    )
    _require_same(run, "steps", ours, theirs)
    for step in theirs:
        a, b = ours[step], theirs[step]
        yield "batch_digest", f"step {step}", 0.0 if a["batch_digest"] == b["batch_digest"] else np.inf
        for kind in ("loss", "grad_norm"):
            yield kind, f"step {step}", by_number(a[kind], b[kind])


def _layers(run: Path, reference: Path, number_by_number: bool) -> Iterator[tuple[str, str, float]]:
    if not (reference / "layers").is_dir():
        return
    ours, theirs = read_layers(run), read_layers(reference)
    _require_same(run, "statistics", ours, theirs)
    compare = by_number if number_by_number else by_norm
    for name in (name for name in theirs if name != STEP):
        for i, step in enumerate(theirs[STEP]):
            a, b = ours[name][i], theirs[name][i]
            if "_mean" in name:  # may be nothing but rounding: what counts is how far it moves what has this RMS
                rms = theirs[name.replace("_mean", "_rms")][i]
                a, b = 1 + a / rms, 1 + b / rms
            elif "weight_angle" in name:  # nothing but rounding when a matrix only shrinks
                ratio = theirs[name.replace("weight_angle", "update_ratio")][i]
                a, b = np.hypot(ratio, a), np.hypot(ratio, b)
            yield f"layers/{name}", f"step {step}", compare(a, b)


def _tensors(run: Path, reference: Path) -> Iterator[tuple[str, str, float]]:
    ours, theirs = (read_all(checkpoints(r)[-1] / TENSORS) for r in (run, reference))
    _require_same(run, "tensors", ours, theirs)
    for name in theirs:
        of = name.rpartition(".")[0]  # a parameter's state lies under the parameter's name
        kind = "optimizer" if of in theirs else "parameters"
        yield kind, name, by_norm(_in_its_units(name, ours), _in_its_units(name, theirs))


def _require_same(run: Path, what: str, ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> None:
    if ours.keys() != theirs.keys():
        missing, more = list(theirs.keys() - ours.keys())[:5], list(ours.keys() - theirs.keys())[:5]
        raise ValueError(f"{run}: expected the {what} of the other run; missing are {missing}, not expected {more}")


def _in_its_units(name: str, tensors: Mapping[str, Tensor]) -> NDArray[Any]:
    """A parameter or its state; of a second moment the root, which is in the gradient's units and what is used."""
    tensor = tensors[name]
    if tensor.dtype == torch.bfloat16:  # which numpy has not
        tensor = tensor.float()
    return (tensor.sqrt() if "exp_avg_sq" in name else tensor).numpy()  # type: ignore[no-any-return]


def by_number(ours: Any, theirs: Any) -> float:
    """Largest relative difference of single numbers; those that are zero or not finite must be equal."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b) / np.abs(b))
    return float(np.nan_to_num(relative, nan=np.inf, posinf=np.inf).max())


def by_norm(ours: Any, theirs: Any) -> float:
    """Norm of the difference in units of the reference's; numbers that are not finite must be equal."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return np.inf
    a, b = a[finite], b[finite]
    if np.array_equal(a, b):
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nan_to_num(np.linalg.norm(a - b) / np.linalg.norm(b), nan=np.inf, posinf=np.inf))
