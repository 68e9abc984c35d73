"""Stochastic depth, an option of every scheme: samples that skip sublayers (Huang et al. 2016)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nlm import SCHEMES, build_model
from nlm.config import Config
from nlm.model import Transformer
from nlm.parallel.recompute import recompute
from nlm.random import mixed, uniform

MakeConfig = Callable[..., Config]


def build(make_config: MakeConfig, scheme: str = "pre_ln", rate: float = 0.5, **model: Any) -> Transformer:
    return build_model(
        make_config({"scheme": {"name": scheme}, "stochastic_depth": rate, "n_layers": 4} | model)
    ).double()


def tokens(rows: int) -> Tensor:
    return torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(0)).expand(rows, -1)


def shaken(model: Transformer) -> Transformer:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def test_random_numbers_are_even_and_independent() -> None:
    """Of neighbouring rows and sublayers."""
    table = torch.stack([uniform(mixed(torch.arange(4000)), torch.tensor(n)) for n in range(20)])  # [20 4000]
    assert table.min() >= 0 and table.max() < 1
    assert (table.mean(1) - 0.5).abs().max() < 0.02 and (table.var(1) - 1 / 12).abs().max() < 0.005
    correlation = torch.corrcoef(table) - torch.eye(20)
    assert correlation.abs().max() < 0.07, "4.4 standard deviations of 1/sqrt(4000)"
    assert torch.corrcoef(torch.stack([table[0, 1:], table[0, :-1]]))[0, 1].abs() < 0.06


@pytest.mark.parametrize("scheme", SCHEMES)
def test_k30_a_sample_has_a_sublayer_or_not(scheme: str, make_config: MakeConfig) -> None:
    """K30: over many samples of the same text, all its tokens skip together; the first layer is never skipped."""
    model = shaken(build(make_config, scheme))
    rows, block = 400, model.blocks["3"]
    residual, branch = (getattr(block, name) for name in (f"{block.names[1]}_residual", block.names[1]))
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).expand(rows, -1, -1)
    keys = mixed(torch.arange(rows))
    if block.names[1] == "attn":
        branch = lambda x, f=branch: f(x, None, None)  # noqa: E731
    y, evaluated = residual(x, branch, None, keys), residual(x, branch, None, None)
    dropped = residual(x, lambda x: 0 * branch(x), None, None) if residual.branch_end is None else x
    without = (y - dropped).abs().amax(dim=(1, 2)) < 1e-12
    assert 0.4 < without.double().mean() < 0.6, "half of the samples"
    kept = y[~without]
    assert (kept - kept[0]).abs().max() < 1e-12
    assert (kept[0] - evaluated[0]).abs().max() > 1e-6 or scheme == "ngpt", "twice the branch; a unit vector stays one"
    first = model.blocks["0"]
    plain, given = (first(x, None, None, k, None)[0] for k in (None, keys))
    assert torch.equal(plain, given)


def test_k30_the_expectation_is_the_evaluation(make_config: MakeConfig) -> None:
    """K30: what is kept is divided by the probability of keeping it."""
    model = shaken(build(make_config, rate=0.75))
    residual, branch = model.blocks["3"].ffn_residual, model.blocks["3"].ffn
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).expand(20_000, -1, -1)
    with torch.no_grad():
        added = residual(x, branch, None, mixed(torch.arange(20_000))) - x
        expected = residual(x[:1], branch, None, None) - x[:1]
    assert (added.mean(0) - expected[0]).abs().max() < 0.03 * expected.abs().max()


def test_the_rate_grows_evenly_over_the_layers(make_config: MakeConfig) -> None:
    model = build(make_config, rate=0.3)
    rates = [[float(r.drop) for r in (b.attn_residual, b.ffn_residual)] for b in model.blocks.values()]
    assert rates == [[pytest.approx(0.1 * l, abs=1e-7)] * 2 for l in range(4)]
    assert not [name for name, _ in build(make_config, rate=0.0).named_buffers() if name.endswith("drop")]


def test_recomputation_drops_the_same(make_config: MakeConfig) -> None:
    model, keys = shaken(build(make_config)), mixed(torch.arange(8))
    x, targets = tokens(8), tokens(8).roll(1, 1)
    plain = torch.autograd.grad(model(x, None, targets, None, keys), list(model.parameters()))
    recompute(model, "block")
    again = torch.autograd.grad(model(x, None, targets, None, keys), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    whole = torch.autograd.grad(model(x, targets=targets), list(model.parameters()))
    assert not all(torch.allclose(a, b) for a, b in zip(plain, whole, strict=True))
