"""Cross-entropy, in nats a token."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm.model import Transformer
from nlm.runtime import autocast


def summed_loss(model: Transformer, rows: Tensor, signals: list[Tensor] | None = None) -> Tensor:
    """rows [B S+1] -> []: cross-entropy of predicting each token from those before it, summed over B·S targets."""
    loss: Tensor = model.cross_entropy(model(rows[:, :-1], signals), rows[:, 1:])
    return loss


@torch.no_grad()
def mean_loss(model: Transformer, batches: Iterable[NDArray[np.int64]], device: torch.device, precision: str) -> float:
    """Batches of rows [B S+1] -> mean cross-entropy over all their targets."""
    total, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        rows = torch.from_numpy(batch).to(device)
        with autocast(precision, device):
            total += summed_loss(model, rows)
        targets += rows[:, 1:].numel()
    return float(total) / targets
