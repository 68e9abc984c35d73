"""Norms that lose their statistics, and norms that linear layers take in."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nlm import build_model, load_checkpoint
from nlm.anatomy import Site, Span
from nlm.checkpoint import checkpoints, save_checkpoint, verify
from nlm.cli import main
from nlm.config import Config
from nlm.data.rank import RankData
from nlm.fold import difference, folded, readings
from nlm.mesh import Mesh
from nlm.model import Transformer
from nlm.norms import NormSite
from nlm.norms.frozen import FrozenLayerNorm, FrozenRMSNorm, NoNorm
from nlm.norms.token import NormLayer
from nlm.parallel.tensor import TensorParallel
from nlm.remove_norms import end_of_text
from nlm.train import train
from nlm.transition import END, FIRST, ORDINARY, Event, Removal, Tokens, Transition, plan

MakeConfig = Callable[..., Config]
WIDTH, EPS = 16, 1e-5


def frozen(kind: type[FrozenLayerNorm] = FrozenLayerNorm, bias: bool = True) -> FrozenLayerNorm:
    norm = kind(NormSite(Span.whole(WIDTH), TensorParallel(), EPS, bias, Site(0, 1, "ffn", WIDTH))).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return norm


def stream(*shape: int, seed: int = 0) -> Tensor:
    """Of tokens that differ in size and are not about 0."""
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + 0.5) * torch.linspace(1, 3, shape[-1], dtype=torch.float64)[:, None]


def tokens_of(kinds: list[list[int]]) -> Tokens:
    tokens = Tokens(None)
    tokens.kinds = torch.tensor(kinds)
    return tokens


def shaken(config: Config) -> Transformer:
    """In float64, every parameter moved off its initial value."""
    model, generator = build_model(config).double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * (parameter.abs().mean() + 0.1) * noise
    return model


def test_plan_of_gpt2_small() -> None:
    """FFN of layer i at 20 + 2i, Q and K at 20 + 2L + 2i, V three steps apart, the final norm, the tokens' own σ̄."""
    layers = range(12)
    assert plan(12) == [
        *(Event(20 + 2 * i, "ffn", i) for i in layers),
        *(Event(44 + 2 * i, "qk", i) for i in layers),
        *(Event(68 + 3 * i, "v", i) for i in layers),
        *(Event(104, "final", 0), Event(106, "ends", 0), Event(116, "first", 0)),
    ]
    other = plan(2, 5, (1, 2, 3), ("final", "v", "ffn", "qk"))
    assert [event.step for event in other] == [5, 5, 8, 11, 12, 13, 15, 19, 29]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [FrozenLayerNorm, FrozenRMSNorm])
def test_k26_a_frozen_norm_is_linear(kind: type[FrozenLayerNorm], bias: bool) -> None:
    """K26: FakeLN(c x) - b = c (FakeLN(x) - b) for any c. It divides without a bias too; the released code does not."""
    norm, x = frozen(kind, bias), stream(2, 5)
    transition = Transition(norm, tokens_of([[FIRST, 0, 0, END, 0]] * 2), ["ffn"])
    assert not torch.allclose(transition(2 * x), 2 * transition(x)), "its statistics are still there"
    transition.follow()
    transition.over.add("ffn")
    b = 0 if norm.bias is None else norm.bias
    for c in (-3.0, 0.0, 1e-6, 2.0, 1e6):
        assert torch.allclose(transition(c * x) - b, c * (transition(x) - b), rtol=1e-9, atol=1e-9)
        assert torch.allclose(norm(c * x) - b, c * (norm(x) - b), rtol=1e-9, atol=1e-9)
    centred = x if kind is FrozenRMSNorm else x - x.mean(-1, keepdim=True)
    assert transition.sigma is not None
    sigma = transition.sigma[transition.tokens.kinds][..., None]
    assert torch.allclose(transition(x), centred / sigma * norm.weight + b)


