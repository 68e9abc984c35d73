"""What holds for every scheme, norm, score and weight norm. A new entry of a registry is tested by being there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from entries import COMBINATIONS, ENCODERS, MIXED
from poison import assert_init_fills_everything
from schemes_table import compiled_difference
from torch import Tensor

from nlm import SCHEMES, build_model
from nlm.anatomy import MATRICES, Role
from nlm.build import build_engine
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.model import Transformer, weights
from nlm.optim import projection
from nlm.parallel.compile import compile_model
from nlm.parallel.recompute import recompute
from nlm.signals import Signals

MakeConfig = Callable[..., Config]


PLAIN = {name: model for name, model in COMBINATIONS.items() if name not in MIXED}
"""Every entry in plain company; the mixed models are compiled, resumed and divided."""


@pytest.fixture(params=PLAIN.values(), ids=PLAIN.keys())
def config(request: pytest.FixtureRequest, make_config: MakeConfig) -> Config:
    return make_config(request.param | {"activation": "swiglu", "n_kv_heads": 2, "n_layers": 4})


def tokens(config: Config, rows: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.model.vocab_size, (rows, config.train.seq_len), generator=generator)


def loss(model: Transformer, x: Tensor) -> Tensor:
    return model(x).logsumexp(-1).mean() - model(x).gather(-1, x[..., None]).mean()


def shake(model: Transformer) -> Transformer:
    """Moves every parameter off its initial value, so that a part that is not used, or used twice, shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 * (parameter.abs().mean() + 0.1)
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def test_no_future_leaks(config: Config) -> None:
    """K15: nothing that comes later changes the logits of position t, and their gradient with respect to it is exactly
    0; to what came before, and in an encoder to anything, it is not."""
    model = shake(build_model(config)).double()
    if config.model.is_encoder:
        model.eval()  # the statistics of a batch know all of its rows
    inputs: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    model.embed.register_forward_hook(keep)
    logits = model(tokens(config))
    t = config.train.seq_len // 2
    (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), inputs[0])
    seen = config.train.seq_len if config.model.is_encoder else t + 1
    assert (gradient[0, seen:] == 0).all() and (gradient[1] == 0).all()
    assert gradient[0, :seen].abs().amax(-1).min() > 0
    later = tokens(config, seed=1)
    later[0, :seen] = tokens(config)[0, :seen]
    assert torch.equal(model(later)[0, :seen], logits[0, :seen])


def test_init_fills_everything(config: Config) -> None:
    assert_init_fills_everything(config)


def test_weights_and_groups_cover_every_parameter_once(config: Config) -> None:
    model = build_model(config)
    ours = [(name, parameter) for name, parameter, _ in weights(model)]
    assert [(n, id(p)) for n, p in ours] == [(n, id(p)) for n, p in model.named_parameters()]
    engine = build_engine(config, Mesh())
    grouped = [p.data_ptr() for group in engine.optimizer.adamw.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(p.data_ptr() for p in engine.models[0].parameters())


def test_only_matrices_decay(config: Config) -> None:
    """K29: norms, biases and learned scales are never decayed, but where a scheme's authors do."""
    model = build_model(config)
    for name, _, weight in weights(model):
        decay = model.scheme.group(weight).weight_decay
        if model.config.scheme.name == "olmo2":
            assert decay == (weight.role is not Role.EMBED), name
        elif weight.role not in MATRICES:
            assert decay == 0, name


def test_weights_know_their_site(config: Config) -> None:
    for name, parameter, weight in weights(build_model(config)):
        assert weight.shape == tuple(parameter.shape)
        if name.startswith("blocks."):
            _, layer, sublayer, *_ = name.split(".")
            assert weight.site is not None
            assert (weight.site.layer, weight.site.kind) == (
                int(layer),
                sublayer.removesuffix("_residual").removesuffix("_2"),
            )
        else:
            assert weight.site is None, name


def test_one_graph_serves_all_blocks(config: Config) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, x = shake(build_model(config)), tokens(config)
    expected = model(x)
    compile_model(model, backend=count)
    assert torch.allclose(model(x), expected, atol=1e-5)
    kinds = len({model.scheme.sublayers(layer) for layer in range(config.model.n_layers)})
    assert len(graphs) == kinds, f"{len(graphs)} graphs for {config.model.n_layers} blocks"
    model.signals = Signals(queries=4)
    model(x)
    assert len(graphs) == 2 * kinds, "recording takes one graph more, for all blocks alike"
    shows = ["aminmax" in str(graph.graph) for graph in graphs]
    assert shows == [False] * kinds + [True] * kinds, "and where nothing is recorded nothing of it is compiled"


def test_recompute_changes_nothing(config: Config) -> None:
    model, x = shake(build_model(config)), tokens(config)
    plain, straight = torch.autograd.grad(loss(model, x), list(model.parameters())), model.through
    for mode in ("block", "offload", "sqrt", "nested", "selective"):
        model.through = straight
        recompute(model, mode)
        again = torch.autograd.grad(loss(model, x), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), mode


def test_recording_changes_nothing(config: Config) -> None:
    model, x = shake(build_model(config)), tokens(config)
    plain, model.signals = model(x), Signals(queries=4)
    assert torch.equal(model(x), plain)
    rms = model.signals.rms()
    assert rms.shape == (config.model.n_layers, 2, 3) and rms.isfinite().all()
    assert torch.equal(rms[:, 0, 2], rms[:, 1, 0]), "attention's stream out is the FFN's stream in"
    assert torch.equal(rms[:-1, 1, 2], rms[1:, 0, 0])


def test_every_parameter_learns(config: Config) -> None:
    """All gradients are there, and some steps on one batch lower its loss, in bf16 too."""
    for precision in (torch.float32, torch.bfloat16):
        engine, x = build_engine(config, Mesh()), tokens(config)
        model = engine.models[0]
        losses, moved = [], torch.zeros(len(list(model.parameters())), dtype=torch.bool)
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
                logits = model(x)
            value = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), x[:, 1:].flatten())
            value.backward()
            _, norms = engine.clip()
            moved |= norms > 0  # branches that begin at 0 have no gradient in the first step
            engine.update(config.optim.lr)
            losses.append(value.item())
        assert not [name for (name, _), used in zip(model.named_parameters(), moved, strict=True) if not used]
        assert losses[-1] < losses[0]


