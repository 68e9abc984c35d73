"""Norms by the statistics of batches: the published forms step by step, the causal ones, and who may have which."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm import build_model, load_checkpoint
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.config import Config, ConfigError
from nlm.mesh import Mesh
from nlm.norms.batch import BatchStatistics
from nlm.parallel.engine import Engine
from nlm.train import train

MakeConfig = Callable[..., Config]
Array = NDArray[np.float64]
EPS = 1e-5
STEPS = 8


class PowerNormPaper:
    """What science.md section 15 says, one array [N D] of tokens a step."""

    def __init__(self, width: int, warmup: int) -> None:
        self.phi, self.nu, self.warmup, self.t = np.ones(width), np.zeros(width), warmup, 0

    def step(self, x: Array, gamma: Array, dy: Callable[[Array], Array]) -> tuple[Array, Array]:
        """-> y and the gradient by x, given that by y."""
        self.t += 1
        grouped = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        m = (grouped**2).mean(0)
        z = grouped / np.sqrt((m if self.t <= self.warmup else self.phi) + EPS)
        y = gamma * z
        if self.t <= self.warmup:
            self.phi = self.phi * (self.t - 1) / self.t + m / self.t
        self.phi = 0.9 * self.phi + 0.1 * m
        g = dy(y) * gamma - 0.1 * self.nu * z
        self.nu = self.nu + (g * z).mean(0)
        by_grouped = g / np.sqrt(m + EPS)
        r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        return y, r * by_grouped - x * r**3 * (by_grouped * x).mean(-1, keepdims=True)


class UnifiedPaper:
    """Section 16, and what the released code does where that is silent."""

    def __init__(self, width: int, warmup: int) -> None:
        self.warmup, self.t = warmup, 0
        self.m, self.q = [np.ones(width)] * 4, [np.zeros(width)] * 4
        self.rho, self.kappa = np.ones(width), np.zeros(width)

    def step(self, x: Array, gamma: Array, dy: Callable[[Array], Array]) -> tuple[Array, Array]:
        self.t += 1
        smooth = self.t > 4 and self.t >= self.warmup
        m = (x**2).mean(0)
        self.m = [*self.m[1:], m]
        v = np.exp(np.log(self.m).mean(0)) if smooth else m
        r = np.clip(np.sqrt((v + EPS) / (self.rho + EPS)), 0.2, 5) if self.t > max(1000, self.warmup) else 1.0
        self.rho = 0.9 * self.rho + 0.1 * v
        z = x / np.sqrt(v + EPS)
        y = gamma * z
        g = dy(y) * gamma * r
        q = (g * z).mean(0)
        self.q = [*self.q[1:], q]
        self.kappa = 0.9 * self.kappa + 0.1 * (np.mean(self.q, 0) if smooth else q)
        return y, (g - self.kappa * z) / np.sqrt(v + EPS)


PAPERS: dict[str, type[PowerNormPaper] | type[UnifiedPaper]] = {"powernorm": PowerNormPaper, "unified": UnifiedPaper}


def batches(n: int = STEPS) -> Iterator[Batch]:
    """Of 3 rows of 12 tokens, that an encoder is to predict each fourth of."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        tokens = torch.randint(95, (3, 13), generator=generator)
        hidden = torch.rand(3, 13, generator=generator) < 0.25
        yield Batch(tokens, stand_ins=torch.full_like(tokens, -1).masked_fill(hidden, 95))


def encoder(make_config: MakeConfig, norm: str, train: dict[str, Any] | None = None, **fields: Any) -> Engine:
    """One layer, in float64."""
    model = {"architecture": "encoder", "n_layers": 1, "norm": {"name": norm} | fields, "norm_eps": EPS}
    optim = {"lr": 0.02, "schedule": "constant", "weight_decay": 0.0}
    config = make_config(model, train={"batch_tokens": 36, "precision": "fp64"} | (train or {}), optim=optim)
    return build_engine(config, Mesh())


