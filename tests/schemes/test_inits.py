"""Inits for the schemes that leave theirs open."""

from collections.abc import Callable

import pytest
import torch

from nlm import build, build_model
from nlm.anatomy import MATRICES, READS, WRITES, Role, Weight
from nlm.config import Config, ConfigError
from nlm.model import Linear, Transformer, weights
from nlm.schemes.inits import INITS

MakeConfig = Callable[..., Config]


def matrices(model: Transformer) -> list[tuple[torch.Tensor, Weight]]:
    return [(p.detach(), w) for _, p, w in weights(model) if w.role in MATRICES]


def test_gpt2(make_config: MakeConfig) -> None:
    for matrix, weight in matrices(
        build_model(make_config({"init": "gpt2", "dim": 64, "ffn_dim": 256, "n_layers": 8}))
    ):
        expected = 0.02 / 4 if weight.role in WRITES else 0.02
        assert float(matrix.std()) == pytest.approx(expected, rel=0.06)


def test_ds_init_shrinks_with_the_layer(make_config: MakeConfig) -> None:
    model = build_model(
        make_config({"init": {"name": "ds_init", "alpha": 0.5}, "scheme": {"name": "post_ln"}, "dim": 64})
    )
    for matrix, weight in matrices(model):
        if weight.site:
            expected = 0.5 * (2 / sum(weight.shape)) ** 0.5 * (weight.site.layer + 1) ** -0.5
            assert float(matrix.std()) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("dim", [32, 128])
def test_mup_of_another_width(make_config: MakeConfig, dim: int) -> None:
    """At the base width nothing changes; at four times it the blocks learn at a quarter of the rate."""
    keys = {"dim": dim, "n_heads": dim // 8, "ffn_dim": 2 * dim}
    model = build_model(make_config(keys | {"init": {"name": "mup", "base_dim": 32}}))
    for matrix, weight in matrices(model):
        group, width = model.scheme.group(weight), dim / 32
        assert group.lr == (1 if weight.role is Role.EMBED else 1 / width)
        assert group.weight_decay == 1
        expected = 32**-0.5 if weight.role is Role.EMBED else weight.shape[1] ** -0.5
        expected *= width**-0.5 if weight.role is Role.HEAD else 1
        assert float(matrix.std()) == pytest.approx(expected, rel=0.1)
    assert {model.scheme.group(w).lr for _, _, w in weights(model) if w.role not in MATRICES} == {1.0}


def test_mup_first_updates_do_not_depend_on_width(make_config: MakeConfig) -> None:
    """A sign step at its own rates moves the logits as much at 256 channels as at 32; at one rate for all, far more."""

    def moved(dim: int, own: bool) -> float:
        keys = {"dim": dim, "n_heads": dim // 8, "ffn_dim": 2 * dim, "init": {"name": "mup", "base_dim": 32}}
        model = build_model(make_config(keys)).double()
        rows = torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(0))
        before = model(rows[:, :-1])
        model(rows[:, :-1], targets=rows[:, 1:]).backward()
        with torch.no_grad():
            for parameter, weight in ((p, w) for _, p, w in weights(model) if w.site and w.role in READS | WRITES):
                parameter -= 1e-6 * (model.scheme.group(weight).lr if own else 1.0) * parameter.grad.sign()
        return float((model(rows[:, :-1]) - before).norm())

    assert 0.5 < moved(256, own=True) / moved(32, own=True) < 2
    assert moved(256, own=False) / moved(32, own=False) > 4


@pytest.mark.parametrize("name", ["orthogonal", "lsuv"])
def test_orthonormal(make_config: MakeConfig, name: str) -> None:
    gain = 2.0
    for matrix, weight in matrices(build_model(make_config({"init": {"name": name, "gain": gain}}))):
        few = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        gram = few @ few.T / few.square().sum() * len(few)
        assert torch.allclose(gram, torch.eye(len(few)), atol=1e-5), weight
        if name == "orthogonal":
            assert float(few[0].norm()) == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("scheme", ["peri_ln", "post_ln", "brainformer"])
def test_lsuv_gives_every_matrix_unit_variance(
    make_config: MakeConfig, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other tokens than those it was scaled with, within its authors' 10 %; what writes the stream less."""
    monkeypatch.setattr(build, "CALIBRATION_ROWS", 64)
    config = make_config({"init": "lsuv", "scheme": {"name": scheme}, "n_layers": 4, "activation": "swiglu"})
    model = build_model(config)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks"):
            module.register_forward_hook(lambda _, __, y, name=name: found.update({name: float(y.std())}))
    model(torch.randint(96, (64, 12), generator=torch.Generator().manual_seed(5)))
    assert len(found) >= 12
    for name, std in found.items():
        expected = 8**-0.5 if name.endswith(("wo", "w_down")) else 1.0
        assert std == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"init": "lsvu"}, "did you mean 'lsuv'?"),
        ({"init": {"name": "gpt2", "std": 1.0}}, "model.init.std: unknown key"),
        ({"init": "gpt2", "scheme": {"name": "deepnorm"}}, "has an init of its own"),
        ({"init": "lsuv", "weight_norm": "weight_norm"}, "a weight norm would undo"),
    ],
)
def test_what_does_not_go_together(model: dict[str, object], problem: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(model)
    assert problem in str(error.value)


@pytest.mark.parametrize("name", INITS)
def test_a_value_depends_on_seed_and_name_only(make_config: MakeConfig, name: str) -> None:
    models = [build_model(make_config({"init": name, "n_layers": n}), seed=3) for n in (2, 3)]
    ours, theirs = (model.get_parameter("blocks.1.ffn.w_up.weight") for model in models)
    assert torch.allclose(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6)
