"""How often blocks are computed again."""

from collections.abc import Callable

import pytest
import torch

from nlm.build import build_model
from nlm.config import Config, ConfigError
from nlm.parallel.recompute import recompute, times_again
from nlm.plan.choose import settled
from nlm.plan.plan import plan
from nlm.plan.report import text


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


CPU = torch.device("cpu")


def test_auto_is_the_first_that_fits(make_config: Callable[..., Config]) -> None:
    def deep(**parallel: object) -> Config:
        return make_config({"n_layers": 400}, train={"batch_tokens": 1200, "seq_len": 12}, parallel=parallel)

    def auto(gib: float) -> Config:
        return deep(recompute="auto", memory_gib=gib)

    needs = {mode: memory.sum() / 2**30 for mode, memory in plan(deep()).memory.items()}
    assert list(needs) == ["none", "selective", "block", "sqrt", "offload", "nested"]
    for mode in ("none", "selective", "block", "sqrt", "nested"):
        assert settled(auto(needs[mode] * 1.001), CPU).parallel.recompute == mode
    assert plan(auto(needs["nested"] * 1.001)).config.parallel.recompute == "offload", "of a GPU"
    with pytest.raises(ValueError, match=r"at most 0\.00 GiB, planned are .* under 'none', .* under 'nested'"):
        settled(auto(0.001), CPU)
    with pytest.raises(ValueError, match=r"parallel\.memory_gib: expected what"):
        settled(make_config(parallel={"recompute": "auto"}), CPU)
    assert "recompute" in text(plan(auto(1.0)))


def test_memory_is_given_to_auto_only(make_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"memory_gib: is for parallel\.recompute = 'auto', got 'block'"):
        make_config(parallel={"recompute": "block", "memory_gib": 1.0})
    with pytest.raises(ConfigError, match="of DeepSpeed no memory is planned"):
        make_config(parallel={"recompute": "auto", "engine": "deepspeed", "zero": 1, "dp_shard": 2})