def test_projection_holds(config: Config) -> None:
    """What a scheme projects has unit norm along its axis after a step, and only that."""
    engine = build_engine(config, Mesh())
    model = engine.models[0]
    projected = [(w.role, p, axis) for _, p, w in weights(model) if (axis := model.scheme.unit_axis(w)) is not None]
    assert {role for role, _, _ in projected} in (set(), set(MATRICES))

    def off() -> list[float]:
        return [float((p.detach().norm(dim=axis) - 1).abs().max()) for _, p, axis in projected]

    assert all(distance < 1e-6 for distance in off()), "at the start"
    loss(model, tokens(config)).backward()
    for h in engine.pieces.held:
        h.tensor.grad = h.parameter.grad
    engine.optimizer.adamw.step()
    assert all(distance > 1e-4 for distance in off())
    projection(engine.pieces)()
    assert all(distance < 1e-6 for distance in off())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_init_depends_on_seed_and_name_only(scheme: str, make_config: MakeConfig) -> None:
    """The same weight of a deeper model with another vocabulary is drawn alike, up to the scheme's scale."""
    small = build_model(make_config({"scheme": {"name": scheme}}))
    large = build_model(make_config({"scheme": {"name": scheme}, "n_layers": 5, "vocab_size": 50}))
    ours, theirs = small.get_parameter("blocks.2.ffn.w_up.weight"), large.get_parameter("blocks.2.ffn.w_up.weight")
    assert torch.allclose(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6)
    again = build_model(make_config({"scheme": {"name": scheme}}), seed=1).get_parameter("blocks.2.ffn.w_up.weight")
    for other in (again, small.get_parameter("blocks.1.ffn.w_up.weight")):
        assert abs((ours * other).sum()) < 0.1 * ours.norm() * other.norm()


SLOW = {name for i, name in enumerate(MIXED) if i % 5 == 0} | {"encoder-sub_ln-unified-softmax"}
"""Inductor's C++ compiler takes half a minute a model; `tools/schemes_table.py --again compile` has them all."""


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        pytest.param(model, backend, id=f"{name}-{backend}")
        for name, model in (MIXED | ENCODERS).items()
        for backend in ("aot_eager", "inductor")
        if backend == "aot_eager" or name in SLOW
    ],
)
def test_compiled_gradients_are_the_eager_ones(model: dict[str, Any], backend: str, make_config: MakeConfig) -> None:
    config = make_config(model | {"activation": "swiglu", "n_kv_heads": 2, "n_layers": 2})
    assert compiled_difference(config, backend) < 1e-9
