"""What each normalizer of weights promises, of the whole matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nlm import WEIGHT_NORMS, build_model, load_checkpoint, weight_norms
from nlm.anatomy import MATRICES, Role, Span
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.compare import differences
from nlm.config import Config, ConfigError
from nlm.mesh import Mesh
from nlm.model import Transformer, held, weights
from nlm.parallel.tensor import TensorParallel
from nlm.train import train
from nlm.weight_norms import WeightNorm

MakeConfig = Callable[..., Config]
OUT, IN = 6, 10


def make(name: str) -> WeightNorm:
    return WEIGHT_NORMS[name](Span.whole(OUT), Span.whole(IN), TensorParallel()).double()


def matrix() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def effective(model: nn.Module) -> dict[str, Tensor]:
    """What the products are taken with, by name."""
    return {
        name: module.weight_norm(module.weight)
        for name, module in model.named_modules()
        if getattr(module, "weight_norm", None) is not None
    }


def test_k20_scaled_standardization() -> None:
    """K20: rows of mean 0 and of squares that sum to γ²; what moves the gradient is neither mean nor length."""
    norm, w = make("scaled_weight_standardization"), matrix().requires_grad_()
    gain = torch.arange(1.0, OUT + 1)
    with torch.no_grad():
        norm.gain.copy_(gain)
    y = norm(w)
    assert y.sum(1).abs().max() < 1e-12
    assert torch.allclose(y.square().sum(1).sqrt(), gain.double())
    (gradient,) = torch.autograd.grad((y * matrix().flip(0)).sum(), w)
    assert gradient.sum(1).abs().max() < 1e-12 and (gradient * y).sum(1).abs().max() < 1e-12


def test_weight_standardization() -> None:
    y = make("weight_standardization")(matrix())
    assert y.mean(1).abs().max() < 1e-12
    assert torch.allclose(y.std(1), torch.ones(OUT, dtype=torch.float64), atol=1e-4)


def test_k21_weight_norm_gradient_is_orthogonal_to_the_weight() -> None:
    """K21: ⟨∂L/∂v, v⟩ = 0 in each row."""
    norm, v = make("weight_norm"), matrix().requires_grad_()
    nn.init.ones_(norm.gain)
    (gradient,) = torch.autograd.grad((norm(v) * matrix().flip(0)).sum(), v)
    assert (gradient * v).sum(1).abs().max() < 1e-12


def test_weight_norm_changes_nothing_at_the_start(make_config: MakeConfig) -> None:
    plain, normed = (
        build_model(make_config({} if name is None else {"weight_norm": name})) for name in (None, "weight_norm")
    )
    tokens = torch.arange(24).view(2, 12)
    assert torch.allclose(plain(tokens), normed(tokens), atol=1e-5)
    with torch.no_grad():
        for h in held(normed):
            if h.name.endswith("wq.weight"):
                h.parameter.mul_(3)
    assert torch.allclose(plain(tokens), normed(tokens), atol=1e-5), "the length of v is nothing to it"


@pytest.mark.parametrize(("lr", "limit"), [(0.0, 1e-3), (1e-3, 5e-3), (1e-2, 1e-2)])
def test_k21_spectral_norm_follows_the_weights(make_config: MakeConfig, lr: float, limit: float) -> None:
    """K21: after 50 updates, one power iteration each, every matrix has the norm that its gain says."""
    engine = build_engine(make_config({"weight_norm": "spectral"}), Mesh())
    model = engine.models[0]
    start = {name: matrix.detach().clone() for name, matrix in effective(model).items()}
    for step in range(50):
        tokens = torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(step))
        engine.forward_backward(Batch(tokens))
        engine.clip()
        engine.update(lr)
    for name, matrix in effective(model).items():
        gain = float(model.get_submodule(name).weight_norm.gain)
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(gain, rel=limit), name
        assert float((matrix - start[name]).norm()) > 30 * lr * float(start[name].norm()), "it has moved"


def test_spectral_norm_of_a_step_left_out(make_config: MakeConfig) -> None:
    engine = build_engine(make_config({"weight_norm": "spectral"}), Mesh())
    before = {name: tensor.clone() for name, tensor in engine.shared.items()}
    engine.forward_backward(Batch(torch.randint(96, (4, 13))))
    engine.clip()
    engine.update(1e-2, torch.tensor(True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.shared.items())


def test_singular_vectors_are_in_the_checkpoint(run_config: Callable[..., Config], tmp_path: Path) -> None:
    """A run that goes on is the same, and what is loaded computes with the vectors that training did."""
    runs = []
    for name, stops in (("straight", []), ("again", [4])):
        for last in [*stops, None]:
            keys = {"stop_after": last} if last else {}
            runs.append(train(run_config(name, {"weight_norm": "spectral"}, train=keys)))
    found = differences(runs[-1], runs[0])
    assert max(difference.size for difference in found.values()) == 0
    model, _ = load_checkpoint(runs[0] / "checkpoints" / "step-00000008")
    for name, matrix in effective(model).items():
        gain = float(model.get_submodule(name).weight_norm.gain)
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(gain, rel=3e-2), name


def trained(make_config: MakeConfig, weight_norm: dict[str, Any] | None, steps: int, lr: float) -> Transformer:
    model = {"weight_norm": weight_norm} if weight_norm else {}
    engine = build_engine(make_config(model, optim={"weight_decay": 0.0}), Mesh())
    for step in range(steps):
        engine.forward_backward(Batch(torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(step))))
        engine.clip()
        engine.update(lr)
    return engine.models[0]


def test_norm_loss_is_a_step_towards_rows_of_norm_one(make_config: MakeConfig) -> None:
    """After the optimizer's own: w ← w (1 - lr · 2λ (1 - 1/‖w‖)), of the roles that have it."""
    lr, strength = 1e-2, 0.5
    plain = trained(make_config, None, 1, lr)
    pulled = trained(make_config, {"name": "norm_loss", "strength": strength, "roles": ["q", "down"]}, 1, lr)
    for (name, ours, weight), theirs in zip(weights(pulled), plain.parameters(), strict=True):
        expected = theirs.detach()
        if weight.role in {Role.Q, Role.DOWN}:
            expected = expected * (1 - lr * 2 * strength * (1 - 1 / expected.norm(dim=1, keepdim=True)))
        assert torch.allclose(ours, expected, atol=1e-6), name
    far = trained(make_config, {"name": "norm_loss", "strength": 20.0}, 60, 1e-2)
    for _, parameter, weight in weights(far):
        if weight.site and weight.role in MATRICES:
            assert (parameter.norm(dim=1) - 1).abs().max() < 0.05


