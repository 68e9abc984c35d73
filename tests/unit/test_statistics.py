"""Per-layer statistics: right against an independent count, whole after a crash, and drawn."""

from collections.abc import Callable
from itertools import product
from math import lgamma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

from nlm import SCHEMES, build_model, load_checkpoint, read_layers
from nlm.anatomy import Role
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.config import Config
from nlm.data.corpus import Corpus
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.model import weights
from nlm.optim import adamw, learning_rate
from nlm.parallel.engine import Engine
from nlm.statistics.cells import absent, cells, scale_of
from nlm.statistics.draw import ABSENT, MAIN, NOT_FINITE, profile_figure, quantity_figure
from nlm.statistics.forward import ForwardStatistics
from nlm.statistics.noise import signal_and_noise
from nlm.statistics.outliers import outliers
from nlm.statistics.record import LayerStatistics
from nlm.statistics.store import LayerWriter
from nlm.train import train

RunConfig = Callable[..., Config]
MakeConfig = Callable[..., Config]


# recording


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_recorded_against_an_independent_count(
    scheme: str, microbatches: int, run_config: RunConfig, shard: str
) -> None:
    """The first step again, in one piece, with hooks and plain loops."""
    model_keys = {"scheme": {"name": scheme}, "bias": True, "activation": "swiglu"}
    config = run_config(
        "run",
        model_keys,
        train={"steps": 1},
        parallel={"microbatches": microbatches},
        statistics={"queries": 16},
    )
    layers = read_layers(train(config))

    model = build_model(config)
    tensors: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, x: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            tensors[f"{name}.in"], tensors[name] = x[0], y
            if y.requires_grad:
                y.retain_grad()

        return hook

    for l, block in model.blocks.items():
        for name in block.names:
            sublayer = getattr(block, name)
            sublayer.register_forward_hook(keep(f"{l}.{name}.branch"))
            getattr(block, f"{name}_residual").register_forward_hook(keep(f"{l}.{name}.stream"))
            inner = sublayer.slots if name == "attn" else {"down": sublayer.w_down}
            for part, module in inner.items():
                module.register_forward_hook(keep(f"{l}.{name}.{part}"))
    rows = torch.from_numpy(Corpus(config).batch(1).tokens)
    logits = model(rows[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(((p, w) for _, p, w in weights(model)), model.scheme, config.optim)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    assert float(total) > 0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, 1, 1) * group["lr_multiplier"]
    optimizer.step()
    for _, parameter, weight in weights(model):
        if (axis := model.scheme.unit_axis(weight)) is not None:
            parameter.data /= parameter.data.norm(dim=axis, keepdim=True)

    def joined(tensors: dict[str, torch.Tensor], layer: int, role: Role | None) -> float:
        chosen = [
            tensors[name].double().flatten()
            for name, _, weight in weights(model)
            if weight.site and weight.site.layer == layer and role in (None, weight.role)
        ]
        return float(torch.cat([torch.zeros(1), *chosen]).norm())  # a layer may have none of a role

    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    roles = {weight.role for _, _, weight in weights(model) if weight.site}
    expected: dict[str, list[float]] = {}

    def expect(name: str, value: torch.Tensor | float) -> None:
        expected.setdefault(name, []).append(float(value))

    nan = float("nan")
    for l, block in enumerate(model.blocks.values()):
        expect("grad_norm/layer", joined(gradients, l, None))
        for role in roles:
            has = any(w.site and w.site.layer == l and w.role == role for _, _, w in weights(model))
            size, gradient, update = (joined(of, l, role) for of in (before, gradients, moved))
            after = joined({name: p.detach() for name, p in model.named_parameters()}, l, role)
            turned = 1 - (size**2 + after**2 - update**2) / (2 * size * after) if size else 0.0
            expect(f"grad_norm/{role}", gradient if has else nan)
            expect(f"weight_norm/{role}", size if has else nan)
            expect(f"update_norm/{role}", update if has else nan)
            expect(f"update_ratio/{role}", (update / size if size else 0.0) if has else nan)
            expect(f"weight_angle/{role}", 2 * np.arcsin(np.sqrt(max(turned, 0) / 2)) if has else nan)
        for name in {name for b in model.blocks.values() for name in b.names}:
            here = name in block.names
            x, branch, y = (
                tensors[f"{l}.{name}.{of}"].detach().double() if here else torch.tensor([nan], dtype=torch.float64)
                for of in ("stream.in", "branch", "stream")
            )
            for of, where, z in (("stream", "_in", x), ("branch", "", branch), ("stream", "_out", y)):
                expect(f"{of}_rms{where}/{name}", z.square().mean().sqrt())
                expect(f"{of}_mean{where}/{name}", z.mean())
                expect(f"{of}_variance{where}/{name}", z.var(correction=0))
                expect(f"{of}_max{where}/{name}", z.abs().max())
            expect(f"stream_cosine/{name}", (x * y).sum() / (x.norm() * y.norm()))
            if name == "attn":
                for what, value in attention(tensors, f"{l}.attn", here).items():
                    expect(f"{what}/attn", value)
            else:
                units = tensors[f"{l}.{name}.down.in"].abs().mean((0, 1)) if here else torch.tensor([nan])
                expect(f"dead_units/{name}", (units == 0).float().mean() if here else nan)
                expect(f"dormant_units/{name}", (units <= 0.025 * units.mean()).float().mean() if here else nan)
        last = tensors[f"{l}.{block.names[-1]}.stream"].grad
        assert last is not None
        expect("stream_grad_rms/layer", last.double().square().mean().sqrt())
    assert set(layers) - {"step"} >= set(expected)
    for name, values in expected.items():
        near = 1e-6 if "_mean" in name else 2e-5 if "angle" in name else 1e-8
        assert np.allclose(layers[name][0], values, rtol=2e-3, atol=near, equal_nan=True), (
            name,
            layers[name][0],
            values,
        )


def attention(tensors: dict[str, torch.Tensor], at: str, here: bool) -> dict[str, float]:
    """Position by position, of every second query, the last among them."""
    nan = float("nan")
    names = ("attention_entropy", "attention_uniform", "attention_saturated", "max_logit", "q_norm", "k_norm")
    if not here:
        return dict.fromkeys(names, nan)
    q, k = (tensors[f"{at}.{x}"].detach().double() for x in "qk")
    entropy, uniform, saturated, logits = [], [], [], []
    for b, t, h in product(range(len(q)), range(1, q.shape[1], 2), range(q.shape[2])):
        logit = k[b, : t + 1, h // (q.shape[2] // k.shape[2])] @ q[b, t, h] / q.shape[3] ** 0.5
        p = logit.softmax(0)
        entropy.append(float(-(p * p.log()).sum()))
        uniform.append(np.log(t + 1))
        saturated.append(float(p.max() > 0.95))
        logits.append(float(logit.max()))
    norms = (float(x.square().sum(-1).mean().sqrt()) for x in (q, k))
    means = (float(np.mean(x)) for x in (entropy, uniform, saturated))
    return dict(zip(names, (*means, max(logits), *norms), strict=True))


def test_what_is_learned_is_recorded_as_the_equation_sees_it(run_config: RunConfig) -> None:
    """After the update; nGPT stores its rates at another scale than it uses them."""
    run = train(run_config("run", {"scheme": {"name": "ngpt"}, "attention": {"score": "qknorm"}}, train={"steps": 2}))
    layers = read_layers(run, ["learned/attn_residual.alpha", "learned/attn.score.g"])
    model, _ = load_checkpoint(next((run / "checkpoints").iterdir()))
    blocks = list(model.blocks.values())
    rates = [float(block.attn_residual.part("alpha").abs().mean()) for block in blocks]
    assert np.allclose(layers["learned/attn_residual.alpha"][-1], rates, rtol=1e-5)
    assert np.allclose(layers["learned/attn.score.g"][-1], [float(block.attn.score.g) for block in blocks], rtol=1e-5)


def test_k27_entropy_of_uniform_attention(run_config: RunConfig) -> None:
    """K27: ln(T!) / T over all positions, when no query prefers a key; so is the reference beside it."""
    config = run_config("run", statistics={"queries": 32})
    engine = build_engine(config, Mesh())
    for block in engine.models[0].blocks.values():
        torch.nn.init.zeros_(block.attn.wq.weight)
    recorded = ForwardStatistics(engine, queries=32)
    recorded.begin()
    engine.forward_backward(RankData(config, Mesh()).rows(1))
    vectors = recorded.vectors()
    for name in ("attention_entropy/attn", "attention_uniform/attn"):
        assert vectors[name].tolist() == pytest.approx([lgamma(33) / 32] * config.model.n_layers, rel=1e-6)


def test_units_that_do_little(run_config: RunConfig) -> None:
    """One that gives nothing, one that gives a hundredth of the others, and one that gives enough."""
    config = run_config("run", {"activation": "gelu"})
    engine = build_engine(config, Mesh())
    for block in engine.models[0].blocks.values():
        block.ffn.w_up.weight.data[:3] *= torch.tensor([0.0, 0.01, 0.06])[:, None]
    recorded = ForwardStatistics(engine, queries=1)
    recorded.begin()
    engine.forward_backward(RankData(config, Mesh()).rows(1))
    vectors, n_units = recorded.vectors(), config.model.ffn_dim
    assert vectors["dead_units/ffn"].tolist() == pytest.approx([1 / n_units] * config.model.n_layers)
    assert vectors["dormant_units/ffn"].tolist() == pytest.approx([2 / n_units] * config.model.n_layers)


@pytest.fixture
def requested(run_config: RunConfig) -> tuple[Engine, LayerStatistics, Batch]:
    config = run_config("run", statistics={"spectra_every": 3, "noise_every": 2}, train={"batch_tokens": 256})
    engine = build_engine(config, Mesh())
    return engine, LayerStatistics(engine, config.statistics), RankData(config, Mesh()).rows(1)


def test_spectra_are_those_of_whole_matrices(requested: tuple[Engine, LayerStatistics, Batch]) -> None:
    engine, statistics, rows = requested
    statistics.begin(rows, 2)
    assert all(vector.isnan().all() for vector in statistics.requested.values()), "not due"
    statistics.begin(rows, 3)
    model, streams = engine.models[0], []
    for block in model.blocks.values():
        block.register_forward_hook(lambda _, x, y: streams.append(y[0].detach().double().numpy()))
    model(rows.inputs)
    for l, block in enumerate(model.blocks.values()):
        for role, matrix in (("q", block.attn.wq), ("down", block.ffn.w_down)):
            sizes = np.linalg.svd(matrix.weight.detach().double().numpy(), compute_uv=False)
            assert float(statistics.requested[f"largest_singular_value/{role}"][l]) == pytest.approx(sizes[0])
            assert float(statistics.requested[f"condition_number/{role}"][l]) == pytest.approx(
                sizes[0] / sizes[-1], rel=1e-3
            )
        ranks = []
        for row in streams[l]:
            shares = np.linalg.svd(row, compute_uv=False)
            shares /= shares.sum()
            ranks.append(np.exp(-(shares * np.log(shares)).sum()))
        assert float(statistics.requested["effective_rank/layer"][l]) == pytest.approx(np.mean(ranks), rel=1e-4)


def test_the_noise_of_gradients(requested: tuple[Engine, LayerStatistics, Batch]) -> None:
    """The gradient of every second row by itself; taking it changes nothing."""
    engine, statistics, rows = requested
    before = [tensor.clone() for tensor in engine.pieces.tensors]
    statistics.begin(rows, 2)
    assert all(torch.equal(a, b) for a, b in zip(engine.pieces.tensors, before, strict=True))
    assert int(engine.optimizer.updates) == 0 and all(p.grad is None for p in engine.models[0].parameters())
    engine.forward_backward(rows)
    _, norms = engine.clip()
    statistics.before_update()
    engine.update(0.0)
    vectors = statistics.vectors(norms)

    def squared(chosen: Batch) -> np.ndarray:
        model = build_model(engine.config)
        loss = model(*chosen.arguments()[:3]) / chosen.targets.numel()
        loss.backward()
        layers = [[p.grad.double().square().sum() for p in block.parameters()] for block in model.blocks.values()]
        return np.array([float(sum(layer)) for layer in layers])

    whole, half = squared(rows), squared(Batch(rows.tokens[::2]))
    assert np.allclose(vectors["gradient_signal/layer"], 2 * whole - half, rtol=1e-3)
    assert np.allclose(vectors["gradient_noise/layer"], len(rows) * (half - whole), rtol=1e-3)


def test_signal_and_noise_are_unbiased() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=50)
    rows = true + 2.0 * random.normal(size=(4000, 8, 50))  # variance 4 · 50 a row
    for n in (4, 3):
        norms = (torch.from_numpy(np.linalg.norm(part.mean(1), axis=1)) for part in (rows, rows[:, :n]))
        signal, noise = (float(x.mean()) for x in signal_and_noise(*norms, rows=8, share=n / 8))
        assert signal == pytest.approx(true @ true, rel=0.03) and noise == pytest.approx(200, rel=0.03)


def pairs(sources: list[list[int]], targets: list[list[int]], widths: tuple[int, int]) -> Batch:
    """Rows that are filled up to the widths, in MODEL's vocabulary."""
    rows = [
        [[*row, *[95] * (width - len(row))] for row in side]
        for side, width in ((sources, widths[0]), (targets, widths[1]))
    ]
    return Batch(torch.tensor(rows[1]), source=torch.tensor(rows[0]), padding=95)


def test_of_pairs_only_what_is_no_padding_counts(make_config: MakeConfig) -> None:
    """Each row by itself, without padding, against all in a batch, with more padding and empty rows, which other
    layouts need, besides."""
    random, model = np.random.default_rng(0), {"architecture": "encoder_decoder", "activation": "relu", "ffn_dim": 8}
    lengths = np.array([[3, 6], [8, 2], [5, 5], [4, 7]])
    sources, targets = (
        [random.integers(1, 95, n).tolist() for n in side] for side in (lengths[:, 0], lengths[:, 1] + 1)
    )

    def recorded(batch: Batch, microbatches: int = 1) -> dict[str, np.ndarray]:
        every = {"queries": 16, "spectra_every": 1, "noise_every": 1}
        config = make_config(model, statistics=every, parallel={"microbatches": microbatches})
        engine = build_engine(config, Mesh())
        statistics = LayerStatistics(engine, config.statistics)
        statistics.begin(batch, 1)
        engine.forward_backward(batch)
        _, norms = engine.clip()
        statistics.before_update()
        engine.update(0.0)
        return statistics.vectors(norms)

    whole = recorded(pairs(sources, targets, (8, 8)))
    more = recorded(pairs([*sources, [1], [1]], [*targets, [], []], (11, 10)), microbatches=2)
    assert whole.keys() == more.keys()
    for name, values in whole.items():
        assert np.allclose(more[name], values, rtol=1e-4, atol=1e-6, equal_nan=True), (name, more[name], values)

    single = [recorded(pairs([s], [t], (len(s), len(t)))) for s, t in zip(sources, targets, strict=True)]
    shares, n_encoder = lengths / lengths.sum(0), 3
    for name in (
        "stream_rms_out/{}",
        "branch_rms/{}",
        "q_norm/{}",
        "k_norm/{}",
        "attention_entropy/{}",
        "attention_uniform/{}",
    ):
        of_heads = name.startswith(("q", "k", "att"))
        power = 1 if name.startswith("att") else 2
        for sublayer in ("attn", "cross") if of_heads else ("attn", "cross", "ffn"):
            of_rows = np.stack([row[name.format(sublayer)] for row in single]) ** power
            here = shares[:, :1] if (name, sublayer) == ("k_norm/{}", "cross") else shares[:, 1:]
            expected = np.r_[(of_rows * shares[:, :1]).sum(0)[:n_encoder], (of_rows * here).sum(0)[n_encoder:]]
            assert np.allclose(whole[name.format(sublayer)], expected ** (1 / power), rtol=1e-4, equal_nan=True), name
    for name in ("stream_max_out/ffn", "max_logit/attn", "max_logit/cross"):
        assert np.allclose(whole[name], np.max([row[name] for row in single], 0), rtol=1e-5, equal_nan=True), name
    ranks = np.mean([row["effective_rank/layer"] for row in single], 0)
    assert np.allclose(whole["effective_rank/layer"], ranks, rtol=1e-4)
    squares = np.stack([row["stream_grad_rms/layer"] for row in single]) ** 2 * shares[:, 1:] ** 2
    n = np.where(np.arange(6) < n_encoder, lengths[:, :1], lengths[:, 1:])
    assert np.allclose(whole["stream_grad_rms/layer"], ((squares * n).sum(0) / n.sum(0)) ** 0.5, rtol=1e-4)


# storing


def vectors(step: int) -> dict[str, np.ndarray]:
    return {name: np.arange(5, dtype=np.float32) + 100 * step for name in ("a/x", "b/y")}


def write(run: Path, start: int, steps: range) -> None:
    with LayerWriter(run, 5, start) as writer:
        for step in steps:
            writer.write(step, vectors(step))


def assert_holds(run: Path, steps: range) -> None:
    layers = read_layers(run)
    assert layers["step"].tolist() == list(steps)
    for name in ("a/x", "b/y"):
        assert np.array_equal(layers[name], np.stack([vectors(step)[name] for step in steps]))


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8))
    assert_holds(tmp_path, range(1, 8))
    assert set(read_layers(tmp_path, ["b/y"])) == {"step", "b/y"}
    with pytest.raises(ValueError, match="no statistic c; there are step, a/x, b/y"):
        read_layers(tmp_path, ["c"])


