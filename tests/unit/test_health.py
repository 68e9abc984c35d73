"""Health laws: they hold at the start of every scheme, break in runs made to fail, and stay silent in healthy ones."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nlm import SCHEMES, read_layers
from nlm.anatomy import MATRICES
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.config import Config, read_table
from nlm.mesh import Mesh
from nlm.parallel.engine import WholeEngine
from nlm.statistics.forward import ForwardStatistics
from nlm.statistics.health import FP16, LEAST, PATIENCE, Monitor
from nlm.statistics.laws import gradient_law, rate, stream_law
from nlm.train import train

RunConfig = Callable[..., Config]
HEALTHY = (
    "pre_ln",
    "deepnorm",
    "sub_ln",
    "peri_ln",
    "sandwich_ln",
    "normformer",
    "olmo2",
    "ngpt",
    "layernorm_scaling",
    "rezero",
)


def as_published(scheme: str) -> dict[str, Any]:
    """The keys of [model] with which the scheme is trained."""
    model: dict[str, Any] = read_table(Path(f"configs/schemes/{scheme}.toml")).get("model", {})
    return {"scheme": {"name": scheme}} | model


def alarms(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "alarms.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def deep(run_config: RunConfig) -> Callable[..., Config]:
    def make(scheme: str, n_layers: int, steps: int, **optim: Any) -> Config:
        model = as_published(scheme) | {"n_layers": n_layers, "ffn_dim": 64}
        return run_config("run", model, train={"steps": steps, "batch_tokens": 256}, optim=optim)

    return make


# laws


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_starts_by_its_law(scheme: str, make_config: Callable[..., Config]) -> None:
    """Within a factor of four of the stream's variance, and of six of its gradient."""
    config = make_config(as_published(scheme) | {"n_layers": 48, "dim": 64}, train={"batch_tokens": 256, "seq_len": 32})
    engine = build_engine(config, Mesh())
    recorded = ForwardStatistics(engine, queries=1)
    recorded.begin()
    generator = torch.Generator().manual_seed(0)
    engine.forward_backward(Batch(torch.randint(config.model.vocab_size, (8, 33), generator=generator)))
    vectors = {name: vector.double().numpy() for name, vector in recorded.vectors().items()}

    variance, gradient = vectors["stream_variance_out/ffn"], vectors["stream_grad_rms/layer"]
    expected = stream_law(variance, engine.whole.scheme.growth)
    assert np.abs(np.log2(variance / expected)).max() < 2
    if gradient.any():  # a head of zeros sends none
        law = gradient_law(gradient, vectors["stream_rms_out/ffn"])
        assert np.abs(np.log(gradient / law)).max() < np.log(6)


def test_a_law_is_not_bent_by_one_layer() -> None:
    layers = np.arange(1, 41.0)
    for growth, law in (
        ("constant", np.full(40, 2.0)),
        ("linear", 1 + 3 * layers),
        ("logarithmic", 1 + 3 * (1 / layers).cumsum()),
        ("exponential", 1.1**layers),
    ):
        seen = law.copy()
        seen[17] *= 1e6
        assert np.allclose(stream_law(seen, growth), law, rtol=0.12), growth  # type: ignore[arg-type]


def test_the_rate_of_growth() -> None:
    steps = np.arange(0, 60, 5.0)
    noise = np.random.default_rng(0).normal(size=(12, 2)) * [0.0, 5.0]
    slope, certainty = rate(steps, np.exp(0.03 * steps[:, None] + noise))
    assert slope[0] == pytest.approx(0.03) and certainty[0] > 1e6 and abs(certainty[1]) < 5


# runs made to fail


