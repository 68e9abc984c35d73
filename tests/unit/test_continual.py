"""Continual backprop: which hidden units are replaced, and what of them."""

from collections.abc import Callable
from hashlib import blake2b
from math import floor
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nlm.batch import Batch
from nlm.build import build_engine
from nlm.compare import differences
from nlm.config import Config, ConfigError
from nlm.mesh import Mesh
from nlm.optim import OPTIMIZERS
from nlm.parallel.compile import compile_model
from nlm.parallel.engine import Engine
from nlm.train import train

Array = NDArray[np.float64]
MakeConfig = Callable[..., Config]
RATE, MATURITY, DECAY, STEPS, DIM, UNITS = 0.06, 2, 0.9, 7, 32, 48
RULE = {"replacement_rate": RATE, "maturity": MATURITY, "decay": DECAY}
UP, DOWN = ("w_up.weight", "w_up.bias", "w_gate.weight", "w_gate.bias"), "w_down.weight"


def engine_of(
    make_config: MakeConfig, rule: dict[str, float] | None, model: dict[str, Any] | None = None, **sections: Any
) -> Engine:
    optim = {"lr": 1e-2} | sections.pop("optim", {}) | ({"continual_backprop": rule} if rule else {})
    model = {"n_layers": 2, "bias": True, "activation": "swiglu"} | (model or {})
    train = {"precision": "fp64"} | sections.pop("train", {})
    return build_engine(make_config(model, optim=optim, train=train, **sections), Mesh())


def backward(engine: Engine, step: int) -> None:
    engine.forward_backward(Batch(torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(step))))
    engine.clip()


def state(engine: Engine) -> dict[str, Array]:
    """Parameters, and what the optimizer keeps of each, by their names in a checkpoint."""
    found = {}
    for h, own in zip(engine.pieces.held, engine.optimizer.state, strict=True):
        found[h.name] = h.tensor.numpy()
        half = torch.bfloat16  # which numpy has not
        found |= {f"{h.name}.{field}": (t.float() if t.dtype == half else t).numpy() for field, t in own.items()}
    return found


def copied(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}


def word(x: int) -> int:
    """What `nlm.random` makes of a number, in Python's own integers."""
    for _ in range(2):
        x &= 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def new_row(name: str, unit: int, update: int, rms: float) -> Array:
    key = int.from_bytes(blake2b(f"0:{name}".encode(), digest_size=8).digest(), "little") & 0xFFFFFFFF
    key = word(word(key + word(update)) + word(unit))
    return np.array([NormalDist(0, rms).inv_cdf((word(key + word(j)) + 0.5) / 2**32) for j in range(DIM)])