def test_every_step_is_whole_at_once(tmp_path: Path) -> None:
    """What a killed process leaves: the file as it is while it is being written."""
    with LayerWriter(tmp_path, 5, 0) as writer:
        for step in range(1, 5):
            writer.write(step, vectors(step))
            assert_holds(tmp_path, range(1, step + 1))


def test_a_file_cut_anywhere_keeps_its_whole_steps(tmp_path: Path) -> None:
    ends = [0]
    with LayerWriter(tmp_path, 5, 0) as writer:
        for step in range(1, 4):
            writer.write(step, vectors(step))
            ends.append(writer.path.stat().st_size)
        content = writer.path.read_bytes()
    for size in range(0, len(content), 7):
        writer.path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends[1:])
        if whole:
            assert_holds(tmp_path, range(1, whole + 1))
        else:
            with pytest.raises(ValueError, match="no layer statistics"):
                read_layers(tmp_path)


def test_a_resumed_run_overrides_what_came_later(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 4, range(5, 12))
    assert_holds(tmp_path, range(1, 12))
    write(tmp_path, 2, range(3, 5))  # from an older checkpoint than the last time
    assert_holds(tmp_path, range(1, 5))


def test_what_was_not_recorded_from_the_start_is_nan_there(tmp_path: Path) -> None:
    """A run that goes on with a version that records more."""
    write(tmp_path, 0, range(1, 3))
    with LayerWriter(tmp_path, 5, 2) as writer:
        writer.write(3, vectors(3) | {"c/z": np.ones(5, np.float32)})
    layers = read_layers(tmp_path)
    assert_holds(tmp_path, range(1, 4))
    assert np.isnan(layers["c/z"][:2]).all() and (layers["c/z"][2] == 1).all()
    assert absent(layers["c/z"]).tolist() == [[True] * 5, [True] * 5, [False] * 5]


