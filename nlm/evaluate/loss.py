"""Cross-entropy, in nats a token."""

from collections.abc import Iterable

import torch

from nlm.batch import Batch
from nlm.parallel.engine import Engine


@torch.no_grad()
def mean_loss(engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy over all targets of the batches."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total += engine.loss(batch)
        targets += int(batch.n_targets())
    return float(total) / targets
