"""An encoder with its decoder: what holds for every scheme that defines both stacks; the others are refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import Pairs, pairs
from poison import assert_init_fills_everything
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from transcription import difference

import nlm.build
import nlm.train
from nlm import NORMS, SCHEMES, SCORES, build_model
from nlm.anatomy import IGNORED, MATRICES, Role, Weight
from nlm.batch import Batch
from nlm.build import build_engine, design
from nlm.compare import differences
from nlm.config import Config, ConfigError
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.model import Part, Transformer, weights
from nlm.norms.batch import BatchStatistics
from nlm.parallel.compile import compile_model
from nlm.parallel.pipeline import split
from nlm.parallel.recompute import recompute
from nlm.plan.flops import flops_per_token
from nlm.plan.plan import parameters_by_role, plan
from nlm.signals import Signals
from nlm.statistics.forward import ForwardStatistics
from nlm.statistics.record import LayerStatistics
from nlm.statistics.store import read_layers
from nlm.train import train

MakeConfig = Callable[..., Config]
N, M, S, T = 2, 3, 12, 7
"""Layers of the encoder and of the decoder; lengths of targets and of sources."""
FIELDS = {"ngpt": {"alpha": 0.05}, "layerscale": {"gamma": 0.1}}
LACKING = {"brainformer", "branch_scaled", "layernorm_scaling"}
AUTO = {"recompute": "auto", "memory_gib": 1.0}
DEFINED = [name for name in SCHEMES if name not in LACKING]


@pytest.fixture
def two_stacks(make_config: MakeConfig) -> MakeConfig:
    def make(scheme: str = "pre_ln", model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
        keys = {"architecture": "encoder_decoder", "n_layers": M, "n_encoder_layers": N, "activation": "swiglu"}
        keys |= {"scheme": {"name": scheme} | FIELDS.get(scheme, {}), "n_kv_heads": 2}
        sections["train"] = {"source_len": T} | sections.get("train", {})
        return make_config(keys | (model or {}), **sections)

    return make


@pytest.fixture(params=DEFINED)
def config(request: pytest.FixtureRequest, two_stacks: MakeConfig) -> Config:
    return two_stacks(request.param)


def batch(config: Config, rows: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.model.n_tokens, (rows, T + S + 1), generator=generator)
    return pairs(Batch(text), T, config.model.padding)


def shaken(model: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 * (parameter.abs().mean() + 0.1)
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def loss(model: Transformer, rows: Batch) -> Tensor:
    return model(*rows.arguments()) / rows.n_targets()


def test_equations(config: Config) -> None:
    assert difference(config) < 1e-9


@pytest.mark.parametrize("score", SCORES)
def test_equations_of_scores(score: str, two_stacks: MakeConfig) -> None:
    assert difference(two_stacks(model={"attention": {"score": score}})) < 1e-9


@pytest.mark.parametrize(
    "model",
    [
        *({"position": name} for name in ("rope_interleaved", "learned", "sinusoidal", "none")),
        *({"bias": True, "norm": name} for name in NORMS),
        {"tied": True},
        {"n_encoder_layers": 4},
        {"logits_cap": 2.0},
        {"weight_norm": "weight_norm"},
    ],
    ids=str,
)
def test_equations_of_other_keys(model: dict[str, Any], two_stacks: MakeConfig) -> None:
    try:
        config = two_stacks("peri_ln", model)
    except ConfigError as error:
        assert "takes statistics of all positions of a batch" in str(error)
        assert issubclass(NORMS[model["norm"]], BatchStatistics)
        return
    assert difference(config) < 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_known_of_one_stack_only_is_refused(scheme: str, make_config: MakeConfig) -> None:
    model = {"architecture": "encoder_decoder", "scheme": {"name": scheme}}
    if scheme not in LACKING | set(FIELDS):
        assert make_config(model).model.n_encoder_layers == 3
        return
    with pytest.raises(ConfigError, match=f"'encoder_decoder' is not defined by the scheme '{scheme}': ") as error:
        make_config(model)
    for field in FIELDS.get(scheme, {}):
        assert f"set model.scheme.{field}" in str(error.value)


@pytest.mark.parametrize(
    ("model", "sections", "problem"),
    [
        ({"architecture": "decoder"}, {}, "model.n_encoder_layers: is for .* remove it\ntrain.source_len: is for"),
        ({"architecture": "encoder"}, {}, "model.n_encoder_layers: is for .* remove it\ntrain.source_len: is for"),
        ({}, {"data": {"document_mask": True}}, "data.document_mask: is of texts in a row"),
        ({}, {"parallel": {"tp": 2, "sequence_parallel": True}}, "train.source_len: expected a multiple of .* got 7"),
        (
            {},
            {"parallel": {"pp": 6, "microbatches": 6}, "train": {"batch_tokens": 72}},
            "make 6 stages, but there are 5 layers",
        ),
        ({"norm": "batchnorm"}, {}, "model.norm: 'batchnorm' takes statistics of all positions"),
    ],
)
def test_refusals(model: dict[str, Any], sections: dict[str, Any], problem: str, two_stacks: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=problem):
        two_stacks("pre_ln", model, **sections)


def test_a_source_is_for_two_stacks(two_stacks: MakeConfig, make_config: MakeConfig) -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a source beside the target"):
        build_model(two_stacks())(tokens)
    with pytest.raises(ValueError, match="expected no source"):
        build_model(make_config())(tokens, tokens)
    with pytest.raises(ValueError, match=r"expected pairs for model\.architecture"):
        RankData(two_stacks(), Mesh())


def test_names(two_stacks: MakeConfig) -> None:
    names = [name for name, _, _ in weights(build_model(two_stacks("peri_ln", {"position": "learned"})))]
    blocks = [name for name in names if "blocks." in name]
    own, encoders = ({name.split(".")[place] for name in blocks if name.startswith(of)} for place, of in PLACES)
    assert own == {"attn", "cross", "ffn", "attn_residual", "cross_residual", "ffn_residual"}
    assert encoders == {"attn", "ffn", "attn_residual", "ffn_residual"}
    others = {"embed", "position", "stem", "final", "head", "encoder.position", "encoder.stem", "encoder.final"}
    assert {name.rpartition(".")[0] for name in names if name not in blocks} == others


PLACES = ((2, "blocks."), (3, "encoder.blocks."))


def test_what_sees_what(config: Config) -> None:
    """No logits know of later target tokens, nor of a source's padding; of every token of the source they all do."""
    model, rows = shaken(build_model(config)).double(), batch(config)
    inputs, source = (tensor[(rows.source == config.model.padding).any(1)] for tensor in (rows.inputs, rows.source))
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.embed.register_forward_hook(keep)
    logits, t = model(inputs, source), S // 2
    of_target, of_source = torch.autograd.grad(logits[0, t].square().sum(), embedded)
    hook.remove()
    assert len(source) > 1
    real = source[0] != config.model.padding
    assert 0 < real.sum() < T
    assert (of_target[0, t + 1 :] == 0).all() and (of_target[1:] == 0).all() and (of_source[1:] == 0).all()
    assert of_target[0, : t + 1].abs().amax(-1).min() > 0
    assert of_source[0, real].abs().amax(-1).min() > 0 and (of_source[0, ~real] == 0).all()
    later = inputs.clone()
    later[:, t + 1 :] = 0
    assert torch.equal(model(later, source)[:, : t + 1], logits[:, : t + 1])
    longer = torch.nn.functional.pad(source[:1, : int(real.sum())], (0, 1), value=config.model.padding)
    assert torch.allclose(model(inputs[:1], longer), logits[:1], rtol=0, atol=1e-10)


