"""Cross-entropy, in nats a token, what else it is called, and how often a model is right."""

from collections.abc import Iterable
from math import exp, inf, log

import torch
from torch import Tensor, nn

from nlm.anatomy import IGNORED
from nlm.batch import Batch
from nlm.evaluate.predictions import choice
from nlm.model import Transformer
from nlm.norms import precise
from nlm.parallel.engine import Inference


def accuracy(engine: Inference, batches: Iterable[Batch]) -> float:
    """Of all targets of the batches, the share that the model finds likeliest."""
    usual = [model.cross_entropy for model in engine.models]
    try:
        for model in engine.models:
            model.cross_entropy = _Right(model)  # type: ignore[assignment]
        return mean_loss(engine, batches)
    finally:
        for model, cross_entropy in zip(engine.models, usual, strict=True):
            model.cross_entropy = cross_entropy


class _Right(nn.Module):
    """In the place of a CrossEntropy: how many targets are the likeliest token, []."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.vocab, self.tp = model.cross_entropy.vocab, model.tp

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.flatten()
        _, best = choice(precise(logits).flatten(0, 1), self.vocab, self.tp)
        return ((best == targets) & (targets != IGNORED)).sum().to(torch.float32)


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
