"""Training by a softmax over the largest logits only."""

from collections.abc import Callable

import pytest
import torch

from nlm.anatomy import IGNORED, Span
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.parallel.tensor import TensorParallel

VOCAB = 30


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, VOCAB, generator=generator, dtype=torch.float64)
    return logits, torch.randint(VOCAB, (200,), generator=generator)


def sparse(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    return TensorParallel().sparse_cross_entropy(logits, targets, Span.whole(logits.shape[1]), k)


def test_it_is_the_loss_over_the_k_largest() -> None:
    logits, targets = rows()
    expected = 0.0
    for row, target in zip(logits, targets, strict=True):
        expected += float(row.sort().values[-5:].exp().sum().log() - row[target])
    assert float(sparse(logits, targets, 5)) == pytest.approx(expected)
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert torch.allclose(sparse(logits, targets, VOCAB), whole)
    assert torch.allclose(sparse(logits, targets, 10 * VOCAB), whole), "no more than there are"


def test_it_is_low_but_never_below_zero() -> None:
    logits, targets = rows()
    for k in (1, 3, 10):
        each = torch.stack([sparse(row[None], target[None], k) for row, target in zip(logits, targets, strict=True)])
        assert each.min() >= 0
        assert each.sum() < torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def test_only_the_largest_and_the_target_learn() -> None:
    logits, targets = rows()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(sparse(logits, targets, 5), logits)
    learns = torch.zeros_like(logits, dtype=torch.bool)
    learns.scatter_(1, logits.topk(5).indices, True).scatter_(1, targets[:, None], True)
    assert ((gradient != 0) == learns).all()
    assert gradient.sum(1).abs().max() < 1e-12


def test_ignored_targets_do_not_count() -> None:
    logits, targets = rows()
    some = targets.where(torch.arange(200) < 50, IGNORED)
    assert torch.allclose(sparse(logits, some, 5), sparse(logits[:50], targets[:50], 5))


def test_validation_goes_by_the_true_loss(make_config: Callable[..., Config]) -> None:
    engines = [build_engine(make_config(train={"sparse_softmax_k": k} if k else {}), Mesh()) for k in (3, None)]
    batch = Batch(torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(0)))
    sparse_loss, true_loss = (float(engine.forward_backward(batch)) for engine in engines)
    assert sparse_loss < true_loss - 0.1
    assert float(engines[0].loss(batch)) == float(engines[1].loss(batch))
    assert float(engines[0].forward_backward(batch)) == pytest.approx(sparse_loss), "and then it trains by it again"
