"""The Triton kernel of AdamW, in Triton's interpreter where there is no GPU: it is torch's AdamW and the projection."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.compiler import set_stance

from nlm.anatomy import Span
from nlm.build import build_engine
from nlm.checkpoint import checkpoints
from nlm.config import Config, ContinualBackpropConfig
from nlm.init import to_unit
from nlm.mesh import Mesh
from nlm.optim import make_optimizer
from nlm.optim.adamw import AdamW
from nlm.parallel.engine import Engine
from nlm.parallel.pieces import Pieces
from nlm.plan.trace import update_cost
from nlm.storage import read_all
from nlm.train import train

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from nlm.kernels import adamw
from nlm.optim.adamw_triton import TritonAdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MakeConfig = Callable[..., Config]
Case = tuple[tuple[int, ...], int | None]
BETAS, EPS, NAN = (0.8, 0.9), 1e-3, float("nan")
TRITON: dict[str, Any] = {"compile": True, "kernels": "triton"}
CASES: list[Case] = [
    *(((), None), ((3,), None), ((9, 5), None), ((2, 32), None), ((0, 4), None)),
    *((shape, axis) for shape in ((5, 7), (1, 33), (33, 1), (16, 16), (0, 4)) for axis in (0, 1)),
]


@pytest.fixture
def eager() -> Iterator[None]:
    """What is compiled runs as it is: its kernels have tests of their own."""
    with set_stance("force_eager"):
        yield


def elsewhere(tensor: Tensor) -> Tensor:
    """The same numbers: of a matrix in every other place of memory, of a vector from an odd address on."""
    if tensor.dim() == 2:
        return torch.stack([tensor, tensor], -1)[..., 0]
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("small", [True, False], ids=["many tiles", "few tiles"])
def test_it_is_torchs_and_the_projection(
    small: bool, dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over updates of which one is left out, of gradients that lie anywhere, each tensor with a group of its own."""
    if small:
        monkeypatch.setattr(adamw, "ELEMENTS", 16)
        monkeypatch.setattr(adamw, "LONGEST", {0: 4, 1: 8})
    cases = CASES if small else [*CASES, ((70, 40), 0), ((3, 1100), 1)]
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    ours = [normal(shape) for shape, _ in cases]
    ms, vs = ([torch.zeros_like(w) for w in ours] for _ in range(2))
    theirs = [w.double() for w in ours]
    rates, decays = torch.rand(2, len(cases), generator=generator, dtype=torch.float64).to(DEVICE)
    each = zip(theirs, rates.tolist(), decays.tolist(), strict=True)
    groups = [{"params": [w], "lr": rate, "weight_decay": decay} for w, rate, decay in each]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    table = adamw.table(ours, ms, vs, [axis for _, axis in cases])
    t = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for step in range(3):
        left_out = torch.tensor(step == 1, device=DEVICE)
        gradients = [normal(shape) * (NAN if left_out else 1) for shape, _ in cases]
        given = gradients if step < 2 else [elsewhere(g) for g in gradients]
        t += ~left_out
        adamw.update(table, given, rates, decays, t, BETAS, EPS, left_out)
        if not left_out:
            for w, g in zip(theirs, gradients, strict=True):
                w.grad = g.double()
            optimizer.step()
            for w, (_, axis) in zip(theirs, cases, strict=True):
                if axis is not None:
                    to_unit(w, axis)
        for case, w, m, v, other in zip(cases, ours, ms, vs, theirs, strict=True):
            state = optimizer.state[other]
            for mine, exact in ((w, other), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
                assert (mine.double() - exact).norm() <= most * exact.norm(), (case, step)


MODELS: list[tuple[dict[str, Any], int]] = [
    ({"scheme": {"name": "ngpt"}}, 20),
    ({"scheme": {"name": "pre_ln"}, "bias": True}, 0),
    ({"scheme": {"name": "deepnorm"}, "tied": True}, 0),
]


@pytest.mark.parametrize("model, projected", MODELS, ids=[m["scheme"]["name"] for m, _ in MODELS])
def test_an_engine_with_it_computes_the_same(
    model: dict[str, Any], projected: int, make_config: MakeConfig, capsys: pytest.CaptureFixture[str], eager: None
) -> None:
    optim = {"betas": BETAS, "eps": EPS, "weight_decay": 0.3}

    def engine(parallel: dict[str, Any]) -> Engine:
        config = make_config(model, optim=optim, train={"precision": "fp64"}, parallel=parallel)
        return build_engine(config, Mesh(device=DEVICE))

    plain, ours = engine({}), engine(TRITON)
    n = len(ours.pieces.held)
    assert capsys.readouterr().out == f"kernels in the update: adamw of {n} tensors, {projected} projected by it\n"
    assert isinstance(plain.optimizer, AdamW) and isinstance(ours.optimizer, TritonAdamW)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for h, other in zip(plain.pieces.held, ours.pieces.held, strict=True):
            g = torch.randn(h.tensor.shape, generator=generator, dtype=torch.float64).to(DEVICE)
            h.parameter.grad, other.parameter.grad = g * (NAN if step == 1 else 1), g.clone()
        for of in (plain, ours):
            of.clip()
            of.update(1e-2, left_out=torch.tensor(step == 1))
    for h, w, state, theirs in zip(
        plain.pieces.held, ours.pieces.tensors, ours.optimizer.state, plain.optimizer.state, strict=True
    ):
        assert state.keys() == theirs.keys()
        for mine, other in ((w, h.tensor), *((state[name], theirs[name]) for name in state)):
            assert (mine - other).norm() <= 1e-12 * other.norm(), h.name
        if (axis := plain.pieces.scheme.unit_axis(h.weight)) is not None:
            assert (w.norm(dim=axis) - 1).abs().max() < 1e-12, h.name
            w *= 2
    doubled = [w.clone() for w in ours.pieces.tensors]
    ours._project(None)
    assert all(map(torch.equal, doubled, ours.pieces.tensors)), "projected once more"


def test_a_run_goes_on_with_it(run_config: MakeConfig, eager: None) -> None:
    """And with it to the end, it is the run without."""
    model, common = {"scheme": {"name": "ngpt"}, "n_layers": 1}, {"precision": "fp64", "steps": 4}
    runs = [
        train(run_config("plain", model, train=common)),
        train(run_config("ours", model, train=common, parallel=TRITON)),
    ]
    train(run_config("both", model, train=common | {"stop_after": 2}))
    runs.append(train(run_config("both", model, train=common, parallel=TRITON)))
    plain, *others = (read_all(checkpoints(run)[-1] / "tensors") for run in runs)
    for other in others:
        assert plain.keys() == other.keys()
        for name, tensor in plain.items():
            assert (other[name] - tensor).norm() <= 1e-9 * tensor.norm(), name


def test_only_whole_slices_are_projected_by_it(make_config: MakeConfig) -> None:
    """Not those of which other ranks have the rest, nor where continual backprop writes before the projection."""
    engine = build_engine(make_config({"scheme": {"name": "ngpt"}}), Mesh(device=DEVICE))
    axes = {i: engine.pieces.scheme.unit_axis(h.weight) for i, h in enumerate(engine.pieces.held)}
    assert set(axes.values()) == {None, 0, 1}
    half = [
        replace(h, tensor=h.tensor[: len(h.tensor) // 2], spans=(Span.part(len(h.tensor), 0, 2), *h.spans[1:]))
        for h in engine.pieces.held
    ]
    config = engine.config.optim
    found = TritonAdamW(Pieces(engine.models, engine.mesh, pieces=half), config)
    assert found.already_unit == {i for i, axis in axes.items() if axis == 1}
    config = config.model_copy(update={"continual_backprop": ContinualBackpropConfig()})
    assert not TritonAdamW(engine.pieces, config).already_unit


def test_it_is_left_to_torch_where_it_cannot_run(make_config: MakeConfig) -> None:
    """What is offloaded lies elsewhere than where the kernels of the run are; and a plan has no numbers at all."""
    config = make_config(parallel=TRITON)
    engine = build_engine(make_config(), Mesh())
    engine.pieces.mesh.device = torch.device("meta")
    assert type(make_optimizer(engine.pieces, config.optim, "triton")) is AdamW
    assert update_cost(config, range(1)) == update_cost(make_config(), range(1))


@pytest.mark.parametrize(
    "shape, axis, first, aligned",
    [
        ((16, 16), 0, 0, True),
        ((16, 16), 0, 1, False),
        ((16, 15), 1, 0, False),
        ((16, 15), None, 0, True),
        ((7,), None, 0, False),
    ],
)
def test_vectors_are_read_where_all_begins_at_multiples_of_them(
    shape: tuple[int, ...], axis: int | None, first: int, aligned: bool
) -> None:
    w = torch.zeros(300, device=DEVICE)[first:][: prod(shape)].view(shape)
    (launch,) = adamw.table([w], [torch.zeros_like(w)], [torch.zeros_like(w)], [axis]).launches
    assert launch.aligned == aligned


def test_a_wrong_one_stops_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    right = adamw.reference
    monkeypatch.setattr(adamw, "reference", lambda *given: right(*given[:-2], 0.1, given[-1]))
    message = r'kernel adamw does not compute what it should.*weight 0 differs.*parallel\.kernels = "inductor"'
    with pytest.raises(RuntimeError, match=message):
        build_engine(make_config(parallel=TRITON), Mesh(device=DEVICE))


COMPILE = """
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from nlm.kernels.adamw import _update, tile_of

pointers = {"addresses": "*i64", "gradients": "*i64", "shapes": "*i64", "tiles": "*i32", "left_out": "*i1"}
for number, (axis, unit), aligned in product(("fp32", "fp64"), ((0, False), (0, True), (1, True)), (True, False)):
    rows, columns = tile_of((500, 500) if unit else (1, 500), axis)
    chosen = dict(ROWS=rows, COLUMNS=columns, AXIS=axis, UNIT=unit, ALIGNED=aligned, BETA_1=0.9, BETA_2=0.95)
    types = {"numbers": "*" + number} | pointers | dict.fromkeys(chosen, "constexpr")
    source = ASTSource(_update, {name: types[name] for name in _update.arg_names}, chosen)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    vectors = "ld.global.v4" if number == "fp32" else "ld.global.v2"
    assert (vectors in made.asm["ptx"]) == aligned, (number, axis, unit, aligned)
"""


def test_it_compiles_for_a_gpu_and_reads_vectors(tmp_path: Path) -> None:
    """Also where there is none: the interpreter lets pass what the compiler refuses."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
