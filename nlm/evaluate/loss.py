"""Cross-entropy, in nats a token."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from nlm.parallel.engine import Engine


@torch.no_grad()
def mean_loss(engine: Engine, batches: Iterable[NDArray[np.int64]]) -> float:
    """Batches of rows [B S+1] -> mean cross-entropy over all their targets."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total += engine.loss(torch.from_numpy(batch))
        targets += batch[:, 1:].size
    return float(total) / targets