def test_sigma_is_the_running_average_of_each_kind() -> None:
    """Against numpy, over steps of two microbatches; validation does not count, nor does what comes after."""
    kinds = [[[FIRST, 0, 0, 0], [FIRST, 0, 0, 0]], [[FIRST, 0, END, 0], [FIRST, END, 0, 0]]]
    transition, expected = Transition(frozen(), tokens_of(kinds[0]), ["ffn"]), np.zeros(3)
    for step in range(6):
        seen: dict[int, list[float]] = {ORDINARY: [], END: [], FIRST: []}
        for micro in range(2):
            x = stream(2, 4, seed=2 * step + micro) * (1 + step)
            here = kinds[micro if step % 2 else 0]
            transition.tokens.kinds = torch.tensor(here)
            transition(x)
            with torch.no_grad():
                transition(1000 * x)
            for row, row_kinds in zip(x.numpy(), here, strict=True):
                for token, kind in zip(row, row_kinds, strict=True):
                    seen[kind].append(np.sqrt(token.var() + EPS))
        transition.follow()
        for kind, stds in seen.items():
            if step == 0:
                expected[kind] = np.mean(stds or seen[ORDINARY])
            elif stds:
                expected[kind] = 0.9 * expected[kind] + 0.1 * np.mean(stds)
        assert transition.sigma is not None
        assert np.allclose(transition.sigma.numpy(), expected, rtol=1e-12)
    transition.over.add("ffn")
    transition(stream(2, 4) * 1e6)
    transition.follow()
    assert np.allclose(transition.sigma.numpy(), expected, rtol=1e-12)


def test_tokens_with_averages_of_their_own(run_config: MakeConfig) -> None:
    tokens, x = Tokens(end_of_text(run_config("unused"))), torch.tensor([[7, 256, 8, 9], [256, 1, 2, 3]])
    segments = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    none = torch.nn.Identity()
    tokens.look(none, (x, None, x, None, None))
    assert tokens.kinds.tolist() == [[FIRST, END, 0, 0], [FIRST, 0, 0, 0]]
    tokens.look(none, (x, None, x, segments, None))
    assert tokens.kinds.tolist() == [[FIRST, END, FIRST, 0], [FIRST, FIRST, 0, 0]]
    tokens.special = {"first"}
    tokens.look(none, (x, None, x, None, None))
    assert tokens.kinds.tolist() == [[FIRST, 0, 0, 0], [FIRST, 0, 0, 0]]
    tokens.special = set()
    tokens.look(none, (x, None, x, segments, None))
    assert tokens.kinds.tolist() == [[0] * 4] * 2


def loss_of(model: Transformer) -> Tensor:
    x = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(3))
    return model(x[:, :-1], None, x[:, 1:], None, None)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_from_real_norms_to_none(norm: str, make_config: MakeConfig) -> None:
    """It begins as the model with real norms, Q and K go over without V, and it ends as the model of frozen ones."""
    real = shaken(make_config({"norm": norm, "bias": True}))
    model = build_model(make_config({"norm": f"frozen_{norm}", "bias": True})).double()
    model.load_state_dict(real.state_dict())
    removal = Removal(model, end=None)
    assert torch.allclose(loss_of(model), loss_of(real), rtol=1e-12)

    read: dict[str, list[Tensor]] = {"wq": [], "wk": [], "wv": []}
    for which in (real, model):
        for name, seen in read.items():
            linear = which.get_submodule(f"blocks.0.attn.{name}")
            linear.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
    removal.follow()
    removal.happen(Event(1, "qk", 0))
    loss_of(real), loss_of(model)
    for name, (theirs, ours) in read.items():
        assert torch.allclose(theirs, ours) == (name == "wv"), name

    for event in plan(3)[:-2]:
        removal.happen(event)
    ends = loss_of(model)
    for event in plan(3)[-2:]:
        removal.happen(event)
    last = loss_of(model)
    assert not torch.allclose(ends, last, rtol=1e-6), "the first token had a σ̄ of its own"
    removal.end()
    assert torch.allclose(loss_of(model), last, rtol=1e-12)
    assert not any("forward" in vars(module) for module in model.modules())


def test_auxiliary_loss_pulls_without_being_logged(make_config: MakeConfig) -> None:
    config = make_config({"norm": "frozen_layernorm"})
    plain, pulled = shaken(config), shaken(config)
    Removal(plain, end=None)
    Removal(pulled, end=None, auxiliary=0.3)
    entered: list[Tensor] = []
    plain.final.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    losses = [loss_of(model) for model in (plain, pulled)]
    assert losses[0] == losses[1]
    std = (entered[0].var(-1, correction=0) + EPS).sqrt()
    expected = losses[0] + 0.3 * (std - std[:, 1:].mean().detach()).square().sum()
    expected.backward()
    losses[1].backward()
    for (name, ours), theirs in zip(pulled.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12), name


