"""How often blocks are computed again."""

from collections.abc import Callable

import pytest
import torch

from nlm.build import build_model
from nlm.config import Config
from nlm.parallel.recompute import recompute, times_again


@pytest.mark.parametrize("n_layers", [1, 2, 7, 16])
@pytest.mark.parametrize("mode", ["none", "selective", "block", "offload", "sqrt", "nested"])
def test_blocks_are_computed_as_often_as_is_said(mode: str, n_layers: int, make_config: Callable[..., Config]) -> None:
    model, calls = build_model(make_config({"n_layers": n_layers})), list[int]()
    recompute(model, mode)
    for layer, block in enumerate(model.blocks.values()):
        block.attn.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
    loss = model(torch.arange(12).view(1, 12)).sum()
    assert calls == list(range(n_layers))
    loss.backward()
    assert len(calls) - n_layers == times_again(mode, n_layers) * n_layers
