"""Every optimizer against its paper's equations in numpy, or torch's own; what is left out changes nothing."""

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.linalg import norm
from torch import Tensor

from nlm.build import build_engine, load_config
from nlm.config import Config, ConfigError
from nlm.mesh import Mesh
from nlm.optim import OPTIMIZERS
from nlm.optim.adamw_bf16 import rounded
from nlm.optim.agc import adaptive_clipping
from nlm.optim.muon import orthogonal
from nlm.parallel.engine import Engine

MakeConfig = Callable[..., Config]
Array = np.ndarray
Arrays = dict[str, Array]
State = dict[str, Any]

ROOT = Path(__file__).parents[2]
STEPS = 7
LR, DECAY = 3e-2, 0.3
REQUIRED: dict[str, dict[str, Any]] = {"lawn": {"free_steps": 3}}
"""What has no default."""


# The equations, one parameter after another: w, g (changed in place), a state and the step t from 1 -> nothing.


def adam(g: Array, s: State, t: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Array:
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    return s["m"] / (1 - beta1**t) / (np.sqrt(s["v"] / (1 - beta2**t)) + eps)


def lamb(name: str, w: Array, g: Array, s: State, t: int) -> None:
    if w.ndim == 1:
        w -= LR * adam(g, s, t, eps=1e-6)
        return
    u = adam(g, s, t, eps=1e-6) + DECAY * w
    w -= LR * norm(w) / norm(u) * u


def lars(name: str, w: Array, g: Array, s: State, t: int) -> None:
    if w.ndim == 2:
        g = 1e-3 * norm(w) / (norm(g) + DECAY * norm(w) + 1e-8) * (g + DECAY * w)
    s["b"] = 0.9 * s.get("b", 0) + g
    w -= LR * s["b"]


def lion(name: str, w: Array, g: Array, s: State, t: int) -> None:
    m = s.get("m", np.zeros_like(w))
    u = np.sign(0.9 * m + 0.1 * g)
    s["m"] = 0.99 * m + 0.01 * g
    w -= LR * (u + (DECAY * w if w.ndim == 2 else 0))


def cosines(a: Array, b: Array) -> Array:
    return np.abs((a * b).sum(1)) / norm(a, axis=1) / norm(b, axis=1)


def projected(w: Array, g: Array, u: Array) -> tuple[Array, float]:
    """-> the update, and how much of the weight decay."""
    for view in (w.shape, (1, w.size)):
        wv, gv, uv = (x.reshape(view) for x in (w, g, u))
        if cosines(gv, wv).max() < 0.1 / sqrt(view[1]):
            unit = wv / (norm(wv, axis=1, keepdims=True) + 1e-8)
            return (uv - unit * (unit * uv).sum(1, keepdims=True)).reshape(w.shape), 0.1
    return u, 1.0


def adamp(name: str, w: Array, g: Array, s: State, t: int) -> None:
    u, ratio = adam(g, s, t), 0.0
    if w.ndim == 2:
        u, ratio = projected(w, g, u)
    w *= 1 - LR * DECAY * ratio
    w -= LR * u


def sgdp(name: str, w: Array, g: Array, s: State, t: int) -> None:
    s["b"] = 0.9 * s.get("b", 0) + g
    u, ratio = projected(w, g, s["b"]) if w.ndim == 2 else (s["b"], 0.0)
    w *= 1 - LR * DECAY * ratio / (1 - 0.9)
    w -= LR * u


def muon(name: str, w: Array, g: Array, s: State, t: int) -> None:
    if w.ndim == 1 or not name.startswith("blocks."):
        w -= LR * (adam(g, s, t, beta2=0.95) + (DECAY * w if w.ndim == 2 else 0))
        return
    s["b"] = 0.95 * s.get("b", 0) + g
    x = g + 0.95 * s["b"]
    x = x.T / norm(x) if w.shape[0] > w.shape[1] else x / norm(x)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    w -= LR * (0.2 * sqrt(max(w.shape)) * (x.T if w.shape[0] > w.shape[1] else x) + DECAY * w)


def adafactor(name: str, w: Array, g: Array, s: State, t: int) -> None:
    beta2 = 1 - t**-0.8
    if w.ndim == 2:
        s["r"] = beta2 * s.get("r", 0) + (1 - beta2) * (g**2 + 1e-30).sum(1)
        s["c"] = beta2 * s.get("c", 0) + (1 - beta2) * (g**2 + 1e-30).sum(0)
        v = np.outer(s["r"], s["c"]) / s["r"].sum()
    else:
        s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * (g**2 + 1e-30)
        v = s["v"]
    u = g / np.sqrt(v)
    u /= max(1, sqrt((u**2).mean()))
    w -= LR * (u + (DECAY * w if w.ndim == 2 else 0))


def lawn(name: str, w: Array, g: Array, s: State, t: int) -> None:
    if not name.startswith("head"):
        u = adam(g, s, t) + (DECAY * w if w.ndim == 2 else 0)
    elif t <= 3:
        u = adam(g, s, t)
    else:
        tangent = lambda x: x - (x * w).sum() / norm(w) ** 2 * w  # noqa: E731
        u = tangent(adam(tangent(g), s, t))
    size = norm(w)
    w -= LR * (min(1, (t - 3) / 2) if t > 3 else 1) * u
    if name.startswith("head") and t > 3:
        w *= size / norm(w)


def ranger21(ws: Arrays, gs: Arrays, states: dict[str, State], t: int) -> None:
    """With agc = 0.01 and centralize, as its authors have it; λ = DECAY, η = 1e-4."""
    for name, g in gs.items():
        w, s = ws[name], states[name]
        s.setdefault("slow", w.copy())
        if name != "head.weight":
            for rows, of in zip(np.atleast_2d(g), np.atleast_2d(w), strict=True):
                limit = 0.01 * max(norm(of), 1e-3)
                rows *= min(1, limit / norm(rows))
        if g.ndim == 2:
            g -= g.mean(1, keepdims=True)
        g /= g.std(ddof=1) + 1e-8
        s["v"] = 0.999 * s.get("v", 0) + 0.001 * g**2
    corrected = np.concatenate([(s["v"] / (1 - 0.999**t)).ravel() for s in states.values()])
    for name, w in ws.items():
        s = states[name]
        new, old = ("a", "b") if t % 2 else ("b", "a")
        s[new] = 0.9**2 * s.get(new, 0) + (1 - 0.9**2) * gs[name]
        momentum = (2 * s[new] - s.get(old, 0)) / sqrt((1 + 1) ** 2 + 1**2) / (1 - 0.9**t)
        denominator = np.log1p(np.exp(50 * (np.sqrt(s["v"] / (1 - 0.999**t)) + 1e-8))) / 50
        change = momentum / denominator
        if w.ndim == 2:
            change += DECAY / np.sqrt(corrected.mean()) * w
            change += 2 * 1e-4 * (1 - 1 / norm(w, axis=1, keepdims=True)) * w
        w -= LR * change
        if t % 5 == 0:
            s["slow"] += 0.5 * (w - s["slow"])
            w[:] = s["slow"]


EQUATIONS = {
    f.__name__: f for f in (lamb, lars, lion, adamp, sgdp, muon, adafactor, lawn)
}  # the others have tests of their own


def gradients(ws: Arrays, step: int) -> Arrays:
    """Of three kinds in turn: any, at right angles to every row of the weight, and to the weight as a whole."""
    generator = np.random.default_rng(step)
    gs = {}
    for i, (name, w) in enumerate(ws.items()):
        g = generator.normal(size=w.shape) * 10.0 ** generator.integers(-4, 2)
        if w.ndim == 2 and i % 3 == 1:
            g -= (g * w).sum(1, keepdims=True) / norm(w, axis=1, keepdims=True) ** 2 * w
        if w.ndim == 2 and i % 3 == 2:
            g -= (g * w).sum() / norm(w) ** 2 * w
        gs[name] = g
    return gs


def make(make_config: MakeConfig, optim: dict[str, Any], precision: str = "fp64") -> Engine:
    defaults = {"weight_decay": DECAY, "clip": 0.0} | REQUIRED.get(optim["name"], {})
    config = make_config({"bias": True, "activation": "swiglu"}, optim=defaults | optim, train={"precision": precision})
    return build_engine(config, Mesh())


def weights(engine: Engine) -> Arrays:
    return {h.name: h.tensor.numpy().copy() for h in engine.pieces.held}


def give(engine: Engine, gs: Arrays) -> None:
    for h in engine.pieces.held:
        h.parameter.grad = torch.tensor(gs[h.name], dtype=h.tensor.dtype)


def assert_close(engine: Engine, expected: Arrays, rtol: float = 1e-9) -> None:
    for name, w in weights(engine).items():
        assert norm(w - expected[name]) <= rtol * norm(expected[name]), name


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_equation(name: str, make_config: MakeConfig) -> None:
    engine = make(make_config, {"name": name} | ({"warmup_again": 2} if name == "lawn" else {}))
    expected, states = weights(engine), {h.name: State() for h in engine.pieces.held}
    kinds: set[str] = set()
    for t in range(1, STEPS + 1):
        gs = gradients(expected, t)
        give(engine, gs)
        engine.update(LR)
        for parameter, w in expected.items():
            EQUATIONS[name](parameter, w, gs[parameter].copy(), states[parameter], t)
        assert_close(engine, expected)
        kinds |= {kind for kind in ("by_row", "as_whole") if getattr(engine.optimizer, kind, torch.zeros(1)).any()}
    assert kinds == ({"by_row", "as_whole"} if name in {"adamp", "sgdp"} else set())


def test_ranger21(make_config: MakeConfig) -> None:
    engine = make(make_config, {"name": "ranger21", "agc": 0.01, "centralize": True})
    expected, states = weights(engine), {h.name: State() for h in engine.pieces.held}
    for t in range(1, 12):
        gs = gradients(expected, t)
        give(engine, gs)
        engine.update(LR)
        ranger21(expected, gs, states, t)
        assert_close(engine, expected)


def test_adamw_is_torchs(make_config: MakeConfig) -> None:
    engine = make(make_config, {"name": "adamw", "betas": [0.8, 0.9], "eps": 1e-4})
    theirs = {name: torch.tensor(w) for name, w in weights(engine).items()}
    decays = [[p for p in theirs.values() if p.ndim == 2], [p for p in theirs.values() if p.ndim == 1]]
    groups = [{"params": ps, "weight_decay": d} for ps, d in zip(decays, (DECAY, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.8, 0.9), eps=1e-4)
    against(engine, theirs, optimizer, 1e-12)


def test_adamw_of_bfloat16_is_adamw_but_for_rounding(make_config: MakeConfig) -> None:
    half, whole = (make(make_config, {"name": name}, "fp32") for name in ("adamw_bf16", "adamw"))
    start = weights(whole)
    for t in range(1, STEPS + 1):
        for engine in (half, whole):
            give(engine, gradients(start, t))
            engine.update(LR)
    assert {state.dtype for of in half.optimizer.state for state in of.values()} == {torch.bfloat16}
    reached = weights(whole)
    for name, w in weights(half).items():
        assert 0 < norm(w - reached[name]) < 2**-8 * norm(reached[name] - start[name]), name


def test_moments_go_on_below_the_last_bit_of_bfloat16(make_config: MakeConfig) -> None:
    """Of a constant gradient. Rounded to the nearest, v would have stopped where 0.001 g² is half a unit of its own."""
    engine, updates = make(make_config, {"name": "adamw_bf16", "betas": [0.9, 0.999]}, "fp32"), 1000
    for _ in range(updates):
        give(engine, {name: np.full_like(w, 0.5) for name, w in weights(engine).items()})
        engine.update(1e-6)
    reached = 0.25 * (1 - 0.999**updates)
    for h, of in zip(engine.pieces.held, engine.optimizer.state, strict=True):
        mean = of["exp_avg_sq"].double().mean()
        assert abs(mean - reached) < 0.1 * reached / h.tensor.numel() ** 0.5, h.name


def test_rounding_is_right_on_the_average_and_to_a_neighbour() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(50)[None].expand(4096, 50) + 50 * torch.arange(4096)[:, None]
    found = rounded(x.expand_as(keys), keys, torch.tensor(7.0)).double()
    below, above = found.amin(0), found.amax(0)
    assert (below < x).all() and (x < above).all()
    assert ((above - below) <= 2**-7 * x.abs()).all()
    chance = (x.double() - below) / (above - below)
    assert ((found == above).double().mean(0) - chance).abs().max() < 4 * (0.25 / 4096) ** 0.5
    exact = x.bfloat16().float()
    assert torch.equal(rounded(exact, keys[0], torch.tensor(8.0)).float(), exact)


def test_adafactor_is_torchs(make_config: MakeConfig) -> None:
    """Torch's learning rate is always relative, and never above 1 / √t."""
    engine = make(make_config, {"name": "adafactor", "relative": True, "weight_decay": 0.0})
    theirs = {name: torch.tensor(w) for name, w in weights(engine).items()}
    optimizer = torch.optim.Adafactor(theirs.values(), lr=LR, weight_decay=0.0, eps=(1e-30, 1e-3))
    against(engine, theirs, optimizer, 1e-9)


def test_muon_is_torchs(make_config: MakeConfig) -> None:
    """As far as bfloat16 goes, in which torch iterates."""
    engine = make(make_config, {"name": "muon"})
    theirs = {
        name: torch.tensor(w) for name, w in weights(engine).items() if name.startswith("blocks.") and w.ndim == 2
    }
    optimizer = torch.optim.Muon(theirs.values(), lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    against(engine, theirs, optimizer, 2e-2)


def against(engine: Engine, theirs: dict[str, Tensor], optimizer: torch.optim.Optimizer, rtol: float) -> None:
    for t in range(1, STEPS + 1):
        gs = gradients(weights(engine), t)
        give(engine, gs)
        for name, p in theirs.items():
            p.grad = torch.tensor(gs[name])
        engine.update(LR)
        optimizer.step()
    ours = weights(engine)
    for name, p in theirs.items():
        assert norm(ours[name] - p.numpy()) <= rtol * norm(p.numpy()), name


def test_newton_schulz_takes_singular_values_near_one() -> None:
    for shape in ((8, 30), (30, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.6 and values.max() < 1.3


def test_agc_limits_every_row(make_config: MakeConfig) -> None:
    """K23; a row that is small enough is left as it is, and so is the head."""
    engine = make(make_config, {"name": "adamw"})
    ws = weights(engine)
    gs = gradients(ws, 0) | {"blocks.0.attn.wq.weight": 1e-5 * ws["blocks.0.attn.wq.weight"]}
    gs = {name: np.where(np.arange(len(g)) == 3, g.T * 1e-8, g.T).T if g.ndim == 2 else g for name, g in gs.items()}
    give(engine, gs)
    found = engine.pieces.gradients()
    adaptive_clipping(engine.pieces, 0.01)(found)
    clipped = 0
    for h, tensor in zip(engine.pieces.held, found, strict=True):
        rows, before, of = (np.atleast_2d(x) for x in (tensor.numpy(), gs[h.name], ws[h.name]))
        limits = 0.01 * np.maximum(norm(of, axis=1), 1e-3)
        large = (norm(before, axis=1) > limits) & (h.name != "head.weight")
        assert np.allclose(norm(rows, axis=1)[large], limits[large], rtol=1e-12), h.name
        assert np.allclose(cosines(rows, before), 1, rtol=1e-12) and np.array_equal(rows[~large], before[~large]), (
            h.name
        )
        clipped += large.sum()
    assert 0 < clipped < sum(len(np.atleast_2d(g)) for g in gs.values())


def test_centralized_gradients_have_no_mean_and_vectors_keep_theirs(make_config: MakeConfig) -> None:
    engine = make(
        make_config, {"name": "sgdp", "momentum": 0.0, "weight_decay": 0.0, "delta": 1e-9, "centralize": True}
    )
    before = weights(engine)
    gs = gradients(before, 1)
    give(engine, gs)
    engine.update(LR)
    for name, w in weights(engine).items():
        g = gs[name] - (gs[name].mean(1, keepdims=True) if w.ndim == 2 else 0)
        assert np.allclose(before[name] - w, LR * g, rtol=1e-6, atol=1e-12), name


@pytest.mark.parametrize("cause", [{"weight_decay": 0.1}, {"norm_loss": 0.1}], ids=str)
def test_ranger21_changes_the_norm_of_every_matrix(cause: dict[str, float], make_config: MakeConfig) -> None:
    """K24: by its weight decay and by its norm loss, which in the authors' code reach the last parameter only."""
    norms = []
    for own in ({}, cause):
        engine = make(make_config, {"name": "ranger21", "weight_decay": 0.0, "norm_loss": 0.0} | own)
        give(engine, gradients(weights(engine), 1))
        engine.update(LR)
        norms.append({name: norm(w) for name, w in weights(engine).items() if w.ndim == 2})
    for name in norms[0]:
        assert abs(norms[1][name] / norms[0][name] - 1) > 1e-6, name


def everything(engine: Engine) -> dict[str, Tensor]:
    optimizer = engine.optimizer
    state = {
        f"{h.name}.{key}": t for h, s in zip(engine.pieces.held, optimizer.state, strict=True) for key, t in s.items()
    }
    return {h.name: h.tensor for h in engine.pieces.held} | state | optimizer.shared | {"updates": optimizer.updates}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_left_out_is_as_none(name: str, bad: float, make_config: MakeConfig) -> None:
    """Bit by bit, the very first step too, and those after it."""
    engine, other = (make(make_config, {"name": name, "agc": 0.1, "centralize": True}, "fp32") for _ in range(2))
    for t in range(1, STEPS + 1):
        gs = gradients(weights(other), t)
        give(engine, {of: np.where(g < 0, bad, g) for of, g in gs.items()})
        engine.update(LR, left_out=torch.tensor(True))
        compare = everything(other)
        for of, tensor in everything(engine).items():
            assert torch.equal(tensor, compare[of]), f"{of}, {t}"
        for e in (engine, other):
            give(e, gs)
            e.update(LR, left_out=torch.tensor(False))
    assert all(tensor.isfinite().all() for tensor in everything(engine).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_and_decay_of_a_group_are_honoured(
    name: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight whose group has rate 0 stays; weights decay exactly where their group says so."""
    from nlm.anatomy import Group, Role
    from nlm.schemes.base import Scheme

    moved = {}
    for decays in (1.0, 0.0):
        rule = lambda self, w: Group(lr=float(w.role != Role.V), weight_decay=decays * (w.role == Role.UP))  # noqa: B023, E731
        monkeypatch.setattr(Scheme, "group", rule)
        engine = make(make_config, {"name": name})
        before = weights(engine)
        give(engine, gradients(before, 1))
        engine.update(LR)
        moved[decays] = weights(engine)
        assert {of for of, w in moved[decays].items() if np.array_equal(w, before[of])} == {
            of for of in before if of.endswith("wv.weight")
        }
    differ = {of for of, w in moved[1.0].items() if not np.array_equal(w, moved[0.0][of])}
    assert differ == {of for of in before if of.endswith("w_up.weight")}


@pytest.mark.parametrize(
    ("model", "invariant"),
    [
        ({"scheme": {"name": "pre_ln"}, "attention": {"score": "qknorm"}}, ["q", "k"]),
        ({"scheme": {"name": "peri_ln"}}, ["v", "o", "down"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["adamp", "sgdp"])
def test_scale_invariant_weights_are_projected(
    name: str, model: dict[str, Any], invariant: list[str], make_config: MakeConfig
) -> None:
    """K22: in every step; of those that are not, as good as never."""
    engine = build_engine(make_config(model | {"norm_eps": 1e-12}, optim={"name": name}), Mesh())
    kinds = [weight for weight in engine.pieces.weights.values()]
    often = torch.zeros(len(kinds))
    for step in range(5):
        tokens = torch.randint(0, 96, (4, 13), generator=torch.Generator().manual_seed(step))
        engine.models[0](tokens[:, :-1], targets=tokens[:, 1:]).div(48).backward()
        engine.clip()
        engine.update(1e-3)
        often += engine.optimizer.projected / 5  # type: ignore[attr-defined]
    for weight, share in zip(kinds, often.tolist(), strict=True):
        if weight.role in invariant:
            assert share == 1, weight
        elif len(weight.shape) == 1:
            assert share == 0, weight
    others = [share for w, share in zip(kinds, often.tolist(), strict=True) if w.role in {"up", "head"}]
    assert sum(others) / len(others) < 0.25


def test_a_constraint_on_no_weight_is_refused(make_config: MakeConfig) -> None:
    config = make_config({"tied": True}, optim={"name": "lawn", "free_steps": 1})
    with pytest.raises(ValueError, match=r"optim\.roles: the model has no weight of head; choose of embed, q, "):
        build_engine(config, Mesh())


@pytest.mark.parametrize("path", sorted((ROOT / "configs/optimizers").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_are_valid(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"extends = ['{ROOT}/configs/runs/own-text.toml', '{path}']")
    assert load_config(config).optim.name == path.stem


@pytest.mark.parametrize(
    ("optim", "problem"),
    [
        ({"name": "adamq"}, r"optim\.name: no optim name is 'adamq'; did you mean 'adam[pw]'\?"),
        ({"name": "lion", "eps": 1e-8}, r"optim\.eps: unknown key"),
        ({"delta": 0.1}, r"optim\.delta: unknown key"),
        ({"name": "lawn"}, r"optim\.free_steps: missing; give it a value"),
        ({"name": "lawn", "free_steps": 1, "roles": ["norm"]}, r"optim\.roles.*got 'norm'"),
        ({"name": "muon", "momentum": 1.0}, r"optim\.momentum: .*less than 1; got 1\.0"),
        ({"name": "ranger21", "lookahead_every": 0.5}, r"optim\.lookahead_every: .*got 0\.5"),
    ],
)
def test_fields_of_another_optimizer_are_refused(optim: dict[str, Any], problem: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config(optim=optim)
