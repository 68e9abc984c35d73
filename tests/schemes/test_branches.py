"""What the schemes without norms, or with scaled branches, claim: what they start as, and how they grow with depth."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from measures import hidden, loss, slope, update
from torch import Tensor

from nlm import build_model
from nlm.activations import ACTIVATIONS, GATED, unit_variance_gain
from nlm.anatomy import MATRICES, READS, WRITES, Role
from nlm.build import build_engine
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.model import Transformer, weights

Build = Callable[..., Transformer]
MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("scheme", ["rezero", "skipinit", "fixup", "nf"])
def test_k18_blocks_start_as_the_identity(build: Build, text: Tensor, scheme: str) -> None:
    """K18: exactly; but for Fixup's, branch weights get no gradient in the first step, the numbers on branches do."""
    model = build(scheme, 6)
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    for block in model.blocks.values():
        assert torch.equal(block(x, None, None, None, None)[0], x)
    if scheme == "fixup":
        assert model(text[:, :-1]).abs().max() == 0, "the head starts at 0"
        return
    loss(model, text).backward()
    for name, parameter, weight in weights(model):
        if weight.site and weight.role in MATRICES:
            assert parameter.grad.abs().max() == 0, name
        elif name.endswith(("residual.alpha", "skip_gain")):
            assert parameter.grad.abs().max() > 0, name


def test_rezero_has_one_number_a_layer(build: Build) -> None:
    model = build("rezero", 3)
    scales = [name for name, _, weight in weights(model) if weight.role is Role.SCALE]
    assert scales == [f"blocks.{layer}.attn_residual.alpha" for layer in range(3)]
    block = model.blocks["1"]
    assert block.ffn_residual.part("alpha") is block.attn_residual.alpha


def test_layers_of_brainformer(build: Build) -> None:
    """Attention, FFN, FFN, attention and four FFNs, again and again."""
    order = [name for block in build("brainformer", 6).blocks.values() for name in block.names]
    assert order == ["attn", "ffn", "ffn", "attn", "ffn", "ffn_2", "ffn", "ffn_2", "attn", "ffn", "ffn", "attn"]


def with_unit_embeddings(model: Transformer) -> Transformer:
    """As depth was measured with; embeddings here start at 1/sqrt(D)."""
    with torch.no_grad():
        for embedding in (model.embed, model.position):
            embedding.weight.mul_(model.config.dim**0.5)
    return model


def growth(build: Build, rows: Tensor, scheme: str) -> float:
    """Of the stream's RMS from 4 layers to 64."""
    fields = {"residual_init": False} if scheme == "pre_ln" else {}
    shallow, deep = (
        hidden(with_unit_embeddings(build(scheme, n, **fields)), rows).square().mean().sqrt() for n in (4, 64)
    )
    return float(deep / shallow)


def test_k19_branch_scaling_keeps_the_stream(build: Build, text: Tensor) -> None:
    """K19: its RMS is the same within 10 % at 4 and at 64 layers, where Pre-LN's grows as sqrt(L)."""
    assert 0.9 < growth(build, text, "branch_scaled") < 1.1
    assert growth(build, text, "pre_ln") > 2.5


def test_layernorm_scaling_slows_the_stream(build: Build, text: Tensor) -> None:
    """Its variance grows as Σ 1/l, about ln L, where Pre-LN's grows as L."""
    assert growth(build, text, "layernorm_scaling") < 1.5