@pytest.mark.parametrize("norm", PAPERS)
@pytest.mark.parametrize("after", [0, 2000], ids=["from the start", "after 2000 steps"])
def test_published_form_is_that_of_the_paper(norm: str, after: int, make_config: MakeConfig) -> None:
    """Outputs, gradients and state over steps across the end of the warmup, while the weights move."""
    engine = encoder(make_config, norm, warmup_steps=after + 5)
    engine.start_after(after)
    layer = engine.models[0].final
    assert isinstance(layer, BatchStatistics)
    layer_state = engine._running.state
    for name, joint in layer_state.items():
        joint.fill_(0.0 if name in {"nu", "kappa"} or name[0] == "q" else 1.0)
    engine.goes_on()
    paper = PAPERS[norm](32, after + 5)
    paper.t = after
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda _, args, y: seen.update(y=y))
    layer.register_full_backward_hook(lambda _, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    for batch in batches():
        gamma = layer.weight.detach().clone().numpy()
        engine.forward_backward(batch)
        engine.clip()
        x, y, dy, dx = (seen[key].detach().flatten(0, 1).numpy() for key in ("x", "y", "dy", "dx"))
        engine.update(0.02)
        their_y, their_dx = paper.step(x, gamma, lambda _, dy=dy: dy)
        np.testing.assert_allclose(y, their_y, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(dx, their_dx, rtol=1e-8, atol=1e-13)
    fields = {"powernorm": ["phi", "nu"], "unified": ["rho", "kappa"]}[norm]
    for name in fields:
        np.testing.assert_allclose(getattr(layer, name).numpy(), getattr(paper, name), rtol=1e-8, atol=1e-12)


def test_batchnorm_is_torchs(make_config: MakeConfig) -> None:
    engine = encoder(make_config, "batchnorm")
    layer, theirs = engine.models[0].final, torch.nn.BatchNorm1d(32, eps=EPS, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0].detach(), y=y.detach()))
    for batch in batches(4):
        theirs.weight.data.copy_(layer.weight)
        engine.forward_backward(batch)
        expected = theirs(seen["x"].flatten(0, 1))
        assert torch.allclose(seen["y"].flatten(0, 1), expected, rtol=1e-10)
        engine.clip()
        engine.update(0.02)
    assert torch.allclose(layer.mean, theirs.running_mean) and torch.allclose(layer.var, theirs.running_var)
    theirs.eval()
    theirs.weight.data.copy_(layer.weight)
    engine.loss(batch)
    assert torch.allclose(seen["y"].flatten(0, 1), theirs(seen["x"].flatten(0, 1)), rtol=1e-10)


@pytest.mark.parametrize("norm", ["powernorm", "unified"])
def test_causal_form_knows_the_steps_before_only(norm: str, make_config: MakeConfig) -> None:
    """Starts from what it reads at initialization, then follows the batches; microbatches make one batch."""
    norms = {}
    for microbatches in (1, 3):
        model = {"norm": norm, "n_layers": 1}
        train = {"batch_tokens": 36, "precision": "fp64"}
        engine = build_engine(make_config(model, train=train, parallel={"microbatches": microbatches}), Mesh())
        layer, reads = engine.models[0].final, []
        layer.register_forward_hook(lambda _, args, y, reads=reads: reads.append((args[0].detach(), y.detach())))
        m = [torch.zeros(32, dtype=torch.float64)] * 4
        for step, batch in enumerate(batches()):
            reads.clear()
            engine.forward_backward(Batch(batch.tokens))
            engine.clip()
            x, y = (torch.cat(part).flatten(0, 1) for part in zip(*reads, strict=True))
            if norm == "powernorm":
                x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
            if step == 0:
                phi = layer.phi.clone() if norm == "powernorm" else layer.m0.clone()
                m = [phi] * 4
                assert torch.allclose(phi.mean(), x.square().mean(), rtol=0.3)
            v = phi if norm == "powernorm" else torch.stack(m).log().mean(0).exp()
            assert torch.allclose(y, x / (v + EPS).sqrt() * layer.weight, rtol=1e-9)
            engine.update(0.02)
            m = [*m[1:], x.square().mean(0)]
            phi = 0.9 * phi + 0.1 * m[-1]
        norms[microbatches] = engine.shared
        evaluated = engine.loss(Batch(batch.tokens))
        assert evaluated == engine.loss(Batch(batch.tokens)), "evaluation changes nothing"
    assert all(torch.allclose(norms[1][name], norms[3][name], rtol=1e-9) for name in norms[1])


