"""Label smoothing: torch's, on one rank and over a divided vocabulary; validation goes by the true loss."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from nlm.anatomy import IGNORED, Span
from nlm.batch import Batch
from nlm.build import build_engine, parse_config
from nlm.config import Config, ConfigError
from nlm.mesh import Mesh
from nlm.parallel.tensor import TensorParallel

VOCAB, SHARE = 31, 0.1  # of a vocabulary that two ranks cannot halve


def rows() -> tuple[Tensor, Tensor]:
    """Logits [N V] as large as an untrained model may have, targets [N], every fifth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(50, VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (50,), generator=generator)
    return logits.requires_grad_(), targets.where(torch.arange(50) % 5 > 0, IGNORED)


def expected() -> tuple[Tensor, Tensor]:
    """By the definition: the loss [] of targets of which SHARE is anything, and its gradient [N V]."""
    logits, targets = rows()
    counted = targets != IGNORED
    aims = F.one_hot(targets[counted], VOCAB).double() * (1 - SHARE) + SHARE / VOCAB
    loss = -(aims * logits[counted].log_softmax(1)).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def agrees(tp: TensorParallel) -> None:
    logits, targets = rows()
    part = tp.span("vocab", VOCAB)
    mine = logits.detach()[:, part.start : part.stop].clone().requires_grad_()
    loss = tp.cross_entropy(mine, targets, part, SHARE)
    (gradient,) = torch.autograd.grad(3 * loss, mine)
    true_loss, true_gradient = expected()
    torch.testing.assert_close(loss.detach(), true_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, 3 * true_gradient[:, part.start : part.stop], rtol=1e-11, atol=1e-13)


def rank_agrees(rank: int) -> None:
    agrees(TensorParallel(dist.group.WORLD))


def test_one_rank_agrees_with_the_definition_and_torch() -> None:
    agrees(TensorParallel())
    logits, targets = rows()
    ours = TensorParallel().cross_entropy(logits, targets, Span.whole(VOCAB), SHARE)
    assert ours.item() == F.cross_entropy(logits, targets, reduction="sum", label_smoothing=SHARE).item()


def test_two_ranks_agree() -> None:
    run_ranks(2, rank_agrees)


def test_validation_goes_by_the_true_loss(make_config: Callable[..., Config]) -> None:
    engines = [build_engine(make_config(train={"label_smoothing": share}), Mesh()) for share in (0.5, 0.0)]
    batch = Batch(torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(0)))
    smooth, true = (engine.forward_backward(batch).item() for engine in engines)
    assert abs(smooth - true) > 1e-3
    assert engines[0].loss(batch).item() == engines[1].loss(batch).item()


def test_it_is_of_the_whole_vocabulary(make_config: Callable[..., Config]) -> None:
    table = make_config().model_dump(exclude_none=True)
    table["train"] |= {"label_smoothing": 0.1, "sparse_softmax_k": 5}
    with pytest.raises(ConfigError, match=r"train\.label_smoothing: of tokens that train\.sparse_softmax_k leaves out"):
        parse_config(table)