@pytest.mark.parametrize(
    ("step", "undo", "expected"),
    [(torch.sign, 0.0, 0.0), (torch.sign, 0.5, 0.5), (torch.clone, 0.5, 0.0)],
    ids=["sign, depth-µP", "sign, one rate", "SGD, one rate"],
)
def test_k19_updates_over_depth(
    build: Build, text: Tensor, step: Callable[[Tensor], Tensor], undo: float, expected: float
) -> None:
    """K19: at one rate for all the sign step grows as sqrt(L) and SGD's not; with the scheme's multipliers the sign
    step does not either."""
    depths = [8, 16, 32, 64]
    updates = [
        update(with_unit_embeddings(build("branch_scaled", n)), text, lambda g, n=n: step(g) * n**undo) for n in depths
    ]
    assert slope(depths, updates) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_units_have_unit_variance(activation: str) -> None:
    """As by the gains that are published for ReLU, GELU and SiLU (Brock et al. 2021), which are drawn, not computed."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 2_000_000, generator=generator)
    y = ACTIVATIONS[activation](gate) * up if activation in GATED else ACTIVATIONS[activation](gate)
    assert float((y * unit_variance_gain(activation)).var()) == pytest.approx(1, abs=0.01)
    published = {"relu": 1.7139588594, "gelu": 1.7015043497, "silu": 1.7881293297}
    if activation in published:
        assert unit_variance_gain(activation) == pytest.approx(published[activation], rel=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_nf_branches_keep_unit_variance(build: Build, activation: str) -> None:
    """Of an FFN; attention averages values, whose variance is then less. β is the std after so many such branches."""
    model = build("nf", 3, dim=256, ffn_dim=1024, activation=activation, alpha=0.5)
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    for layer, block in enumerate(model.blocks.values()):
        assert float(block.ffn(x).var()) == pytest.approx(1, abs=0.1)
        assert float(block.ffn_residual.beta) == pytest.approx((1 + 0.25 * (2 * layer + 1)) ** 0.5)


@pytest.mark.parametrize(("n_layers", "factor"), [(6, 0.67 * 6**-0.25), (200, 0.67 * 200**-0.25)])
def test_t_fixup_constants(build: Build, n_layers: int, factor: float) -> None:
    model = build("t_fixup", n_layers, dim=16, ffn_dim=64)
    std = {w.role: model.scheme.std(w) for _, _, w in weights(model) if w.role in MATRICES}
    for role in (Role.V, Role.O):
        assert std[role] / std[Role.Q] == pytest.approx(factor)
    assert std[Role.EMBED] == pytest.approx(16**-0.5 * (9 * n_layers) ** -0.25)
    assert std[Role.HEAD] == pytest.approx(16**-0.5)


def test_fixup_constants(build: Build) -> None:
    model = build("fixup", 32, dim=16, ffn_dim=16)
    std = {w.role: model.scheme.std(w) for _, _, w in weights(model) if w.role in MATRICES}
    assert std[Role.Q] == pytest.approx(16**-0.5 * 64 ** (-1 / 6)) and std[Role.UP] == pytest.approx(16**-0.5 / 8)
    assert {std[role] for role in (*WRITES, Role.HEAD)} == {0.0}


@pytest.mark.parametrize(("n_layers", "gamma"), [(12, 0.1), (24, 1e-5), (100, 1e-6)])
def test_layerscale_starts_smaller_in_deeper_models(build: Build, n_layers: int, gamma: float) -> None:
    model = build("layerscale", n_layers, dim=16, ffn_dim=16)
    gains = [p for name, p, _ in weights(model) if name.endswith("gamma")]
    assert len(gains) == 2 * n_layers
    assert all((p == torch.tensor(gamma)).all() for p in gains)


def test_fixnorm_keeps_the_words_on_a_sphere(build: Build, text: Tensor) -> None:
    """Logits are bounded by the final g times the length 1 of the token vectors, whatever these are stored as."""
    model = build("without_tears", 3, norm="scalenorm")
    with torch.no_grad():
        logits = model(text[:, :-1])
        model.head.weight *= torch.logspace(-2, 2, 257)[:, None]
        model.embed.weight *= 7
        again = model(text[:, :-1])
    assert torch.allclose(logits, again, atol=1e-4)
    assert logits.abs().max() <= 64**0.5 + 1e-4


def test_small_init(build: Build) -> None:
    model = build("without_tears", 2)
    for _, _, weight in weights(model):
        if weight.site and weight.role in READS | WRITES:
            attention = (2 / (5 * 64)) ** 0.5  # which is xavier's of the FFN whose width is 4 D
            assert model.scheme.std(weight) == pytest.approx(attention)


@pytest.mark.parametrize(
    ("scheme", "fields"), [("t_fixup", {}), ("rezero", {}), ("skipinit", {}), ("nf", {}), ("branch_scaled", {})]
)
def test_schemes_that_need_no_warmup_learn_at_depth(
    scheme: str,
    fields: dict[str, Any],
    make_config: MakeConfig,
    text: Tensor,
) -> None:
    """48 layers, no warmup, some without any norm: the loss on one batch falls."""
    model = {"scheme": {"name": scheme} | fields, "n_layers": 48, "vocab_size": 257, "dim": 32, "ffn_dim": 64}
    engine = build_engine(make_config(model, train={"seq_len": 64, "batch_tokens": 64}), Mesh())
    losses = []
    for _ in range(32):
        value = loss(engine.models[0], text)
        value.backward()
        engine.clip()
        engine.update(2e-3)
        losses.append(value.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3


def test_without_any_care_depth_is_the_end(make_config: MakeConfig, text: Tensor) -> None:
    """Plain sums of unit-gain branches without norms: 64 layers overflow (what all of these schemes are for)."""
    table = {"scheme": {"name": "norm_free", "init_std": 0.2}, "n_layers": 64, "vocab_size": 257}
    model = build_model(make_config(table, train={"seq_len": 64, "batch_tokens": 64}))
    assert not hidden(model, text).square().mean().sqrt() < 1e6
