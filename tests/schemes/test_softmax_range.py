"""K25: every softmax there is, at logits of ±10⁴, where exp leaves the range of any float: as in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nlm import SCORES
from nlm.anatomy import Span
from nlm.model import CrossEntropy
from nlm.parallel.tensor import TensorParallel, _CrossEntropy
from nlm.scores import Heads
from nlm.scores.base import document_mask

ROWS, LARGE, SEQ_LEN = 64, 1e4, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of what comes out in that type. The losses, in float32 always, meet the first."""


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def exact_heads(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1 S 1 4] and the logits [S S] of all pairs, which no type here rounds: up to ±10⁴, some of them near."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(2, 1, SEQ_LEN, 1, 4)
    q[..., 0], q[..., 1] = 200 * torch.tensor([1.0, -1.0]).repeat(SEQ_LEN // 2)[:, None], 2.0
    k[..., 0] = 50 * torch.randint(-2, 3, (SEQ_LEN, 1), generator=generator)
    k[..., 1] = torch.randint(-8, 9, (SEQ_LEN, 1), generator=generator) / 4
    v = torch.randn(1, SEQ_LEN, 1, 4, generator=generator).to(dtype)
    logits = q[0, :, 0].double() @ k[0, :, 0].double().T / 2  # sqrt(Dh) = 2
    assert logits.abs().max() > LARGE and torch.equal(logits, logits.float().double())
    return q.to(dtype), k.to(dtype), v, logits


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize(("name", "fields"), [("softmax", {}), ("top_k", {"k": SEQ_LEN})], ids=["fused", "weighed"])
def test_attention(name: str, fields: dict[str, int], masked: bool, dtype: torch.dtype) -> None:
    score = SCORES[name](Heads(Span.whole(1), Span.whole(1), 4, SEQ_LEN, 1e-12, TensorParallel()), **fields)
    q, k, v, logits = exact_heads(dtype)
    if name == "top_k":  # its product of q and k is of their own type
        logits = logits.to(dtype).double()
    segments = torch.arange(SEQ_LEN)[None] // (6 if masked else SEQ_LEN)
    mask = document_mask(segments)
    exact = v.double().requires_grad_()
    weights = logits.masked_fill(~mask[0, 0], -torch.inf).softmax(-1)
    expected = torch.einsum("st,bthd->bshd", weights, exact)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = score.attend(*leaves, mask if masked else None)  # type: ignore[operator]
    near(out, expected, TOLERANCE[dtype])
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, seed)
    assert all(gradient.isfinite().all() for gradient in gradients)
    # The fused backward makes the weights anew from the logarithm of their sum, in float32 good to LARGE · 2⁻²⁴.
    tolerance = max(TOLERANCE[dtype], LARGE * 2**-24)
    near(gradients[2], torch.autograd.grad(expected, exact, seed.double())[0], tolerance)


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """The name of a group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def of_model(sparse_k: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    module = CrossEntropy(Span.whole(ROWS), TensorParallel())
    module.sparse_k = sparse_k
    return lambda logits, targets: module(logits[None], targets[None])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["whole", "sparse", "tensor parallel"])
@pytest.mark.parametrize("size", [LARGE, 3.0])
def test_cross_entropy(kind: str, dtype: torch.dtype, size: float, alone: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (size * (2 * torch.rand(ROWS, ROWS, generator=generator) - 1)).to(dtype)
    logits[0], logits[1], logits[2, 1:] = size, -size, -size  # all equal; and one that has it all
    targets = torch.randint(ROWS, (ROWS,), generator=generator)
    exact = logits.double().requires_grad_()
    largest = exact.amax(1, keepdim=True)
    expected = ((exact - largest).exp().sum(1).log() + (largest - exact.gather(1, targets[:, None]))[:, 0]).sum()
    logits.requires_grad_()
    match kind:
        case "tensor parallel":
            loss = _CrossEntropy.apply(logits.float(), targets, Span.whole(logits.shape[1]), alone, 0.0)
        case _:
            loss = of_model(ROWS if kind == "sparse" else None)(logits, targets)
    assert loss.dtype == torch.float32
    near(loss, expected, TOLERANCE[torch.float32])
    near(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, exact)[0], TOLERANCE[dtype])
