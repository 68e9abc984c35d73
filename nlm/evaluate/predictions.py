"""What a model says of each token: its loss, how sure the model is of its own choice, and whether that is right."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nlm.anatomy import IGNORED, Span
from nlm.batch import Batch
from nlm.norms import precise
from nlm.parallel.engine import Inference
from nlm.parallel.tensor import TensorParallel, reduce


class Predictions(NamedTuple):
    """[B S] each, 0 where the target is ignored: -ln p of the target, the largest p, and 1 where it is the target's."""

    loss: Tensor
    confidence: Tensor
    correct: Tensor


class Reader(nn.Module):
    """logits [B S V/n], targets [B S] -> []: what CrossEntropy gives outside training, and in `seen`, one [3 B·S] after
    another, what it is the sum of."""

    def __init__(self, vocab: Span, tp: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.tp = vocab, tp
        self.seen: list[Tensor] = []

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = precise(logits).flatten(0, 1), targets.flatten()
        counted = targets != IGNORED
        ours = counted & (targets >= self.vocab.start) & (targets < self.vocab.stop)
        top, best = choice(logits, self.vocab, self.tp)
        shifted = logits - top[:, None]
        target = shifted.gather(1, (targets - self.vocab.start).where(ours, 0)[:, None])[:, 0].where(ours, 0)
        total = shifted.exp().sum(1)
        if self.tp.size > 1:
            total, target = reduce(torch.stack([total, target]), self.tp.group)
        seen = torch.stack([total.log() - target, 1 / total, (best == targets).to(total)]).where(counted, 0)
        self.seen.append(seen)
        return seen[0].sum()


def choice(logits: Tensor, vocab: Span, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Logits [N V/n] of the tokens in `vocab` -> the largest [N] of all, and the first token that has it [N]."""
    top, best = logits.max(1)
    best = best + vocab.start
    if tp.size > 1:
        mine, top = top, reduce(top, tp.group, "max")
        best = reduce(best.where(mine == top, vocab.full), tp.group, "min")
    return top, best


@torch.no_grad()
def predictions(inference: Inference, rows: Batch) -> Predictions:
    """Of this rank's rows. Ranks that hold parts of one model call it together, with as many rows as long."""
    (model,) = inference.models
    before, reader = model.cross_entropy, Reader(model.cross_entropy.vocab, model.tp)
    model.eval()
    model.cross_entropy = reader  # type: ignore[assignment]
    try:
        inference.forward(rows.to(inference.mesh.device))
    finally:
        model.cross_entropy = before
    seen = torch.cat(reader.seen, 1).unflatten(1, rows.inputs.shape)
    return Predictions(*seen)
