"""Products in float8 are right to float8's rounding, wherever they are taken; what cannot be is refused."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nlm import build_model
from nlm.anatomy import READS, WRITES
from nlm.config import Config, ConfigError
from nlm.float8 import multiply_in_float8, refuse_missing_float8
from nlm.model import Linear, Transformer
from nlm.parallel.compile import compile_model
from nlm.parallel.recompute import recompute
from nlm.train import train

MakeConfig = Callable[..., Config]
FLOAT8 = {"precision": "fp8", "batch_tokens": 64, "seq_len": 16}
MODEL = {"activation": "swiglu", "bias": True}
ROUNDING = 2**-4
"""The largest relative error of an e4m3 number: half the step of its three bits."""


def model_of(config: Config) -> Transformer:
    model = build_model(config)
    model.precision = "fp8"
    multiply_in_float8(model, emulate=True)
    return model


def step(model: Transformer, vocab_size: int = 96) -> list[Tensor]:
    """Loss and gradients."""
    tokens = torch.randint(vocab_size, (4, 17), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("weight_norm", [None, {"name": "weight_standardization", "roles": ["up"]}])
def test_products_are_right_to_a_rounding(weight_norm: dict[str, Any] | None, make_config: MakeConfig) -> None:
    """Forward and both gradients, element by element, against float64; and not better than float8 can be."""
    linear = model_of(make_config({"weight_norm": weight_norm, **MODEL}, train=FLOAT8)).blocks["0"].ffn.w_up
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 32, generator=generator, requires_grad=True)
    y = linear(x)
    gradient = torch.randn(y.shape, generator=generator).bfloat16()
    y.backward(gradient)
    weight = (linear.weight if weight_norm is None else linear.weight_norm(linear.weight)).detach().double()
    rows, g = x.detach().double().flatten(0, 1), gradient.double().flatten(0, 1)
    assert y.dtype == torch.bfloat16
    pairs = [(y.flatten(0, 1) - linear.bias, rows, weight.T), (x.grad.flatten(0, 1), g, weight)]
    if weight_norm is None:
        pairs.append((linear.weight.grad, g.T, rows))
    for found, a, b in pairs:
        error = (found.double() - a @ b).abs()
        assert (error <= (2 * ROUNDING + 2**-6) * (a.abs() @ b.abs())).all()
        assert error.norm() > 0.02 * (a @ b).norm()
    assert torch.allclose(linear.bias.grad.double(), g.sum(0), rtol=0.02, atol=0.05)


def test_a_divided_sum_is_rounded_alike(make_config: MakeConfig) -> None:
    """Tensor parallel ranks have parts of the rows that are summed over, with other largest elements."""
    linear = model_of(make_config(MODEL, train=FLOAT8)).blocks["0"].ffn.w_up
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    weight = linear.weight.detach()
    whole = linear.multiply(x, weight, None).float()
    parts = [linear.multiply(a, w, None).float() for a, w in zip(x.chunk(2, 1), weight.chunk(2, 1), strict=True)]
    assert (sum(parts) - whole).norm() < 2**-8 * whole.norm() < 0.2 * (x @ weight.T - whole).norm()


def test_only_the_blocks_matrices_are_taken(make_config: MakeConfig) -> None:
    """The head is as under "bf16"."""
    model = model_of(make_config(MODEL, train=FLOAT8))
    assert model(torch.zeros(1, 16, dtype=torch.int64)).dtype == torch.bfloat16
    taken = {
        module.roles["weight"]: module.multiply is not F.linear
        for module in model.modules()
        if isinstance(module, Linear)
    }
    assert {role for role, is_taken in taken.items() if is_taken} == READS | WRITES
    assert {role for role, is_taken in taken.items() if not is_taken} == {"head"}


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_or_computed_again_is_the_same(mode: str, compiled: bool, make_config: MakeConfig) -> None:
    """A block is one graph."""
    config = make_config(MODEL, train=FLOAT8)
    expected = step(model_of(config))
    recompute(model := model_of(config), mode)
    if compiled:
        torch.compiler.reset()
        compile_model(model, backend="aot_eager")
    found = step(model)
    assert len(found) == 1 + len(list(model.parameters())) and all(p.dtype == torch.float32 for p in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_run(run_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Near the bf16 run, but not it, and it says that it is emulated."""
    losses = {}
    for precision in ("bf16", "fp8"):
        run = train(run_config(precision, train={"precision": precision}))
        losses[precision] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert ("emulated" in capsys.readouterr().out) == (precision == "fp8")
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02) and losses["fp8"] != losses["bf16"]
    assert losses["fp8"][-1] < losses["fp8"][0]


@pytest.mark.parametrize(
    ("model", "sections", "problem"),
    [
        ({"dim": 40, "ffn_dim": 48, "head_dim": 16}, {}, r"model\.dim: 'fp8' expects .* multiple of 16, got 40"),
        ({"ffn_dim": 72}, {}, r"model\.ffn_dim: .* multiple of 16, got 72"),
        ({"n_kv_heads": 1}, {}, r"model\.head_dim: .* n_kv_heads · head_dim .* multiple of 16, got 8"),
        ({}, {"parallel": {"tp": 2}}, r"model\.ffn_dim: .* multiple of 16 · parallel\.tp = 32, got 48"),
        ({}, {"train": {"batch_tokens": 36, "seq_len": 12}}, r"train\.seq_len: .* tokens in a microbatch, got 36"),
        (
            {"n_layers": 4},
            {"parallel": {"pp": 2, "schedule": "zbv", "microbatches": 4}},
            r"train\.precision: 'zbv' puts off",
        ),
    ],
)
def test_refused(model: dict[str, Any], sections: dict[str, Any], problem: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config(model, **{**sections, "train": FLOAT8 | sections.get("train", {})})


def test_it_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    refuse_missing_float8("bf16", gpu)
    with pytest.raises(ValueError, match=r"train\.precision: .* 8\.9, got NVIDIA A100-SXM4-80GB, 8\.0; set 'bf16'"):
        refuse_missing_float8("fp8", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    refuse_missing_float8("fp8", gpu)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'nlm\[float8\]'"):
        refuse_missing_float8("fp8", torch.device("cpu"))
