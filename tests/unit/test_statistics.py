"""Per-layer statistics: right against an independent count, whole after a crash, drawn, and reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nlm import SCHEMES, build_model, read_layers
from nlm.anatomy import Role
from nlm.config import Config
from nlm.data.corpus import Corpus
from nlm.model import weights
from nlm.optim import adamw, learning_rate
from nlm.statistics.draw import colour_scale, quantity_figure
from nlm.statistics.report import report
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
    config = run_config("run", model_keys, train={"steps": 1}, parallel={"microbatches": microbatches})
    layers = read_layers(train(config))

    model = build_model(config)
    branch: dict[str, float] = {}
    stream: dict[str, float] = {}

    def rms(x: torch.Tensor) -> float:
        return float(x.detach().double().square().mean().sqrt())

    for l, block in model.blocks.items():
        for kind, name in zip(("attn", "ffn"), block.names, strict=True):
            keep = lambda _, __, y, at=f"{l}.{kind}": branch.update({at: rms(y)})  # noqa: E731
            getattr(block, name).register_forward_hook(keep)
            both = lambda _, x, y, at=f"{l}.{kind}": stream.update({f"{at}.in": rms(x[0]), f"{at}.out": rms(y)})  # noqa: E731
            getattr(block, f"{name}_residual").register_forward_hook(both)
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
    for l in range(config.model.n_layers):
        expected.setdefault("grad_norm/layer", []).append(joined(gradients, l, None))
        for role in roles:
            expected.setdefault(f"grad_norm/{role}", []).append(joined(gradients, l, role))
            expected.setdefault(f"weight_norm/{role}", []).append(joined(before, l, role))
            size = joined(before, l, role)
            expected.setdefault(f"update_ratio/{role}", []).append(joined(moved, l, role) / size if size else 0.0)
        for kind in ("attn", "ffn"):
            expected.setdefault(f"stream_rms_in/{kind}", []).append(stream[f"{l}.{kind}.in"])
            expected.setdefault(f"branch_rms/{kind}", []).append(branch[f"{l}.{kind}"])
            expected.setdefault(f"stream_rms_out/{kind}", []).append(stream[f"{l}.{kind}.out"])
    assert set(layers) - {"step"} >= set(expected)
    for name, values in expected.items():
        assert np.allclose(layers[name][0], values, rtol=2e-3), (name, layers[name][0], values)


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


# drawing


def test_colours_span_the_positive_values() -> None:
    scale = colour_scale([np.array([[0.0, 1e-3]]), np.array([[np.nan, np.inf], [5.0, 1e-2]])])
    assert (scale.vmin, scale.vmax) == (1e-3, 5.0)
    assert colour_scale([np.array([1e-30, 1.0])]).vmin == pytest.approx(1e-12)
    for flat, middle in (np.zeros(2), 1.0), (np.full(2, 3.0), 3.0), (np.array([1.0, 4.0]), 2.0):
        scale = colour_scale([flat])
        assert scale.vmax / scale.vmin == pytest.approx(10.0)
        assert scale.vmax * scale.vmin == pytest.approx(middle**2)


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


def tags(run: Path) -> dict[str, Any]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return {kind: events.Tags()[kind] for kind in ("scalars", "images")} | {
        "image_steps": [e.step for e in events.Images("layers/grad_norm")]
    }


def test_tensorboard_has_as_many_tags_at_any_depth(run_config: RunConfig) -> None:
    shown = {"tensorboard": True}
    shallow = train(run_config("shallow", {"n_layers": 2}, log=shown, statistics={"images_every": 4}))
    deep = train(run_config("deep", {"n_layers": 60}, log=shown, statistics={"images_every": 4}))
    assert tags(shallow) == tags(deep)
    assert tags(deep)["image_steps"] == [4, 8]
    assert {"loss", "grad_norm", "lr", "tokens_s"} <= set(tags(deep)["scalars"])


def test_report_of_two_runs(run_config: RunConfig, tmp_path: Path) -> None:
    runs = [train(run_config(f"{folder}/run", {"scheme": {"name": "pre_ln"}})) for folder in ("a", "b")]
    pictures = list(report(runs, tmp_path / "out"))
    assert pictures[0] == tmp_path / "out" / "overview.png"
    assert {p.parent.name for p in pictures[1:]} == {"a-run", "b-run"}
    assert {p.stem for p in pictures[1:]} == {
        "grad_norm", "weight_norm", "update_ratio", "stream_rms_in", "branch_rms", "stream_rms_out",
    }  # fmt: skip
    assert all(imread(picture).std() > 0.02 for picture in pictures), "not blank"


def test_report_without_statistics_draws_the_losses(run_config: RunConfig, tmp_path: Path) -> None:
    run = train(run_config("bare", statistics={"enabled": False}))
    assert list(report([run], tmp_path / "out")) == [tmp_path / "out" / "overview.png"]


def test_report_names_each_run_once(run_config: RunConfig, tmp_path: Path) -> None:
    run = train(run_config("run"))
    with pytest.raises(ValueError, match="name each once"):
        list(report([run, run], tmp_path))
