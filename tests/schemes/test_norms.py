"""What each norm layer promises."""

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from nlm import NORMS, build_model
from nlm.anatomy import Site, Span
from nlm.config import Config
from nlm.norms import NormSite
from nlm.norms.elementwise import ELN, DyISRU, DyT
from nlm.norms.token import LayerNorm, NormLayer, PartialRMSNorm, RMSNorm, ScaleNorm
from nlm.parallel.tensor import TensorParallel

WIDTH = 16
Norm = type[NormLayer]
MakeConfig = Callable[..., Config]


def make(norm: Norm, width: int = WIDTH, eps: float = 1e-5, **fields: object) -> NormLayer:
    """In float64, at the values that it starts from."""
    at = NormSite(Span.whole(width), TensorParallel(), eps, site=Site(0, 1, "ffn", width))
    layer = norm(at, **fields).double()
    for name, parameter in layer.named_parameters():
        torch.nn.init.constant_(parameter, layer.initial[name])
    return layer


def tokens(rows: int = 5, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("norm", "shift", "stretch"), [(LayerNorm, True, True), (RMSNorm, False, True), (DyT, False, False)]
)
def test_invariances(norm: Norm, shift: bool, stretch: bool) -> None:
    """LayerNorm removes mean and length, RMSNorm the length only, an elementwise curve nothing."""
    layer, x = make(norm, eps=1e-14), tokens()
    assert torch.allclose(layer(x + 3), layer(x), atol=1e-9) == shift
    assert torch.allclose(layer(7 * x), layer(x), atol=1e-9) == stretch


def test_layernorm_gradient_removes_two_directions() -> None:
    x = tokens(1).requires_grad_()
    layer = make(LayerNorm, eps=1e-14)
    y = layer(x)
    (gradient,) = torch.autograd.grad((y * tokens(1).flip(-1)).sum(), x)
    assert gradient.sum().abs() < 1e-12
    assert (gradient * y).sum().abs() < 1e-10


@pytest.mark.parametrize("outside", [False, True])
def test_k16_eps_of_rmsnorm(outside: bool) -> None:
    """K16: at x = 1e-4 the two places of eps are far apart."""
    eps = 1e-5
    layer = make(RMSNorm, eps=eps, eps_outside=outside)
    x = torch.full((1, WIDTH), 1e-4, dtype=torch.float64)
    expected = 1e-4 / (1e-4 + eps) if outside else 1e-4 / (1e-8 + eps) ** 0.5
    assert torch.allclose(layer(x), torch.full_like(x, expected), rtol=1e-12)


def test_one_plus_gain_is_stored_less_one() -> None:
    layer = make(RMSNorm, one_plus=True)
    assert layer.weight.abs().max() == 0
    assert torch.allclose(layer(tokens()), make(RMSNorm)(tokens()))


def test_rms_at_zero_has_a_finite_gradient() -> None:
    for fields in ({}, {"eps_outside": True}):
        x = torch.zeros(1, WIDTH, dtype=torch.float64, requires_grad=True)
        make(RMSNorm, **fields)(x).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


def test_partial_rms_sees_the_first_channels_only() -> None:
    layer, x = make(PartialRMSNorm, p=0.25, eps=1e-14), tokens()
    assert torch.allclose(layer(x)[:, :4].square().mean(-1), torch.ones(5, dtype=torch.float64))
    changed = x.clone()
    changed[:, 4:] *= 2
    assert torch.allclose(layer(changed)[:, 4:], 2 * layer(x)[:, 4:])
    assert make(PartialRMSNorm, width=8).counted == 1, "at least one channel, where D · p is less"


def test_scalenorm_gives_every_token_the_length_g() -> None:
    layer = make(ScaleNorm)
    assert torch.allclose(layer(tokens()).norm(dim=-1), torch.full((5,), 4.0, dtype=torch.float64)), "sqrt(D) at first"
    assert [tuple(p.shape) for p in layer.parameters()] == [(1,)]
    small = torch.full((1, WIDTH), 1e-7, dtype=torch.float64)
    assert torch.allclose(layer(small), small * 4 / 1e-5), "below eps it divides by eps"


def test_k17_dyisru_is_rmsnorm_seen_from_one_channel() -> None:
    """K17: with β the sum of the other channels' squares."""
    x, layer = tokens(1), make(DyISRU)
    expected = make(RMSNorm, eps=0.0)(x)
    for i in range(WIDTH):
        others = x[0].square().sum() - x[0, i].square()
        torch.nn.init.constant_(layer.log_beta, log(others))
        assert abs(layer(x)[0, i] - expected[0, i]) < 5e-7


def test_k17_eln_is_layernorm_seen_from_one_channel() -> None:
    """K17: with β = C s² and around the mean, both of the other channels."""
    x, layer = tokens(1), make(ELN)
    expected = make(LayerNorm, eps=1e-14)(x)
    for i in range(WIDTH):
        others = torch.cat([x[0, :i], x[0, i + 1 :]])
        torch.nn.init.constant_(layer.log_beta, log(WIDTH * others.var(correction=0)))
        assert abs(layer(x - others.mean())[0, i] - expected[0, i]) < 5e-7


@pytest.mark.parametrize(
    ("dim", "attn", "other"), [(64, 1.0, 1.0), (1024, 1.0, 1.0), (3000, 1.0, 0.5), (4096, 0.8, 0.2), (9000, 0.2, 0.05)]
)
def test_k28_alpha_of_dyt_by_width(dim: int, attn: float, other: float) -> None:
    for kind, expected in (("attn", attn), ("ffn", other), ("stack", other)):
        at = NormSite(Span.whole(8), TensorParallel(), 1e-5, site=Site(0, 1, kind, dim))  # type: ignore[arg-type]
        assert DyT(at).initial["alpha"] == expected
    assert DyT(at, alpha=0.5).initial["alpha"] == 0.5


@pytest.mark.parametrize("norm", sorted({*NORMS} - {"batchnorm"}))
def test_k28_elementwise_norms_scale_the_embedding(norm: str, make_config: MakeConfig) -> None:
    """K28: a learned sqrt(D) where nothing else brings the stream to unit size; but one only."""
    scales = {
        scheme: [
            p.item()
            for name, p in build_model(make_config({"norm": norm, "scheme": {"name": scheme}})).named_parameters()
            if name == "token.scale"
        ]
        for scheme in ("pre_ln", "without_tears")
    }
    assert scales == {
        "pre_ln": [pytest.approx(32**0.5)] if norm in {"dyt", "dyisru", "eln"} else [],
        "without_tears": [],
    }


@pytest.mark.parametrize("norm", ["dyisru", "eln"])
@pytest.mark.parametrize("scheme", ["pre_ln", "sub_ln", "post_ln"])
def test_beta_starts_where_the_slope_is_that_of_rmsnorm(norm: str, scheme: str, make_config: MakeConfig) -> None:
    """At 0, 1/rms of what each site reads, at any depth and also where the text is another than it was set with."""
    model = build_model(make_config({"norm": norm, "scheme": {"name": scheme}, "n_layers": 6}))
    found = []

    def see(layer: DyISRU, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach()
        found.append(float(x.square().mean().sqrt()) * layer.height * float(layer.log_beta.detach().exp()) ** -0.5)

    for module in model.modules():
        if isinstance(module, DyISRU):
            module.register_forward_pre_hook(see)
    model(torch.randint(96, (32, 12), generator=torch.Generator().manual_seed(4)))
    assert len(found) == 12 + 12 * (scheme == "sub_ln") + (scheme != "post_ln")
    assert all(slope == pytest.approx(1, abs=0.25) for slope in found)
