"""On request: how much of a gradient is noise (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1)."""

import torch
from torch import Tensor

from nlm.batch import Batch
from nlm.parallel.engine import Engine


def half_gradient_norms(engine: Engine, rows: Batch) -> Tensor:
    """This rank's rows of a batch -> [P], the norms of the gradients of the mean loss over every second row of all
    ranks'. It takes a step that changes nothing."""
    first = engine.mesh.data_rank * len(rows)
    engine.forward_backward(rows.only((torch.arange(len(rows), device=engine.mesh.device) + first) % 2 == 0))
    norms = engine.pieces.norms(engine.pieces.reduce_gradients())
    engine.update(0.0, left_out=torch.tensor(True, device=engine.mesh.device))
    return norms


def signal_and_noise(norms: Tensor, half_norms: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Norms […] of the gradient of a batch of so many rows, and of that of half of it -> unbiased estimates […] of the
    square of the true gradient's norm, which may be below 0, and of the variance of the gradient of a single row.

    Of means over several steps, the second over the first is the gradient noise scale in rows.
    """
    whole, half = norms.square(), half_norms.square()
    return 2 * whole - half, rows * (half - whole)