def test_a_source_of_nothing(two_stacks: MakeConfig) -> None:
    config = two_stacks()
    rows = batch(config)
    empty = replace(rows, source=torch.full_like(rows.source, config.model.padding))
    model = build_model(config)
    value = loss(model, empty)
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_is_no_target(two_stacks: MakeConfig) -> None:
    config = two_stacks()
    rows = batch(config)
    padded = rows.tokens[:, 1:] == config.model.padding
    assert padded.any() and torch.equal(rows.targets == IGNORED, padded)
    assert rows.n_targets() == (~padded).sum() and rows.has_ignored
    halves = rows.chunk(2)
    assert all(half.padding == rows.padding for half in halves)
    assert torch.equal(torch.cat([half.source for half in halves]), rows.source)
    other = replace(rows, source=rows.source.flip(1))
    assert rows.digest(0) != other.digest(0)
    assert (halves[0].digest(0) + halves[1].digest(2)) & 0xFFFFFFFF == rows.digest(0)


def test_init_fills_everything(config: Config) -> None:
    assert_init_fills_everything(config)


def test_weights_and_groups_cover_every_parameter_once(config: Config) -> None:
    engine = build_engine(config, Mesh())
    (model,) = engine.models
    assert [(n, id(p)) for n, p, _ in weights(model)] == [(n, id(p)) for n, p in model.named_parameters()]
    grouped = [p.data_ptr() for group in engine.optimizer.adamw.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(p.data_ptr() for p in model.parameters())


def test_weights_know_their_site(two_stacks: MakeConfig) -> None:
    numbers = set()
    for name, _, weight in weights(build_model(two_stacks())):
        assert (weight.n_layers, weight.n_encoder_layers) == (M, N)
        if "blocks." not in name:
            assert weight.site is None
            continue
        stack = "encoder" if name.startswith("encoder.") else "decoder"
        _, layer, sublayer, *_ = name.removeprefix("encoder.").split(".")
        site, n_sublayers = weight.site, 2 if stack == "encoder" else 3
        assert (site.stack, site.layer, site.kind) == (stack, int(layer), sublayer.removesuffix("_residual"))
        assert (site.n_layers, site.other_layers) == ((N, M) if stack == "encoder" else (M, N))
        assert site.before == n_sublayers * site.layer + site.place and site.branches == n_sublayers * site.n_layers
        assert site.other_branches == (3 * M if stack == "encoder" else 2 * N)
        numbers.add((site.number, site.sublayer_number))
    assert sorted(number for _, number in numbers) == list(range(2 * N + 3 * M))
    assert sorted({layer for layer, _ in numbers}) == list(range(N + M))


def xavier(weight: Weight) -> float:
    return sqrt(2 / sum(weight.shape))


GAINED = {Role.V, Role.O, Role.UP, Role.DOWN}
STDS: dict[str, Callable[[Weight, str], float]] = {
    "deepnorm": lambda w, of: 1.0 if w.role not in GAINED else 0.87 * (N**4 * M) ** (-1 / 16) if of == "encoder" else
    (12 * M) ** -0.25,
    "sub_ln": lambda w, of: 1.0 if w.role not in GAINED or w.site.kind == "cross" else sqrt(log(3 * M)) if
    of == "decoder" else sqrt(log(3 * M) * log(2 * N) / 3),
    "t_fixup": lambda w, of: 1.0 if w.role not in GAINED else 0.67 * N**-0.25 if of == "encoder" else (9 * M) ** -0.25,
    "fixup": lambda w, of: 0.0 if w.role in {Role.O, Role.DOWN} else (2 * N + 3 * M) ** -(1 / 2 if
    w.site.kind == "ffn" else 1 / 6),
    "pre_ln": lambda w, of: 1.0 if w.role not in {Role.O, Role.DOWN} else (2 * N if of == "encoder" else 3 * M) ** -0.5,
    "post_ln": lambda w, of: 1.0,
}  # fmt: skip
"""By the papers' formulas for two stacks, in units of Xavier's."""


@pytest.mark.parametrize("scheme", STDS)
def test_stds(scheme: str, two_stacks: MakeConfig) -> None:
    model = build_model(two_stacks(scheme, {"dim": 64, "ffn_dim": 192, "n_kv_heads": 4}))
    for name, matrix, weight in weights(model):
        if weight.site is None or weight.role not in MATRICES:
            continue
        expected = xavier(weight) * STDS[scheme](weight, weight.site.stack)
        if scheme != "post_ln" and weight.role is Role.GATE and scheme != "fixup":
            expected = xavier(weight)
        assert float(matrix.std()) == pytest.approx(expected, rel=0.08), name
    embed = {"t_fixup": (9 * N) ** -0.25}.get(scheme, 1.0) * 64**-0.5
    assert float(model.embed.weight.std()) == pytest.approx(embed, rel=0.05)


def test_a_graph_for_each_kind_of_block(config: Config) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, rows = shaken(build_model(config)), batch(config)
    expected = model(rows.inputs, rows.source)
    compile_model(model, backend=count)
    assert torch.allclose(model(rows.inputs, rows.source), expected, atol=1e-5)
    assert len(graphs) == 2, "one for all layers of the encoder, one for those of the decoder"
    model.signals, model.encoder.signals = Signals(queries=4), Signals(queries=4)
    model(rows.inputs, rows.source)
    assert len(graphs) == 4


@shape_config.patch(use_duck_shape=True)  # compile_model changes it for good
def test_one_graph_is_for_pairs_of_all_shapes(two_stacks: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind of block and of the loss, and another for batches of one row; it computes what there is without."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(nlm.build, "compile_model", partial(compile_model, backend=count))
    data = {"train": {"path": "unused", "languages": ["de", "en"]}}
    configs = [two_stacks("normformer", data=data, parallel={"compile": on}) for on in (False, True)]
    plain, compiled = (build_engine(config, Mesh()) for config in configs)

    def same(n_rows: int, source_len: int, seq_len: int) -> None:
        rows = batch(configs[0], n_rows, seed=n_rows)
        rows = replace(rows, source=rows.source[:, :source_len], tokens=rows.tokens[:, : seq_len + 1])
        expected, found = (float(engine.forward_backward(rows)) for engine in (plain, compiled))
        assert found == pytest.approx(expected, rel=1e-6)
        for ours, theirs in zip(compiled.pieces.held, plain.pieces.held, strict=True):
            a, b = ours.parameter.grad, theirs.parameter.grad
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8, ours.name
            ours.parameter.grad = theirs.parameter.grad = None
        with torch.no_grad():
            assert float(compiled.loss(rows)) == pytest.approx(float(plain.loss(rows)), rel=1e-6)

    for shape in ((6, 6, 6), (4, 7, 12), (5, 3, 7), (2, 7, 2), (12, 2, 12)):
        same(*shape)
    assert len(graphs) == 3 * 2, "one in training, one in validation"
    for shape in ((1, 6, 6), (1, 7, 12)):
        same(*shape)
    assert len(graphs) == 3 * 2 * 2
    for engine in (plain, compiled):
        ForwardStatistics(engine, queries=4).begin()
    for shape in ((6, 6, 6), (4, 7, 12), (5, 3, 7)):
        same(*shape)
    assert len(graphs) == 3 * 2 * 2 + 2 * 2


def test_recompute_changes_nothing(config: Config) -> None:
    model, rows = shaken(build_model(config)), batch(config)
    straight = [stack.through for stack in model.stacks]
    plain = torch.autograd.grad(loss(model, rows), list(model.parameters()))
    for mode in ("block", "offload", "sqrt", "nested", "selective"):
        for stack, through in zip(model.stacks, straight, strict=True):
            stack.through = through
        recompute(model, mode)
        again = torch.autograd.grad(loss(model, rows), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), mode


def test_every_parameter_learns(config: Config) -> None:
    engine, rows = build_engine(config, Mesh()), batch(config)
    losses, moved = [], torch.zeros(len(engine.pieces.weights), dtype=torch.bool)
    for _ in range(8):
        losses.append(float(engine.forward_backward(rows)))
        moved |= engine.clip()[1] > 0
        engine.update(config.optim.lr)
    assert not [name for name, used in zip(engine.pieces.weights, moved, strict=True) if not used]
    assert losses[-1] < losses[0]


def test_statistics_are_those_of_the_tensors(two_stacks: MakeConfig) -> None:
    """Of both stacks, the encoder's layers first, from hooks on the modules, of what is no padding; and recording them
    changes nothing."""
    config = two_stacks("peri_ln", parallel={"microbatches": 2})
    engine, rows = build_engine(config, Mesh()), batch(config)
    (model,) = engine.models
    seen: dict[tuple[str, int], list[Tensor]] = {}
    hooks = [
        getattr(block, name).register_forward_hook(
            lambda _, __, y, at=(name, layer): seen.setdefault(at, []).append(y.detach())
        )
        for layer, block in model.layers.items()
        for name in block.names
    ]
    plain = engine.forward_backward(rows)
    for hook in hooks:
        hook.remove()
    streams: list[Tensor] = []
    for block in model.layers.values():
        hooks.append(block.register_forward_hook(lambda _, x, y: streams.append(torch.stack([x[0], y[0]]).detach())
        if x[0].shape == y[0].shape else None))  # fmt: skip
    recorded = ForwardStatistics(engine, queries=3)
    recorded.begin()
    assert torch.equal(engine.forward_backward(rows), plain)
    vectors = recorded.vectors()
    assert {len(vector) for vector in vectors.values()} == {N + M}
    real, learned = rows.source != config.model.padding, rows.targets >= 0
    assert not real.all() and not learned.all()
    of_block = [torch.cat(streams[l :: N + M], 1)[:, real if l < N else learned] for l in range(N + M)]
    for l, (before, after) in enumerate(of_block):
        assert float(vectors["stream_rms_in/attn"][l]) == pytest.approx(float(before.square().mean().sqrt()), rel=1e-5)
        assert float(vectors["stream_rms_out/ffn"][l]) == pytest.approx(float(after.square().mean().sqrt()), rel=1e-5)
        assert float(vectors["stream_max_out/ffn"][l]) == pytest.approx(float(after.abs().max()), rel=1e-5)
    for name, quantity in (("attn", "branch_rms"), ("cross", "branch_rms"), ("ffn", "branch_rms")):
        for l in range(N + M):
            value = float(vectors[f"{quantity}/{name}"][l])
            assert (value != value) == (name == "cross" and l < N)
            assert value != value or value > 0
    here = slice(N, None)
    assert torch.equal(vectors["stream_rms_in/cross"][here], vectors["stream_rms_out/attn"][here])
    assert torch.equal(vectors["stream_rms_out/cross"][here], vectors["stream_rms_in/ffn"][here])
    keys = real.sum(1).double()[:, None].expand(-1, 3)
    readers, writers = real[:, T - 1 - T // 3 * torch.arange(3)], learned[:, [3, 7, 11]]
    for l in range(N + M):
        uniform = (
            (keys if l < N else torch.tensor([4.0, 8, 12]).expand(4, 3)).log()[readers if l < N else writers].mean()
        )
        assert float(vectors["attention_uniform/attn"][l]) == pytest.approx(float(uniform), rel=1e-6)
    assert vectors["attention_uniform/cross"][here].tolist() == pytest.approx([float(keys.log()[writers].mean())] * M)
    entropy = vectors["attention_entropy/cross"][here]
    assert (entropy > 0).all() and (entropy <= vectors["attention_uniform/cross"][here] + 1e-6).all()
    memory: list[Tensor] = []
    for block in model.blocks.values():
        block.cross.wk.register_forward_hook(lambda _, __, y: memory.append(y.detach()))
    model(rows.inputs, rows.source)
    norms = [float((k[real].unflatten(-1, (2, -1)).square().sum(-1)).mean().sqrt()) for k in memory]
    assert vectors["k_norm/cross"][here].tolist() == pytest.approx(norms, rel=1e-5)


def test_statistics_of_weights_and_spectra(two_stacks: MakeConfig) -> None:
    config = two_stacks(statistics={"spectra_every": 1, "noise_every": 1})
    engine, rows = build_engine(config, Mesh()), batch(config)
    statistics = LayerStatistics(engine, config.statistics)
    statistics.begin(rows, 1)
    engine.forward_backward(rows)
    _, norms = engine.clip()
    statistics.before_update()
    expected = [
        sum(float(p.detach().square().sum()) for name, p in block.named_parameters() if name.endswith("wq.weight"))
        for block in engine.models[0].layers.values()
    ]
    engine.update(1e-3)
    vectors = statistics.vectors(norms)
    assert all(len(vector) == N + M for vector in vectors.values())
    assert vectors["weight_norm/q"].tolist() == pytest.approx([sqrt(square) for square in expected], rel=1e-5)
    for name in ("effective_rank/layer", "grad_norm/layer", "stream_grad_rms/layer", "gradient_noise/layer"):
        assert (vectors[name] == vectors[name]).all() and (vectors[name] != 0).all(), name
    learned = vectors["learned/cross_residual.norm.weight"]
    assert (learned[:N] != learned[:N]).all() and (learned[N:] > 0.9).all()


@pytest.mark.parametrize(("n", "m", "source_len"), [(6, 6, 12), (3, 9, 4), (100, 20, 24), (1, 7, 12)])
@pytest.mark.parametrize("n_stages", [2, 4])
def test_every_layer_is_in_one_stage(n: int, m: int, source_len: int, n_stages: int, two_stacks: MakeConfig) -> None:
    config = two_stacks("pre_ln", {"n_layers": m, "n_encoder_layers": n})
    parts = split(config.model, S, n_stages, source_len)
    assert [l for part in parts for l in part.layers] == list(range(n + m))
    names = [h for part in parts for h, _, _ in weights(design(config, part=part))]
    assert sorted(names) == sorted(name for name, _, _ in weights(design(config)))


def test_stages_are_of_like_cost(two_stacks: MakeConfig) -> None:
    """FLOPs of the stages as torch counts them, with a small vocabulary: no stage has two layers more than another."""
    from nlm.plan.flops import _flops

    config = two_stacks("pre_ln", {"n_layers": 12, "n_encoder_layers": 12, "vocab_size": 16})
    parts = split(config.model, S, 4, T)
    flops = [_flops(config, part, 1) for part in parts]
    layer = _flops(config, Part(range(20, 21), first=False, last=False), 1)
    assert max(flops) - min(flops) < 2 * layer


def test_parameters_and_flops(two_stacks: MakeConfig) -> None:
    config = two_stacks("normformer", {"n_layers": 7, "n_encoder_layers": 5}, parallel=AUTO)
    by_role: dict[Role, int] = {}
    for _, parameter, weight in weights(design(config)):
        by_role[weight.role] = by_role.get(weight.role, 0) + parameter.numel()
    assert parameters_by_role(config) == by_role
    c = config.model
    square, kv, ffn = c.dim**2, c.dim * c.n_kv_heads * c.head_dim, 3 * c.dim * c.ffn_dim
    encoder = T * (2 * square + 2 * kv + ffn) + 2 * T * T * c.dim
    decoder = S * (4 * square + 2 * kv + ffn) + T * 2 * kv + 2 * S * (S + T) * c.dim
    row = 6 * (5 * encoder + 7 * decoder + S * c.dim * c.vocab_size)
    assert flops_per_token(config) == pytest.approx(row / S)
    found = plan(config)
    assert found.config.parallel.recompute == "none" and found.parameters == by_role
    assert 1 <= round(found.hardware_flops / found.flops, 9) < 1.1, "but for scores of fused attention"


@pytest.mark.parametrize("scheme", ["deepnorm", "rezero"])
def test_an_interrupted_run_goes_on(
    scheme: str, two_stacks: MakeConfig, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, on pairs out of a play; what is stored of its layers has those of both stacks."""
    monkeypatch.setattr(nlm.train, "RankData", Pairs)
    keys = {"vocab_size": 258, "stochastic_depth": 0.1, "position": "learned"}

    def run(name: str, **more: int) -> Path:
        config = two_stacks(
            scheme,
            keys,
            data={"train": shard},
            log={"dir": str(tmp_path / name), "every": 1, "tensorboard": False},
            checkpoint={"every": 2},
        )
        return train(config.model_copy(update={"train": config.train.model_copy(update=more)}))

    straight = run("straight")
    run("interrupted", stop_after=2)
    found = differences(straight, run("interrupted"))
    assert {"loss", "parameters", "optimizer"} <= set(found)
    assert {kind: difference.size for kind, difference in found.items() if difference.size} == {}
    layers = read_layers(straight)
    assert layers["stream_rms_out/ffn"].shape == (4, N + M)