@pytest.mark.parametrize("model", [{}, {"activation": "relu", "bias": False}, {"init": "orthogonal"}], ids=str)
def test_it_is_the_papers_rule(model: dict[str, Any], make_config: MakeConfig) -> None:
    """Against a transcription: the optimizer's step is that of an engine without it, from the same state."""
    sections = {"train": {"batch_tokens": 48}, "parallel": {"microbatches": 2}}
    engine, plain = engine_of(make_config, RULE, model, **sections), engine_of(make_config, None, model, **sections)
    initial = {name: float(np.sqrt(np.mean(array**2))) for name, array in state(engine).items()}
    hidden: dict[str, list[Array]] = {}
    for name, module in engine.models[0].named_modules():
        if name.endswith("w_down"):
            reads = hidden[name.removesuffix(".w_down")] = []
            module.register_forward_pre_hook(lambda _, x, reads=reads: reads.append(x[0].detach().numpy()))
    utility, age = ({ffn: np.zeros(UNITS) for ffn in hidden} for _ in range(2))
    owed = dict.fromkeys(hidden, 0.0)
    replaced = n_eligible = 0
    for step in range(1, STEPS + 1):
        for name, array in state(plain).items():
            array[...] = state(engine)[name]
        for e in (engine, plain):
            backward(e, step)
            e.update(1e-2)
        expected = copied(state(plain))
        for ffn, reads in hidden.items():
            a = np.abs(np.concatenate(reads)).mean((0, 1))
            reads.clear()
            age[ffn] += 1
            use = a * np.abs(expected[f"{ffn}.{DOWN}"]).mean(0)
            utility[ffn] = DECAY * utility[ffn] + (1 - DECAY) * use
            estimate = utility[ffn] / (1 - DECAY ** age[ffn])
            eligible = np.flatnonzero(age[ffn] > MATURITY)
            owed[ffn] += RATE * len(eligible)
            n_eligible += len(eligible)
            n = floor(owed[ffn])
            owed[ffn] -= n
            for unit in sorted(eligible, key=lambda i: estimate[i])[:n]:
                utility[ffn][unit] = age[ffn][unit] = 0
                for name, array in expected.items():
                    if name.startswith(tuple(f"{ffn}.{up}" for up in UP)):
                        array[unit] = 0
                    elif name.startswith(f"{ffn}.{DOWN}"):
                        array[:, unit] = 0
                    if name in {f"{ffn}.w_up.weight", f"{ffn}.w_gate.weight"}:
                        array[unit] = new_row(name, int(unit), step, initial[name])
                replaced += 1
            for field, own in (("utility", utility[ffn]), ("age", age[ffn]), ("owed", [owed[ffn]])):
                np.testing.assert_allclose(engine.shared[f"{ffn}.{field}"], own, rtol=1e-10, atol=1e-14)
        for name, array in state(engine).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-10, atol=1e-13, err_msg=f"{name}, {step}")
    assert replaced + sum(owed.values()) == pytest.approx(RATE * n_eligible), "fractions add up"
    assert replaced > 2 * STEPS


