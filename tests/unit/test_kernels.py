"""The Triton kernels, in Triton's interpreter where there is no GPU: each computes what its reference does, and a block
with them computes what it does without."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from nlm import build_model
from nlm.build import build_engine
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.parallel.compile import compile_model

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from nlm.kernels import residual, rotary, sphere
from nlm.kernels.check import REFERENCES, TOLERANCES, Like, check, differences
from nlm.kernels.fuse import fuse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MakeConfig = Callable[..., Config]
KERNELS = torch.ops.nlm
DTYPES = torch.float32, torch.bfloat16
NORMS = [("none", 0), ("rms", 1), ("rms", 0), ("layer", 2), ("layer", 1), ("layer", 0)]
"""Kind, and how many of gain and bias there are."""


def learned(dim: int, dtype: torch.dtype, n: int) -> list[Like | None]:
    return [Like((dim,), dtype) if i < n else None for i in range(2)]


def assert_right(kernel: Any, *arguments: Any) -> None:
    found = list(differences(kernel, DEVICE, *arguments))
    assert len(found) > 1
    for what, dtype, difference in found:
        assert difference < TOLERANCES[dtype], (what, arguments)


@pytest.fixture(autouse=True)
def fewer_programs_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (residual, rotary, sphere):
        monkeypatch.setattr(module, "PROGRAMS", 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind_2, n_2", NORMS)
def test_residual_sums_and_the_norms_beside_them(kind_2: str, n_2: int, dtype: torch.dtype) -> None:
    for i, (kind_1, n_1) in enumerate(NORMS):
        dim, alpha = (33, None) if i % 2 else (16, Like((), torch.float32, learned=False))
        stream = torch.float32 if alpha else dtype
        vectors = *learned(dim, dtype, n_1), *learned(dim, stream, n_2)
        x, f = Like((2, 3, dim), stream), Like((2, 3, dim), dtype)
        assert_right(KERNELS.residual.default, x, f, alpha, *vectors, kind_1, kind_2, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [7, 33])
def test_a_step_on_the_sphere(dim: int, dtype: torch.dtype) -> None:
    h = Like((2, 3, dim), torch.float32)
    assert_right(KERNELS.sphere_step.default, h, Like(h.shape, dtype), Like((dim,), torch.float32), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [6, 8])
def test_rotary_positions_and_the_norms_of_heads(head_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    x, table = Like((2, 3, 3, head_dim), dtype), Like((3, 1, head_dim), torch.float32, learned=False)
    gain, scale = Like((head_dim,), dtype), Like((3, head_dim), torch.float32)
    for own, scales, least in product([(None, None), (gain, 1e-5)], (None, scale), (None, 1e-12)):
        out = torch.float32 if scales else dtype
        assert_right(KERNELS.rotary.default, x, table, table, own[0], scales, own[1], least, interleaved, out)


def test_rows_may_lie_apart() -> None:
    wide = torch.randn(3, 5, 12, device=DEVICE)
    x, f = wide[..., 1:8], wide.transpose(0, 1)[..., :7].transpose(0, 1)
    given = x, f, None, None, None, None, None, "none", "rms", 1e-5
    for ours, theirs in zip(KERNELS.residual(*given), residual.reference(*given), strict=True):
        torch.testing.assert_close(ours, theirs)
    q = wide.view(3, 5, 3, 4)[:, :, 1:].transpose(0, 1)
    table = torch.randn(3, 1, 4, device=DEVICE)
    given = q, table, table, None, None, None, 1e-12, False, torch.float32
    torch.testing.assert_close(KERNELS.rotary(*given), REFERENCES[KERNELS.rotary.default](*given))


MODELS: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"scheme": {"name": "pre_ln"}}, {"residual": 1, "rotary": 2}),
    ({"scheme": {"name": "deepnorm"}, "norm": "layernorm", "bias": True}, {"residual": 2, "rotary": 2}),
    ({"scheme": {"name": "peri_ln"}, "position": "rope_interleaved"}, {"residual": 2, "rotary": 2}),
    ({"scheme": {"name": "normformer"}, "attention": {"score": "rms_qknorm_head"}}, {"residual": 1, "rotary": 2}),
    ({"scheme": {"name": "post_ln"}, "position": "learned"}, {"residual": 2}),
    ({"scheme": {"name": "ngpt"}, "attention": {"score": "qknorm"}}, {"rotary": 2, "sphere_step": 2}),
]


@pytest.mark.parametrize("model, expected", MODELS, ids=[m["scheme"]["name"] for m, _ in MODELS])
def test_a_block_finds_them_and_computes_the_same(
    model: dict[str, Any], expected: dict[str, int], make_config: MakeConfig
) -> None:
    config = make_config({"norm": "rmsnorm", "n_layers": 1} | model)
    said: list[str] = []

    def gradients(precision: str, compiled: bool) -> Tensor:
        torch._dynamo.reset()
        built = build_model(config, device=DEVICE)
        built.precision = precision
        if compiled:
            compile_model(built, "aot_eager", "triton", said.append)
        tokens = torch.arange(6, device=DEVICE).view(2, 3)
        built(tokens, targets=tokens.flip(1)).backward()
        return torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None])

    exact, rounded = gradients("fp32", compiled=False), gradients("bf16", compiled=False)
    assert (gradients("fp32", compiled=True) - exact).norm() < 1e-5 * exact.norm()
    assert (gradients("bf16", compiled=True) - exact).norm() < 1.5 * (rounded - exact).norm()
    assert said == 2 * ["kernels in a block: " + ", ".join(f"{n} x {name}" for name, n in expected.items())]


def test_they_are_for_pairs_of_all_shapes(make_config: MakeConfig) -> None:
    model = {"architecture": "encoder_decoder", "n_layers": 1, "scheme": {"name": "peri_ln"}, "norm": "rmsnorm"}
    plain, fused = (build_model(make_config(model), device=DEVICE) for _ in range(2))
    said: list[str] = []
    torch._dynamo.reset()
    compile_model(fused, "aot_eager", "triton", said.append, dynamic=True)
    for n_rows, source_len, seq_len in ((2, 3, 4), (3, 5, 2), (4, 4, 4)):
        source, target = (torch.arange(n_rows * n, device=DEVICE).view(n_rows, n) for n in (source_len, seq_len))
        gradients = []
        for built in (plain, fused):
            built.zero_grad()
            built(target, source, targets=target.flip(1)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None]))
        assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    assert said == ["kernels in a block: 2 x residual, 2 x rotary", "kernels in a block: 3 x residual, 2 x rotary"]


def test_other_sums_are_left_alone() -> None:
    """Of numbers, of a vector that is added to all rows, and beside no norm."""
    found: list[dict[str, int]] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(fuse(graph.graph))
        return graph.forward

    def sums(x: Tensor, bias: Tensor, number: Tensor) -> Tensor:
        return F.rms_norm(x + bias, (8,), None, 1e-5) + (number + 1) + x.flip(0)

    torch._dynamo.reset()
    given = torch.randn(2, 3, 8, device=DEVICE), torch.randn(8, device=DEVICE), torch.ones((), device=DEVICE)
    torch.testing.assert_close(torch.compile(sums, backend=backend, fullgraph=True)(*given), sums(*given))
    assert found == [{}]


def test_a_wrong_kernel_stops_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    check.cache_clear()
    monkeypatch.setitem(REFERENCES, KERNELS.residual.default, lambda *given: residual.reference(*given[:-1], 0.1))
    built = build_model(make_config({"n_layers": 1}), device=DEVICE)
    compile_model(built, "aot_eager", "triton")
    with pytest.raises(Exception, match=r'does not compute what it should.*parallel\.kernels = "inductor"'):
        built(torch.arange(12, device=DEVICE).view(1, 12))


def test_where_they_cannot_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"parallel\.kernels: 'triton' is put into compiled blocks"):
        make_config(parallel={"kernels": "triton"})
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"parallel\.kernels: 'triton' needs a GPU, got cpu"):
        build_engine(make_config(parallel={"kernels": "triton", "compile": True}), Mesh())
