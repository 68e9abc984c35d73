"""What the papers claim of their schemes, on models small enough for a CPU and on real text."""

from collections.abc import Callable
from math import log, log2

import pytest
import torch
from measures import SEQ_LEN, layer_gradients, loss, slope, update
from torch import Tensor, nn

from nlm import NORMS, SCORES, build_model
from nlm.anatomy import MATRICES, Role, Site, Span
from nlm.config import Config, OptimConfig
from nlm.init import init
from nlm.model import Transformer, weights
from nlm.optim import adamw, projection
from nlm.parallel.pieces import Pieces
from nlm.parallel.tensor import TensorParallel
from nlm.schemes.base import Scheme, Slots
from nlm.schemes.peri_ln import PeriLN
from nlm.schemes.pre_ln import PreLN
from nlm.scores import Heads
from nlm.scores.softmax import QKNorm, Softmax
from nlm.signals import Signals

MakeConfig = Callable[..., Config]


# DeepNorm and Post-LN


@pytest.mark.parametrize(
    ("n_layers", "alpha", "beta"),
    [(6, 1.861, 0.380), (12, 2.213, 0.3195), (24, 2.632, 0.269), (100, 3.761, 0.188), (1000, 6.687, 0.106)],
)
def test_k1_deepnorm_constants(build: Callable[..., Transformer], n_layers: int, alpha: float, beta: float) -> None:
    """K1, and that α reaches every residual as one number and β the weights."""
    model = build("deepnorm", n_layers, dim=16, ffn_dim=16)
    alphas = {float(b) for name, b in model.named_buffers() if name.endswith("residual.alpha")}
    assert len(alphas) == 1 and alphas.pop() == pytest.approx(alpha, abs=5e-4)
    std = {w.role: model.scheme.std(w) for _, _, w in weights(model) if w.role in MATRICES and w.site}
    assert std[Role.V] / std[Role.Q] == pytest.approx(beta, abs=5e-4)
    gain = std[Role.V] / std[Role.Q]
    assert 2 * n_layers * 2 * gain**2 / (2 * n_layers) ** 0.5 == pytest.approx(1)


@pytest.mark.parametrize(("scheme", "low", "high"), [("deepnorm", -0.1, 0.1), ("post_ln", 1.5, 3.0)])
def test_k2_first_update_over_depth(
    build: Callable[..., Transformer], text: Tensor, scheme: str, low: float, high: float
) -> None:
    """K2: how much one SGD step on the block matrices moves the output, as a power of depth."""
    depths = [8, 16, 32, 64, 128]
    assert low < slope(depths, [update(build(scheme, n_layers), text) for n_layers in depths]) < high


def test_k3_gradients_are_level_over_depth(build: Callable[..., Transformer], text: Tensor) -> None:
    """K3: mean gradient of the first eighth of 64 layers over that of the last."""
    gradients = layer_gradients(build("deepnorm", 64), text)
    assert 0.9 < gradients[:8].mean() / gradients[-8:].mean() < 1.1


def test_k4_beta_scales_the_weights_that_carry_values(build: Callable[..., Transformer]) -> None:
    """K4: drawn once with β, for V, O and the FFN; Q, K and the gate keep gain 1."""
    model = build("deepnorm", 32, activation="swiglu", ffn_dim=64)
    spread: dict[Role, list[Tensor]] = {}
    for _, parameter, weight in weights(model):
        if weight.site and weight.role in MATRICES:
            spread.setdefault(weight.role, []).append(parameter.detach().flatten())
    std = {role: torch.cat(values).std().item() for role, values in spread.items()}
    beta = (8 * 32) ** -0.25
    for role, value in std.items():
        expected = 1.0 if role in {Role.Q, Role.K, Role.GATE} else beta
        assert value / std[Role.Q] == pytest.approx(expected, rel=0.02), role


# nGPT


def test_k5_everything_has_unit_norm(build: Callable[..., Transformer], text: Tensor) -> None:
    """K5: every stream vector at once, every matrix slice on the stream's axis after every step, no decay at all."""
    model = build("ngpt", 6, activation="swiglu", position="rope")
    streams: list[Tensor] = []
    for block in model.blocks.values():
        block.register_forward_hook(lambda _, __, out: streams.append(out[0].detach()))
    pieces = Pieces([model])
    optimizer = adamw(((p, w) for _, p, w in weights(model)), model.scheme, OptimConfig(lr=1e-3))
    project = projection(pieces)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    for _ in range(3):
        loss(model, text).backward()
        optimizer.step()
        project()
        optimizer.zero_grad()
        for name, parameter, weight in weights(model):
            if weight.role in MATRICES:
                axis = 0 if weight.role in {Role.O, Role.DOWN} else 1
                assert (parameter.norm(dim=axis) - 1).abs().max() < 1e-6, name
    assert len(streams) == 18
    for x in streams:
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-5


