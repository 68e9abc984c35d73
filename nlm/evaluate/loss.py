"""Cross-entropy, in nats a token, and what else it is called."""

from collections.abc import Iterable
from math import exp, inf, log

import torch

from nlm.batch import Batch
from nlm.parallel.engine import Inference


@torch.no_grad()
def mean_loss(engine: Inference, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy over all targets of the batches."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total += engine.loss(batch)
        targets += int(batch.n_targets())
    return float(total) / targets


def also_called(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """A loss in nats a token as "perplexity" and, where the tokens' length as UTF-8 is known, "bits_per_byte"."""
    perplexity = exp(loss) if loss < 700 else inf  # of float64
    return {"perplexity": perplexity} | ({"bits_per_byte": loss / log(2) / bytes_per_token} if bytes_per_token else {})
