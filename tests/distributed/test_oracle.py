"""Tensor parallelism against an independent one: megatron-core's layers, on the same weights and two ranks."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron_oracle import mega_block
from ranks import run_ranks

from nlm import build_model
from nlm.build import design
from nlm.config import Config
from nlm.model import held
from nlm.parallel.tensor import TensorParallel


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_tensor_parallel_is_megatrons(activation: str, sequence: bool, make_config: Callable[..., Config]) -> None:
    """Logits, loss and the gradients of whole pre-norm models, in float64; biases and grouped queries too."""
    config = make_config({"position": "none", "activation": activation, "bias": True, "n_kv_heads": 2})
    run_ranks(2, compare, config.model_dump(exclude_none=True), sequence)


def compare(rank: int, table: dict[str, object], sequence: bool) -> None:
    from nlm.build import parse_config

    config, group = parse_config(table), dist.new_group()
    whole = build_model(config).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in whole.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    ours = design(config, TensorParallel(group, sequence)).double().to_empty(device="cpu")
    for h in held(ours):
        h.tensor.copy_(h.part_of(weights[h.name]))
    tokens, targets = torch.randint(config.model.vocab_size, (2, 4, 12), generator=generator)
    logits = ours(tokens)
    loss = ours.cross_entropy(logits, targets)
    loss.backward()

    activation = F.silu if config.model.gated else F.gelu
    expected = mega_block(weights, tokens, targets, group, config.model.head_dim, sequence, activation)
    assert torch.allclose(logits, expected[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(loss, expected[1], rtol=1e-12)
    seen = 0
    for h in held(ours):
        gradient = h.parameter.grad
        assert gradient is not None
        if sequence and not h.divided:  # which Pieces.reduce_gradients does in a run
            dist.all_reduce(gradient, group=group)
        assert torch.allclose(gradient, expected[2][h.name], rtol=1e-9, atol=1e-12), h.name
        seen += 1
    assert seen == len(expected[2]) == len(weights)


def test_the_loss_of_large_logits_is_finite() -> None:
    run_ranks(2, compare_large)


def compare_large(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = 1e3 * torch.randn(8, 10, generator=generator)
    targets = torch.randint(10, (8,), generator=generator)
    tp = TensorParallel(dist.new_group())
    logits = whole.chunk(2, dim=1)[rank].clone()
    loss = tp.cross_entropy(logits, targets, tp.span("vocab", 10))
    torch.testing.assert_close(loss, F.cross_entropy(whole, targets, reduction="sum"))