def test_k6_attention_logits_have_unit_spread(
    build: Callable[..., Transformer], text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K6: std of sqrt(Dh) q·k is 1 in every head, where one norm over all heads together would give 1/H."""
    seen: list[tuple[Tensor, Tensor]] = []
    attend = Softmax.attend

    def record(self: Softmax, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((q.detach(), k.detach()))
        return attend(self, q, k, v, mask)

    monkeypatch.setattr(Softmax, "attend", record)
    build("ngpt", 4, n_heads=8, dim=256, position="rope")(text[:, :-1])
    spread = []
    for q, k in seen:
        scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5  # as softmax divides by sqrt(Dh)
        off = ~torch.eye(SEQ_LEN, dtype=torch.bool)
        spread.append(scores[..., off].std(dim=(0, 2)))
    assert torch.stack(spread).mean(0).sub(1).abs().max() < 0.1


@pytest.mark.parametrize(("n_layers", "field", "expected"), [(6, None, 0.05), (40, None, 1 / 40), (6, 0.2, 0.2)])
def test_k7_alpha_starts_at_its_effective_value(
    make_config: MakeConfig, n_layers: int, field: float | None, expected: float
) -> None:
    """K7: the equation sees 0.05 or 1/L, the optimizer a parameter of 1/sqrt(D)."""
    scheme = {"name": "ngpt"} | ({} if field is None else {"alpha": field})
    model = build_model(make_config({"scheme": scheme, "n_layers": n_layers}))
    for block in model.blocks.values():
        for residual in (block.attn_residual, block.ffn_residual):
            assert torch.allclose(residual.part("alpha"), torch.tensor(expected), rtol=1e-6)
            assert torch.allclose(residual.alpha, torch.tensor(model.config.dim**-0.5), rtol=1e-6)


# Peri-LN


def test_k8_stream_variance_grows_by_two_a_layer(build: Callable[..., Transformer], text: Tensor) -> None:
    """K8: 1 + 2l after l layers, within 25 %; a single draw at D=64 strays further."""
    model = build("peri_ln", 64, dim=128, ffn_dim=512)
    model.signals = Signals(queries=1)
    model(text[:, :-1])
    variance = model.signals.rms()[:, 1, 2].square()
    expected = 1 + 2 * torch.arange(1, 65)
    assert (variance / expected - 1).abs().max() < 0.25


def test_k9_output_matrices_have_no_scale(build: Callable[..., Transformer], text: Tensor) -> None:
    """K9: W_o and W_down × 100 change nothing in Peri-LN, and much in Pre-LN."""
    change = {}
    for scheme in ("peri_ln", "pre_ln"):
        model = build(scheme, 6, norm_eps=1e-12)
        before = model(text[:, :-1])
        with torch.no_grad():
            for _, parameter, weight in weights(model):
                if weight.role in {Role.O, Role.DOWN}:
                    parameter *= 100
        change[scheme] = (model(text[:, :-1]) - before).abs().max().item()
    assert change["peri_ln"] < 1e-4 < 0.1 < change["pre_ln"]


class BarePreLN(PreLN):
    """Pre-LN without its final norm, the case that Peri-LN's gradient bound is stated against."""

    def slots(self, site: Site) -> Slots:
        return {}


def test_k10_gradients_do_not_follow_the_activations(make_config: MakeConfig) -> None:
    """K10: W_up × 1000 multiplies the gradient of W_down by more than 1000 in bare Pre-LN, by < 1.2 in Peri-LN."""

    def gradient(scheme: Scheme, factor: float) -> float:
        config = make_config({"dim": 64, "ffn_dim": 256, "n_layers": 1})
        model = init(
            Transformer(
                config.model,
                12,
                scheme,
                NORMS["layernorm"],
                SCORES["softmax"],
            ),
            0,
        )
        ffn = model.blocks["0"].ffn
        with torch.no_grad():
            ffn.w_up.weight *= factor
        generator = torch.Generator().manual_seed(0)
        logits = model(torch.randint(96, (4, 12), generator=generator))
        (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
        return float(ffn.w_down.weight.grad.norm())

    assert gradient(BarePreLN(), 1000) > 1000 * gradient(BarePreLN(), 1)
    assert gradient(PeriLN(), 1000) < 1.2 * gradient(PeriLN(), 1)


# NormFormer and Sub-LN


def test_k11_a_head_scale_of_zero_removes_the_head(build: Callable[..., Transformer], text: Tensor) -> None:
    """K11: λ_i = 0 is the same as W_o without head i's columns: the scale acts on heads, before W_o."""
    model, without = build("normformer", 2), build("normformer", 2)
    head, head_dim = 2, model.config.head_dim
    with torch.no_grad():
        for block in model.blocks.values():
            block.attn.slots["heads"].scale[head] = 0
        for block in without.blocks.values():
            block.attn.wo.weight[:, head * head_dim : (head + 1) * head_dim] = 0
    assert torch.allclose(model(text[:, :-1]), without(text[:, :-1]), atol=1e-6)
    assert not torch.allclose(model(text[:, :-1]), build("normformer", 2)(text[:, :-1]), atol=1e-2)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("scheme", ["normformer", "sub_ln"])
def test_k12_the_inner_norm_follows_the_activation(
    build: Callable[..., Transformer], text: Tensor, scheme: str, activation: str
) -> None:
    """K12: what W_down reads has mean 0 and rms 1 in every token."""
    model = build(scheme, 3, activation=activation, norm_eps=1e-12)
    read: list[Tensor] = []
    for block in model.blocks.values():
        block.ffn.w_down.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    model(text[:, :-1])
    for x in read:
        assert x.mean(-1).abs().max() < 1e-5
        assert (x.square().mean(-1) - 1).abs().max() < 1e-4


# QKNorm


def test_k13_only_directions_of_queries_count(build: Callable[..., Transformer], text: Tensor) -> None:
    """K13: W_q × 1000 changes nothing with QKNorm, and everything with plain softmax."""
    change = {}
    for score in ("qknorm", "softmax"):
        model = build("pre_ln", 3, attention={"score": score})
        before = model(text[:, :-1])
        with torch.no_grad():
            for block in model.blocks.values():
                block.attn.wq.weight *= 1000
        change[score] = (model(text[:, :-1]) - before).abs().max().item()
    assert change["qknorm"] < 1e-4 < 0.05 < change["softmax"]


def test_k13_logits_are_bounded_by_g() -> None:
    """K13: opposite keys, however long, differ by 2g in log-probability, and no two keys by more."""
    score = QKNorm(Heads(Span.whole(1), Span.whole(1), head_dim=8, seq_len=5, norm_eps=1e-5, tp=TensorParallel()))
    generator = torch.Generator().manual_seed(0)
    q = 1e4 * torch.randn(1, 5, 1, 8, generator=generator, dtype=torch.float64)
    k = 1e4 * torch.randn(1, 5, 1, 8, generator=generator, dtype=torch.float64)
    k[:, 0], k[:, 1] = q[:, 4], -q[:, 4]
    nn.init.constant_(score.g, 3.0)
    attended = score.attend(
        q, k, torch.eye(5, dtype=torch.float64)[None, :, None]
    )  # values that name their key: [1 5 1 5]
    logits = attended[0, 4, 0].log()
    assert float(logits[0] - logits[1]) == pytest.approx(6.0, abs=1e-9)
    assert float(logits.max() - logits.min()) <= 6.0 + 1e-9


@pytest.mark.parametrize(("seq_len", "g0"), [(64, 11.977), (128, 13.989), (1024, 19.999)])
def test_k14_g0(make_config: MakeConfig, seq_len: int, g0: float) -> None:
    """K14: log2(T² - T), one float32 number a layer, or the number of the config."""
    train = {"seq_len": seq_len, "batch_tokens": seq_len}
    model = build_model(make_config({"attention": {"score": "qknorm"}}, train=train))
    scales = [p for name, p in model.named_parameters() if name.endswith("score.g")]
    assert len(scales) == model.config.n_layers
    for g in scales:
        assert g.shape == (1,) and g.dtype == torch.float32
        assert g.item() == pytest.approx(g0, abs=1e-3) == pytest.approx(log2(seq_len**2 - seq_len), abs=1e-3)
    chosen = build_model(make_config({"attention": {"score": "qknorm", "g0": 7.0}}))
    assert chosen.get_parameter("blocks.0.attn.score.g").item() == 7.0


def test_causal_uniform_attention_has_the_known_entropy() -> None:
    """K27: equal scores give the mean entropy ln(T!)/T over rows, 3.878 at T=128."""
    score = Softmax(Heads(Span.whole(1), Span.whole(1), head_dim=4, seq_len=128, norm_eps=1e-5, tp=TensorParallel()))
    q = torch.zeros(1, 128, 1, 4, dtype=torch.float64)
    p = score.attend(q, q, torch.eye(128, dtype=torch.float64)[None, :, None])[0, :, 0]
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1).mean()
    assert float(entropy) == pytest.approx(sum(log(t) for t in range(1, 129)) / 128, abs=1e-9)
    assert float(entropy) == pytest.approx(3.878, abs=1e-3)
