"""The same on one GPU. Run by `pytest tests/gpu` on a machine that has one."""

import json
from collections.abc import Callable

import pytest
import torch

from nlm import SCHEMES, build_model
from nlm.build import build_engine
from nlm.config import Config
from nlm.float8 import LEAST_CAPABILITY, multiply_in_float8
from nlm.mesh import Mesh
from nlm.optim import OPTIMIZERS
from nlm.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

RunConfig = Callable[..., Config]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_gradients_are_those_of_the_cpu(scheme: str, run_config: RunConfig) -> None:
    config = run_config("unused", {"scheme": {"name": scheme}, "activation": "swiglu"})
    tokens = torch.arange(64).view(2, 32)
    results = []
    for device in ("cpu", "cuda"):
        model = build_model(config, device=device)
        logits = model(tokens.to(device))
        logits.square().mean().backward()
        results.append([logits.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "kernels"), [*((name, "inductor") for name in OPTIMIZERS), ("adamw", "triton")])
def test_an_update_is_that_of_the_cpu_and_waits_for_nothing(name: str, kernels: str, make_config: RunConfig) -> None:
    own = {"free_steps": 1} if name == "lawn" else {}
    optim, scheme = {"name": name, "agc": 0.1, "centralize": True} | own, "ngpt" if kernels == "triton" else "pre_ln"
    results = []
    for device in map(torch.device, ("cpu", "cuda")):
        parallel = {"compile": True, "kernels": kernels if device.type == "cuda" else "inductor"}
        config = make_config({"scheme": {"name": scheme}}, optim=optim, train={"precision": "fp64"}, parallel=parallel)
        engine, generator = build_engine(config, Mesh(device=device)), torch.Generator().manual_seed(0)
        for _ in range(3):
            for h in engine.pieces.held:
                h.parameter.grad = torch.randn(h.tensor.shape, generator=generator, dtype=h.tensor.dtype).to(device)
            left_out = torch.tensor(False, device=device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                engine.clip()
                engine.update(1e-2, left_out)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append([tensor.cpu() for tensor in engine.pieces.tensors])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_products_in_float8_are_those_emulated(compiled: bool, make_config: RunConfig) -> None:
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip("needs a GPU with float8, of CUDA capability 8.9")
    config = make_config(train={"precision": "fp8", "batch_tokens": 64, "seq_len": 16})
    results = []
    for device in ("cpu", "cuda"):
        linear = build_model(config, device=device).blocks["0"].ffn.w_up
        multiply_in_float8(linear, emulate=device == "cpu")
        if compiled and device == "cuda":
            linear = torch.compile(linear, fullgraph=True, dynamic=False)
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        y = linear(x)
        y.backward(x.detach().flatten(0, 1).sum(0)[0] * y.detach())
        results.append([t.detach().float().cpu() for t in (y, x.grad, linear.weight.grad)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_learns_on(precision: str, compiled: bool, run_config: RunConfig) -> None:
    sections = {"parallel": {"compile": compiled}, "optim": {"schedule": "constant", "lr": 3e-3}}
    train(run_config("run", train={"precision": precision, "steps": 20}, **sections))
    run = train(run_config("run", train={"precision": precision, "steps": 60}, **sections))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 60 and losses[-1] < losses[0] - 1