def fresh(engine: Engine) -> dict[str, Array]:
    """[F] bool of each sublayer: the units that the last update has replaced."""
    return {name: age.numpy() == 0 for name, age in engine.shared.items() if name.endswith(".age")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_optimizer_keeps_of_a_new_unit_is_as_at_the_start(name: str, make_config: MakeConfig) -> None:
    own = {"lawn": {"free_steps": 3}}.get(name, {})
    engine = engine_of(make_config, RULE, optim={"name": name, **own})
    for step in range(1, 5):
        backward(engine, step)
        engine.update(1e-3)
    now, kept = state(engine), 0
    for ffn, new in fresh(engine).items():
        assert new.any()
        ffn = ffn.removesuffix(".age")
        for of in (*UP, DOWN):
            weight = now[f"{ffn}.{of}"]
            for field in engine.optimizer.state[[h.name for h in engine.pieces.held].index(f"{ffn}.{of}")]:
                tensor = now[f"{ffn}.{of}.{field}"]
                slices, of_weight = (t[:, new] if of == DOWN else t[new] for t in (tensor, weight))
                assert np.array_equal(slices, of_weight if field in engine.optimizer.copies else 0 * slices)
                kept += np.count_nonzero(tensor)
        assert (now[f"{ffn}.w_up.weight"][new] != 0).all() and (now[f"{ffn}.{DOWN}"][:, new] == 0).all()
    assert kept or name == "adafactor"  # which keeps nothing of single weights


def test_a_new_unit_takes_away_what_the_old_one_wrote_and_nothing_else(make_config: MakeConfig) -> None:
    tokens = torch.arange(24).view(2, 12)
    engine = engine_of(make_config, RULE | {"maturity": 0})
    model = engine.models[0]
    backward(engine, 0)
    before = {h.name: h.tensor.clone() for h in engine.pieces.held}
    engine.update(0.0)
    found = model(tokens)
    for h in engine.pieces.held:
        h.tensor.copy_(before[h.name])
    whole = model(tokens)
    for name, new in fresh(engine).items():
        assert new.any()
        model.get_submodule(f"{name.removesuffix('.age')}.w_down").weight.data[:, torch.from_numpy(new)] = 0
    assert torch.allclose(found, model(tokens), rtol=1e-12, atol=1e-12) and not torch.allclose(found, whole, rtol=1e-3)


def test_a_step_left_out_changes_nothing(make_config: MakeConfig) -> None:
    """Bit by bit, a bad one too, and the very first, and those after it."""
    engine, other = (engine_of(make_config, RULE) for _ in range(2))
    for step in range(1, STEPS):
        if step in (1, 4):
            good = copied(state(engine))
            engine.models[0].embed.weight.data[:5] = float("nan")
            backward(engine, step)
            for name, array in state(engine).items():
                array[...] = good[name]
            engine.update(1e-2, left_out=torch.tensor(True))
        for e in (engine, other):
            backward(e, step)
            e.update(1e-2, left_out=torch.tensor(False))
        mine, theirs = (state(e) | {name: t.numpy() for name, t in e.shared.items()} for e in (engine, other))
        for name, array in mine.items():
            assert np.array_equal(array, theirs[name]), f"{name}, {step}"
    assert any(new.any() for new in fresh(engine).values())


def test_units_that_do_equally_little_go_in_order(make_config: MakeConfig) -> None:
    engine = engine_of(make_config, RULE | {"maturity": 0}, {"activation": "relu"})
    for block in engine.models[0].blocks.values():
        block.ffn.w_up.bias.data[5:] = -1e3  # and so never active
    backward(engine, 0)
    engine.update(0.0)
    assert all(np.flatnonzero(new).tolist() == [5, 6] for new in fresh(engine).values())


@pytest.mark.parametrize("how", ["recompute", "compile", "evaluation between"])
def test_how_a_step_is_computed_does_not_matter(how: str, make_config: MakeConfig) -> None:
    straight = engine_of(make_config, RULE)
    other = engine_of(make_config, RULE, parallel={"recompute": "block"} if how == "recompute" else {})
    if how == "compile":
        torch._dynamo.reset()
        compile_model(other.models[0], "aot_eager")
    for step in range(STEPS):
        for engine in (straight, other):
            if engine is other and how == "evaluation between":
                engine.loss(Batch(torch.arange(26).view(2, 13)))
            backward(engine, step)
            engine.update(1e-2)
    assert any(new.any() for new in fresh(straight).values())
    for name, tensor in straight.shared.items():
        torch.testing.assert_close(other.shared[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_run_goes_on_where_it_was(run_config: Callable[..., Config]) -> None:
    """Bit by bit; with another rule it is another run."""
    optim = {"continual_backprop": RULE}
    straight = train(run_config("straight", optim=optim))
    train(run_config("again", optim=optim, train={"stop_after": 5}))
    with pytest.raises(ConfigError, match=r"optim\.continual_backprop: the run to resume has \{.*, the config None"):
        train(run_config("again"))
    again = train(run_config("again", optim=optim))
    found = differences(again, straight, number_by_number=True)
    assert not [kind for kind, difference in found.items() if difference.first]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"scheme": {"name": "ngpt"}}, r"keeps every hidden unit's column of 'down' at norm 1"),
        ({"scheme": {"name": "nf"}}, r"has a norm of its own of up, gate, down"),
        ({"weight_norm": "spectral"}, r"'spectral' of gate, up, down would make something else"),
        ({"weight_norm": {"name": "weight_norm", "roles": ["q", "down"]}}, r"'weight_norm' of down would make"),
    ],
    ids=str,
)
def test_what_would_not_stay_as_it_is_put_there_is_refused(
    model: dict[str, Any], problem: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=problem):
        engine_of(make_config, RULE, model)


@pytest.mark.parametrize(
    "weight_norm", ["norm_loss", "spectral_regularization", {"name": "weight_norm", "roles": ["q", "k", "v", "o"]}]
)
def test_what_leaves_the_weights_alone_is_not(weight_norm: Any, make_config: MakeConfig) -> None:
    engine = engine_of(make_config, RULE, {"weight_norm": weight_norm})
    for step in range(4):
        backward(engine, step)
        engine.update(1e-3)
    assert any(new.any() for new in fresh(engine).values())
    assert all(np.isfinite(array).all() for array in state(engine).values())


@pytest.mark.parametrize("bad", [{"replacement_rate": 0.0}, {"replacement_rate": 1.0}, {"maturity": -1}, {"rate": 1}])
def test_bad_values_are_refused(bad: dict[str, float], make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.continual_backprop\.{next(iter(bad))}: "):
        engine_of(make_config, RULE | bad)
