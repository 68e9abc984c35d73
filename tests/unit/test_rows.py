"""The loss of some rows at a time, and its gradients, against those of all rows at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nlm.anatomy import IGNORED
from nlm.build import build_engine
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.model import Transformer

MakeConfig = Callable[..., Config]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "biases": {"bias": True, "head_bias": True},
    "ngpt": {"scheme": {"name": "ngpt"}},
    "capped": {"logits_cap": 3.0},
    "weight norm": {"weight_norm": {"name": "weight_norm", "roles": ["head"]}},
}


def model_of(make_config: MakeConfig, model: dict[str, Any], rows: int, **train: Any) -> Transformer:
    config = make_config(model, train=train, parallel={"loss_rows": rows})
    return build_engine(config, Mesh()).models[0]


def loss_and_gradients(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(tokens, targets=targets)
    (loss * 0.3).backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [5, 12, 47], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("name", HEADS)
def test_rows_change_nothing(name: str, rows: int, make_config: MakeConfig) -> None:
    """Of 48 positions, some of whose targets are ignored."""
    tokens, targets = torch.randint(96, (2, 4, 12))
    targets[1, :7] = IGNORED
    some, all_at_once = (model_of(make_config, HEADS[name], n, precision="fp64") for n in (rows, 48))
    loss, gradients = loss_and_gradients(some, tokens, targets)
    expected_loss, expected = loss_and_gradients(all_at_once, tokens, targets)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=0)
    assert gradients.keys() == expected.keys() and len(expected) == len(list(some.parameters()))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(some(tokens, targets=targets), expected_loss, rtol=1e-13, atol=0)


def test_sparse_softmax_and_bf16(make_config: MakeConfig) -> None:
    tokens, targets = torch.randint(96, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    for train in ({"sparse_softmax_k": 5}, {"precision": "bf16"}):
        some, all_at_once = (model_of(make_config, {}, n, **train) for n in (16, 48))
        loss, gradients = loss_and_gradients(some, tokens, targets)
        expected_loss, expected = loss_and_gradients(all_at_once, tokens, targets)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(
                gradients[parameter], gradient, rtol=1e-2, atol=1e-2 * float(gradient.abs().max())
            )


def test_no_logits_of_all_positions(make_config: MakeConfig) -> None:
    """Nothing of their size is ever allocated, forward or backward."""
    config = make_config({"vocab_size": 4096}, train={"batch_tokens": 1200, "seq_len": 12}, parallel={"loss_rows": 60})
    model = build_engine(config, Mesh()).models[0]
    tokens, targets = torch.randint(4096, (2, 100, 12))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        model(tokens, targets=targets).backward()
    assert largest == 60 * 4096