def test_a_poisoned_layer_is_named(deep: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights times 1000 after step 12."""
    update = WholeEngine.update

    def poisoned(engine: WholeEngine, lr: float, left_out: Tensor | None = None) -> None:
        update(engine, lr, left_out)
        if int(engine.optimizer.updates) == 12:
            for h in engine.pieces.held:
                if h.weight.site and h.weight.site.layer == 7 and h.weight.role in MATRICES:
                    h.tensor.mul_(1000)

    monkeypatch.setattr(WholeEngine, "update", poisoned)
    run = train(deep("pre_ln", 12, 20))
    assert alarms(run), "no alarm"
    for alarm in alarms(run):
        assert 13 <= alarm["step"] <= 22
    first = alarms(run)[0]
    assert (first["layer"], first["step"], first["metric"]) == (7, 13, "weight_norm/q")
    assert first["seen"] == pytest.approx(1000 * first["expected"], rel=0.1)


def test_too_high_a_learning_rate(deep: Callable[..., Config]) -> None:
    run = train(deep("pre_ln", 24, 60, lr=0.1))
    found = {alarm["metric"].partition("/")[0] for alarm in alarms(run)}
    assert found & {"q_norm * k_norm ", "attention_entropy", "attention_saturated"}, alarms(run)


def test_post_ln_at_depth_without_warmup(deep: Callable[..., Config]) -> None:
    """Gradients that vanish on their way down."""
    run = train(deep("post_ln", 64, 16, lr=1e-3))
    (alarm,) = [alarm for alarm in alarms(run) if alarm["metric"] == "stream_grad_rms/layer"]
    assert alarm["layer"] < 32 and alarm["seen"] < alarm["expected"] / 30
    assert alarm["step"] - alarm["since"] == PATIENCE["law"] - 1, "told when it has lasted, with when it began"


@pytest.mark.parametrize("scheme", HEALTHY)
def test_no_alarm_in_a_healthy_run(scheme: str, deep: Callable[..., Config]) -> None:
    run = train(deep(scheme, 12, 40, lr=1e-3, warmup_steps=5))
    assert len(read_layers(run)["step"]) == 40 and not alarms(run)


# the monitor


def vectors(step: int, rate: float = 0.0, n_layers: int = 10) -> dict[str, np.ndarray]:
    """Of a healthy Pre-LN, of which layer 6 grows."""
    ones = np.ones(n_layers, np.float32)
    grown = ones.copy()
    grown[6] = np.exp(rate * step)
    return {
        "stream_variance_out/ffn": ones,
        "stream_rms_out/ffn": ones,
        "stream_max_out/ffn": 10 * grown,
        "stream_grad_rms/layer": ones,
        "weight_norm/q": ones,
    }


def test_a_forecast_of_when_fp16_ends() -> None:
    monitor = Monitor("linear", head_dim=8, last_step=1000)
    told = [(step, alarm) for step in range(0, 200, 5) for alarm in monitor.judge(step, vectors(step, rate=0.05))]
    (step, alarm) = told[0]
    ends = np.log(FP16 / 10) / 0.05
    assert len(told) == 1 and alarm.layer == 6 and alarm.metric == "stream_max_out/ffn"
    assert 2 * LEAST * 5 <= step < ends and f"at step {ends:.0f}" in alarm.text
    assert not any(
        Monitor("linear", head_dim=8, last_step=150).judge(step, vectors(step, rate=0.05)) for step in range(0, 120, 5)
    ), "beyond the end of the run"


def test_slowing_growth_is_not_extrapolated() -> None:
    monitor = Monitor("linear", head_dim=8, last_step=10_000)
    for step in range(0, 200, 5):
        now = vectors(step) | {"stream_max_out/ffn": np.full(10, 10 * (1 + step), np.float32)}
        assert not monitor.judge(step, now)


def test_the_worst_layer() -> None:
    monitor = Monitor("linear", head_dim=8, last_step=100)
    now = vectors(0)
    now["stream_variance_out/ffn"] = np.array([1, 1, 1, 9, 1, 1, 1, 1, 1, 1], np.float32)
    assert not monitor.judge(0, now), "not far enough for an alarm"
    assert monitor.worst is not None and monitor.worst.startswith("layer 3: stream_variance_out/ffn 9")


@pytest.fixture
def stopped(deep: Callable[..., Config]) -> Iterator[Config]:
    config = deep("post_ln", 64, 16, lr=1e-3)
    train(config.model_copy(update={"train": config.train.model_copy(update={"stop_after": 13})}))
    yield config


def test_what_was_told_before_a_resume_is_not_told_again(stopped: Config) -> None:
    run = Path(stopped.log.dir)
    before = alarms(run)
    assert before, "nothing was told yet"
    train(stopped)
    metrics = [alarm["metric"] for alarm in alarms(run)]
    assert alarms(run)[: len(before)] == before and len(metrics) == len(set(metrics))