@pytest.mark.parametrize("power", [1, 2])
def test_spectral_regularization_is_a_step_towards_norm_one(
    make_config: MakeConfig, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the optimizer's own: W ← W - lr · λ · 2k (σᵏ - 1) σᵏ⁻¹ u vᵀ."""
    monkeypatch.setattr(weight_norms, "POWER_ITERATIONS", 1000)
    lr, strength = 1e-4, 50.0
    plain = trained(make_config, None, 1, lr)
    choice = {"name": "spectral_regularization", "strength": strength, "power": power}
    for (name, ours, weight), theirs in zip(
        weights(trained(make_config, choice, 1, lr)), plain.parameters(), strict=True
    ):
        change = ours.detach() - theirs.detach()
        if weight.site is None or weight.role not in MATRICES:
            assert change.abs().max() == 0, name
            continue
        left, values, right = torch.linalg.svd(theirs.detach())
        slope = 2 * power * (values[0] ** power - 1) * values[0] ** (power - 1)
        expected = -lr * strength * slope
        assert float(left[:, 0] @ change @ right[0]) == pytest.approx(float(expected), rel=0.05), name
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 1
    far = trained(make_config, choice | {"strength": 20.0 / power**3}, 100, 1e-2)
    for name, parameter, weight in weights(far):
        if weight.site and weight.role in MATRICES:
            assert float(torch.linalg.matrix_norm(parameter.detach(), 2)) < 1.5, name


def test_conditioning_lowers_the_condition_number() -> None:
    """Of rows whose lengths differ by far."""
    w = matrix() * torch.logspace(-3, 3, OUT, dtype=torch.float64)[:, None]
    assert torch.linalg.cond(make("weight_conditioning")(w)) < 1e-2 * torch.linalg.cond(w)


@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_roles(name: str, make_config: MakeConfig) -> None:
    """By default all matrices of the blocks; or those of the roles."""
    default = effective(build_model(make_config({"weight_norm": name, "activation": "swiglu"})))
    assert len(default) == 3 * 7 and all(found.startswith("blocks.") for found in default)
    some = effective(build_model(make_config({"weight_norm": {"name": name, "roles": ["embed", "down"]}})))
    assert set(some) == {"embed", *(f"blocks.{layer}.ffn.w_down" for layer in range(3))}


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"weight_norm": "weightnorm"}, "weight_norm"),
        ({"weight_norm": {"name": "weight_norm", "roles": []}}, "at least 1 item"),
        ({"weight_norm": {"name": "weight_norm", "roles": ["norm"]}}, "'norm'"),
        ({"weight_norm": {"name": "weight_norm", "gain": 1}}, "model.weight_norm.gain: unknown key"),
        ({"weight_norm": {"name": "weight_norm", "roles": ["head"]}, "tied": True}, "its table is 'embed'"),
        ({"weight_norm": "weight_norm", "scheme": {"name": "nf"}}, "has its own norm of 'q'; leave it out"),
        ({"weight_norm": "weight_norm", "scheme": {"name": "fixup"}}, "'o' starts at 0"),
    ],
)
def test_what_would_do_nothing_is_refused(model: dict[str, object], problem: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(model)
    assert problem in str(error.value)