FOLDS: list[dict[str, Any]] = [
    {"norm": "layernorm", "bias": True, "activation": "swiglu", "n_kv_heads": 2},
    {"norm": "layernorm", "tied": True},
    {"norm": {"name": "rmsnorm", "one_plus": True}, "tied": True, "bias": True},
    {"norm": {"name": "rmsnorm", "eps_outside": True}, "weight_norm": "weight_standardization"},
    {"norm": "frozen_layernorm", "bias": True, "tied": True},
    {
        "norm": "frozen_layernorm",
        "scheme": {"name": "layerscale"},
        "weight_norm": {"name": "spectral", "roles": ["q", "o"]},
    },
    {
        "norm": "frozen_rmsnorm",
        "scheme": {"name": "branch_scaled"},
        "init": "orthogonal",
        "attention": {"score": "qknorm"},
    },
]


@pytest.mark.parametrize("keys", FOLDS, ids=str)
def test_k26_folding_keeps_the_logits(keys: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    """K26, in float64 and, through a checkpoint, in float32; no gain is left, and of frozen norms nothing."""
    config = make_config(keys)
    model = shaken(config)
    result, its_config = folded(model, config)
    assert difference(model, result, 12) < 1e-11
    result, its_config = folded(model.float(), config)
    assert difference(model, result, 12) < 1e-4

    save_checkpoint(tmp_path / "folded", result, its_config)
    verify(tmp_path / "folded")
    loaded, loaded_config = load_checkpoint(tmp_path / "folded")
    assert loaded_config == its_config and difference(result, loaded, 12) == 0
    norms = [module for module in loaded.modules() if isinstance(module, NormLayer)]
    assert len(norms) == 7 and not any(list(norm.parameters()) for norm in norms)
    assert all(isinstance(norm, NoNorm) for norm in norms) == str(keys["norm"]).startswith("frozen")
    if "layernorm" in str(keys["norm"]):
        read = [loaded.get_submodule(linear).weight for reading in readings(loaded) for linear in reading.linears]
        assert len(read) == 3 * len(readings(loaded)[0].linears) + 3 * len(readings(loaded)[1].linears) + 1
        assert all(weight.mean(1).abs().max() < 1e-7 for weight in read), "a stream shifted as a whole is the same"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scheme": {"name": "post_ln"}}, "model.scheme.name: expected a scheme whose norms are read by linear layers"),
        ({"scheme": {"name": "peri_ln"}, "init": None}, "got 'peri_ln'"),
        ({"norm": "scalenorm"}, "with a gain to fold, got 'scalenorm'"),
        ({"norm": {"name": "layernorm", "gain": False}}, "whose gain is folded already"),
    ],
)
def test_what_does_not_fold(keys: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    config = make_config(keys)
    with pytest.raises(ValueError, match=message):
        folded(build_model(config), config)


def test_a_tied_model_has_no_bias_of_the_head(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"model\.head_bias: a tied model has no head of its own"):
        make_config({"tied": True, "head_bias": True})


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({"scheme": {"name": "olmo2"}}, [], "model.scheme.name: expected a scheme"),
        ({"norm": "dyt"}, [], "model.norm: expected layernorm, or rmsnorm"),
        ({"norm": {"name": "rmsnorm", "eps_outside": True}}, [], "with eps inside the root"),
        ({}, ["--steps", "10"], "--steps: expected at least the 53 that the plan takes, got 10"),
        ({}, ["--start", "1"], "--start: expected 2 or more"),
        ({}, ["--gaps", "2", "-2", "3"], "--gaps: expected three numbers of steps"),
        ({}, ["--order", "ffn,final"], "--order: expected ffn,qk,v,final in any order"),
        ({}, ["--out", "RUN"], "has checkpoints already"),
        ({}, ["parallel.dp_replicate=2"], "parallel.dp_replicate: norms are removed in one process"),
        ({}, ["parallel.compile=true"], "parallel.compile: norms are removed in one process"),
        ({}, ["train.steps=80"], "train.steps=80: for this there is --steps"),
        ({}, ["model.dim=64"], "model.dim: the run to resume has 32"),
        ({}, ["WORLD_SIZE=2"], "expected one process, got WORLD_SIZE = 2"),
    ],
    ids=str,
)
def test_refusals(
    keys: dict[str, Any],
    arguments: list[str],
    message: str,
    run_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train(run_config("run", keys, train={"steps": 1}))
    if "WORLD_SIZE=2" in arguments:
        monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [str(run) if word == "RUN" else word for word in arguments if word != "WORLD_SIZE=2"]
    arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["remove-norms", str(checkpoints(run)[-1]), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing is made for a bad request"


def test_folding_over_something_is_refused(
    run_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(checkpoints(train(run_config("run", train={"steps": 1})))[-1])
    assert main(["fold-norms", checkpoint, "--out", str(tmp_path / "folded")]) == 0
    assert "differ by at most" in capsys.readouterr().out
    assert main(["fold-norms", checkpoint, "--out", str(tmp_path / "folded")]) == 2
    assert "expected a folder that is not there yet" in capsys.readouterr().err


def validation(run: Path) -> float:
    *_, last = (run / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(last)["validation_loss"])


@pytest.fixture
def trained(run_config: MakeConfig, shard: str, tmp_path: Path) -> Callable[..., Path]:
    """`trained({…}, steps, …)`: the checkpoint of a run that has learned something, by the command."""

    def make(keys: dict[str, Any], steps: int, **sections: dict[str, Any]) -> Path:
        defaults = {
            "train": {"steps": steps, "batch_tokens": 512},
            "optim": {"lr": 5e-3, "warmup_steps": 5},
            "data": {"train": shard, "validation": shard},
            "evaluate": {"batches": 8},
        }
        config = run_config(
            "run", keys, **(defaults | {"data": defaults["data"] | sections.pop("data", {})} | sections)
        )
        (tmp_path / "run.toml").write_text(config.to_toml())
        assert main(["train", str(tmp_path / "run.toml")]) == 0
        return checkpoints(tmp_path / "run")[-1]

    return make


def test_end_to_end(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Trained, its norms removed and folded, by the commands. It costs less than 0.1 nat against a model that trains as
    long with its norms, as the rate falls in the same way."""
    before = trained({"bias": True}, 120)
    shutil.copytree(tmp_path / "run", tmp_path / "control")
    further = [
        "train.steps=180",
        "optim.warmup_steps=120",
        "optim.final_lr_frac=0.5",
        f"log.dir={tmp_path / 'control'}",
    ]
    assert main(["train", str(tmp_path / "run.toml"), *further]) == 0
    plan_of = ["--steps", "60", "--start", "10", "--gaps", "1", "1", "2"]
    assert main(["remove-norms", str(before), "--out", str(tmp_path / "out"), *plan_of]) == 0
    assert validation(tmp_path / "run") < 3.2, "below the unigram entropy: it has learned something"
    assert validation(tmp_path / "out") < validation(tmp_path / "control") + 0.1

    (after,) = checkpoints(tmp_path / "out")
    model, config = load_checkpoint(after)
    assert config.model.norm.name == "frozen_layernorm" and config.train.steps == 180
    assert all(isinstance(norm, FrozenLayerNorm) for norm in model.modules() if isinstance(norm, NormLayer))
    assert main(["fold-norms", str(after), "--out", str(tmp_path / "folded")]) == 0
    without, its_config = load_checkpoint(tmp_path / "folded")
    assert its_config.model.norm.name == "none" and difference(model, without, 32) < 1e-4
    assert main(["train", str(tmp_path / "out" / "config.toml"), "train.steps=181"]) == 0, "it is an ordinary run"


def test_removal_begins_and_ends_as_the_model(
    trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is logged before is the trained model's loss, in spite of gains less 1; after it, that of the checkpoint."""
    keys = {"norm": {"name": "rmsnorm", "one_plus": True}, "tied": True, "activation": "swiglu"}
    before = trained(keys, 30, parallel={"microbatches": 2}, data={"document_mask": True})
    plan_of = ["--steps", "25", "--start", "2", "--gaps", "1", "1", "1", "--auxiliary", "0.1"]
    capsys.readouterr()
    assert main(["remove-norms", str(before), "--out", str(tmp_path / "out"), *plan_of]) == 0
    said = dict(re.findall(r"validation loss (without|with).*: ([\d.]+)", capsys.readouterr().out))
    assert float(said["with"]) == pytest.approx(validation(tmp_path / "run"), abs=1e-4)
    assert float(said["without"]) == pytest.approx(validation(tmp_path / "out"), abs=1e-4)
    (after,) = checkpoints(tmp_path / "out")
    model, config = load_checkpoint(after)
    batches = RankData(config, Mesh()).validation_batches()
    assert batches is not None
    with torch.no_grad():
        losses = [(float(model(*batch.arguments())), int(batch.n_targets())) for batch in batches]
    total, targets = map(sum, zip(*losses, strict=True))
    assert total / targets == pytest.approx(validation(tmp_path / "out"), abs=1e-4)
