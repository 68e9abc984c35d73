"""On request: how much of a gradient is noise (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nlm.batch import Batch
from nlm.parallel.engine import Engine


class Half(NamedTuple):
    """About every second row of a batch: the norms [P] of the gradients of its mean loss, which `share` of the batch's
    targets are in it, and how many rows the whole batch has; all of all ranks."""

    norms: Tensor
    share: float | Tensor
    rows: Tensor


def half_batch(engine: Engine, rows: Batch) -> Half:
    """Of this rank's rows. It takes a step that changes nothing."""
    first = engine.mesh.data_rank * len(rows)
    half = rows.only((torch.arange(len(rows), device=engine.mesh.device) + first) % 2 == 0)
    engine.forward_backward(half)
    norms = engine.pieces.norms(engine.pieces.reduce_gradients())
    engine.update(0.0, left_out=torch.tensor(True, device=engine.mesh.device))
    return Half(norms, engine.count(half) / engine.count(rows), engine.together(rows.n_rows()))


def signal_and_noise(
    norms: Tensor, half_norms: Tensor, rows: float | Tensor, share: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Norms […] of the gradient of a batch of so many rows, and of that of a `share` of its targets -> unbiased
    estimates […] of the square of the true gradient's norm, which may be below 0, and of the variance of the gradient
    of a single row. Where rows differ in length, their targets are taken to be drawn one by one.

    Of means over several steps, the second over the first is the gradient noise scale in rows.
    """
    whole, half = norms.square(), half_norms.square()
    return (whole - share * half) / (1 - share), rows * (half - whole) * share / (1 - share)