# drawing


def test_scales_are_rounded_outward() -> None:
    """So that a picture some steps later has the same one."""
    for values, low, high in (
        ([0.0, 1.2e-3, np.nan, np.inf, 5.0], 1e-3, 10.0),
        ([1e-30, 0.7], 1e-12, 1.0),
        ([0.0], 1.0, 10.0),
        ([3.0], 1.0, 10.0),
        ([10.0], 10.0, 100.0),
    ):
        scale = scale_of([np.array(values)], "log")
        assert (scale.vmin, scale.vmax) == (pytest.approx(low), pytest.approx(high))
    for values, kind, low, high in (
        ([0.1, 0.83], "linear", 0.0, 1.0),
        ([-0.3, 3.1], "linear", -0.5, 5.0),
        ([0.0], "linear", 0.0, 1.0),
        ([-0.3, 3.1], "symmetric", -5.0, 5.0),
        ([-30.0], "symmetric", -50.0, 50.0),
        ([0.0], "symmetric", -1.0, 1.0),
    ):
        scale = scale_of([np.array(values)], kind)  # type: ignore[arg-type]
        assert (scale.vmin, scale.vmax) == (pytest.approx(low), pytest.approx(high))


def test_no_outlier_is_lost_in_a_small_picture(tmp_path: Path) -> None:
    """Of a thousand layers and steps, one layer too high, one too low and one not finite, each at a single step."""
    values = np.random.default_rng(0).uniform(9.0, 11.0, (1000, 1000)).astype(np.float32)
    values[501, 731], values[20, 3], values[990, 990] = 9e3, 1.1e-2, np.nan
    values[:, 400:500] = np.nan  # layers that have none
    scale = scale_of([values], "log")
    small = cells(values, scale, (100, 50))
    assert small.levels.shape == (100, 50)
    assert small.levels[73, 25] > 0.99 and small.levels[0, 1] < 0.01
    assert np.isnan(small.levels[99, 49]) and np.isnan(small.levels).sum() == 1
    assert small.absent[40:50].all() and small.absent.sum() == 500

    quantity_figure({"step": np.arange(1, 1001), "q/part": values}, "q").savefig(tmp_path / "q.png")
    pixels = (imread(tmp_path / "q.png")[..., :3] * 255).round().astype(int)

    def of(colour: str) -> Any:
        return (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)

    assert of(NOT_FINITE).any() and of(ABSENT).sum() > 500
    assert (pixels[:, : pixels.shape[1] // 2].sum(-1) > 650).any(), "nearly white: the highest level"


@pytest.mark.parametrize("kind", ["log", "linear", "symmetric"])
def test_profiles_are_of_the_first_the_last_and_quarter_points(kind: Any) -> None:
    quantity = {"log": "grad_norm", "linear": "stream_cosine", "symmetric": "max_logit"}[kind]
    values = np.linspace(0.1, 0.9, 21)[:, None] * np.ones((21, 70))
    figure = profile_figure({"step": np.arange(10, 31), f"{quantity}/part": values}, quantity)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["10", "15", "20", "25", "30"]
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert axes.get_yscale() == ("log" if kind == "log" else "linear")


def test_a_heat_map_shows_layers_upwards_and_steps_to_the_right(tmp_path: Path) -> None:
    """The largest value, in the highest layer at the last step, is the brightest: in the upper right corner."""
    values = np.ones((10, 20))
    values[5:, 10:] = 100.0
    figure = quantity_figure({"step": np.arange(1, 11), "q/part": values}, "q")
    (axes, _) = figure.axes
    figure.savefig(tmp_path / "q.png")
    box = axes.get_window_extent()
    pixels = imread(tmp_path / "q.png")[::-1, :, :3].sum(-1)  # row 0 at the bottom, as in figure coordinates
    x, y = int(box.x0), int(box.y0)
    inside = pixels[y + 2 : int(box.y1) - 2, x + 2 : int(box.x1) - 2]
    upper, right = inside.shape[0] // 2, inside.shape[1] // 2
    corner = inside[upper + 9 :, right + 9 :].mean()
    assert corner > inside[: upper - 9].mean() + 1 and corner > inside[:, : right - 9].mean() + 1


def events(run: Path) -> EventAccumulator:
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    read.Reload()
    return read


def test_tensorboard_has_as_many_tags_at_any_depth(run_config: RunConfig) -> None:
    shown = {"tensorboard": True}
    shallow = events(train(run_config("shallow", {"n_layers": 2}, log=shown, statistics={"images_every": 8})))
    deep = events(train(run_config("deep", {"n_layers": 30}, log=shown, statistics={"images_every": 4})))
    assert deep.Tags() == shallow.Tags()
    images = set(deep.Tags()["images"])
    assert {"layers/grad_norm", "profiles/grad_norm", "layers/stream_rms_out"} <= images
    assert len(images) <= 2 * len(MAIN)
    assert [event.step for event in deep.Images("layers/grad_norm")] == [4, 8]
    assert {"loss", "grad_norm", "lr", "tokens_s"} <= set(deep.Tags()["scalars"])


def test_tensorboard_has_the_config(run_config: RunConfig) -> None:
    """As text and as hyperparameters, in the run's own folder: a folder below it would be another run."""
    config = run_config("run", log={"tensorboard": True})
    run = train(config)
    assert all(path.is_file() for path in (run / "tensorboard").iterdir())
    read = events(run)
    (text,) = read.Tensors("config/text_summary")
    assert 'name = "pre_ln"' in text.tensor_proto.string_val[0].decode()
    start = plugin_data_pb2.HParamsPluginData.FromString(
        read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    given = start.session_start_info.hparams
    assert given["optim.lr"].number_value == config.optim.lr
    assert given["model.scheme.name"].string_value == "pre_ln"


# layers that stand out


@pytest.mark.parametrize("kind", ["log", "linear", "symmetric"])
def test_a_layer_that_stands_out_is_found(kind: Any) -> None:
    """From its neighbours or from its own past, and no other, on a slope and while all layers drift."""
    noise = np.random.default_rng(0).normal(0, 0.02, (40, 200))
    slope = 0.01 * np.arange(200) + 0.01 * np.arange(40)[:, None] + noise
    slope[:, 50] += 0.5  # always off its neighbours
    slope[-1, 120:140] += 0.5  # off their past, in the middle of such
    slope[-1, 180] = np.nan
    slope[:, 60:70] = np.nan  # have none
    values = 10.0**slope if kind == "log" else slope
    found = {outlier.layer: outlier for outlier in outliers(values, kind, 6.0)}
    assert found.keys() == {50, 180, *range(120, 140)}
    assert found[50].from_neighbours > 6 > found[50].from_past
    assert found[130].from_past > 6 > found[130].from_neighbours
    assert found[130].value == pytest.approx(values[-1, 130])
    assert found[180].sigma == np.inf