@pytest.mark.parametrize("norm", ["powernorm", "unified"])
def test_recompute_observes_once(norm: str, make_config: MakeConfig) -> None:
    states = []
    for recompute in ("none", "block"):
        config = make_config({"norm": norm}, train={"batch_tokens": 36}, parallel={"recompute": recompute})
        engine = build_engine(config, Mesh())
        for batch in batches(3):
            engine.forward_backward(Batch(batch.tokens))
            engine.clip()
            engine.update(1e-2)
        states.append(engine.shared)
    assert states[0] and all(torch.allclose(states[0][name], states[1][name], rtol=1e-6) for name in states[0])


@pytest.mark.parametrize("norm", PAPERS)
def test_a_step_left_out_leaves_the_statistics(norm: str, make_config: MakeConfig) -> None:
    engine = encoder(make_config, norm)
    for i, batch in enumerate(batches(2)):
        before = {name: tensor.clone() for name, tensor in engine.shared.items()}
        engine.forward_backward(batch)
        engine.clip()
        engine.update(1e-2, left_out=torch.tensor(i == 1))
    assert before and all(torch.equal(engine.shared[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("norm", ["powernorm", "unified", "batchnorm"])
def test_k15_the_published_forms_leak(norm: str, make_config: MakeConfig) -> None:
    """K15: in a decoder what comes later would count, and what is in the other rows. Their own gradients do not show
    it: to them the statistics are constants."""
    table = make_config().model_dump()
    table["model"]["norm"] = {"name": norm} | ({} if norm == "batchnorm" else {"published": True})
    model, tokens = build_model(Config.parse(table)), torch.arange(24).view(2, 12)
    before = model(tokens)
    tokens[0, 9] += 50
    after = model(tokens)
    assert (before[0, :9] != after[0, :9]).any() and (before[1] != after[1]).any()


@pytest.mark.parametrize(
    ("model", "parallel", "problem"),
    [
        ({"norm": "batchnorm"}, {}, "set another norm, or model.architecture = 'encoder'"),
        ({"norm": {"name": "powernorm", "published": True}}, {}, "set model.norm.published = false, or"),
        ({"norm": {"name": "unified", "published": True}}, {}, "set model.norm.published = false, or"),
        ({"norm": "unified", "architecture": "encoder"}, {"microbatches": 3}, "parallel.microbatches = 1"),
        ({"norm": "batchnorm", "architecture": "encoder"}, {"microbatches": 3}, "parallel.microbatches = 1"),
    ],
    ids=str,
)
def test_wrong_pairs_are_refused(
    model: dict[str, Any], parallel: dict[str, Any], problem: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config(model, train={"batch_tokens": 36}, parallel=parallel)


def test_right_pairs_are_not(make_config: MakeConfig) -> None:
    make_config({"norm": "powernorm"}, train={"batch_tokens": 36}, parallel={"microbatches": 3})
    causal = {"norm": {"name": "unified", "published": False}, "architecture": "encoder"}
    make_config(causal, train={"batch_tokens": 36}, parallel={"microbatches": 3})


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
@pytest.mark.parametrize("norm", PAPERS)
def test_statistics_are_in_the_checkpoint(
    norm: str, architecture: str, run_config: Callable[..., Config], tmp_path: Path
) -> None:
    """A run that is interrupted goes on as one that is not, and what is evaluated is what was trained."""
    model = {"norm": {"name": norm, "warmup_steps": 3}, "architecture": architecture, "vocab_size": 258}
    whole = train(run_config("whole", model))
    train(run_config("parts", model, train={"stop_after": 5}))
    parts = train(run_config("parts", model))
    (ours, config), (theirs, _) = (load_checkpoint(run / "checkpoints/step-00000008") for run in (whole, parts))
    assert not ours.training
    statistics = [name for name, _ in ours.named_buffers() if name in ours.state_dict()]
    assert len(statistics) >= 7
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    fresh = build_model(config).state_dict()
    assert all((ours.state_dict()[name] != fresh[name]).any() for name in statistics)
