"""`nlm probe`: its numbers against the same computed by hand, its verdicts against trainings, its pictures and JSON."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from nlm import NORMS, SCHEMES, SCORES, build_model
from nlm.anatomy import MATRICES, WRITES, Site, Weight
from nlm.batch import Batch
from nlm.cli import main
from nlm.config import Config
from nlm.data import TokenShard
from nlm.model import weights
from nlm.probe.measure import Probe, Signal, depths, first_rows, measure, narrowed, probe
from nlm.probe.report import save, text
from nlm.probe.verdict import FAILS, NEVER, SURVIVES, UNCERTAIN, gradient_ratio, judge
from nlm.schemes.base import Branch, Learned, Norm, Residual, Scheme, xavier
from nlm.statistics.curves import depth_figure, layer_figure

RunConfig = Callable[..., Config]


@pytest.fixture
def table_m1(run_config: RunConfig) -> Callable[..., Config]:
    """The set-up in which depth was measured: D=64, 4 heads, GELU with F=4D, learned positions, bytes of plays."""

    def make(scheme: str, n_layers: int) -> Config:
        model = {"dim": 64, "ffn_dim": 256, "position": "learned", "n_layers": n_layers, "scheme": {"name": scheme}}
        return run_config("run", model, train={"seq_len": 64})

    return make


@pytest.fixture
def table_m3(run_config: RunConfig) -> Callable[..., Config]:
    """The set-up of the trainings that the verdict is held against: D=32, 2 heads, T=32, 200 steps."""

    def make(scheme: str, n_layers: int = 32, **optim: Any) -> Config:
        model = {"n_heads": 2, "ffn_dim": 128, "position": "learned", "n_layers": n_layers, "scheme": {"name": scheme}}
        return run_config("run", model, train={"steps": 200, "batch_tokens": 256}, optim={"lr": 3e-3} | optim)

    return make


@dataclass(frozen=True, kw_only=True)
class Gated(Scheme):
    """Every branch times a learned number that starts at 0."""

    def residual(self, site: Site) -> Residual:
        return Residual(gated, gate=Learned((), 0.0))


def gated(x: Tensor, f: Branch, gate: Tensor) -> Tensor:
    return x + gate * f(x)


@dataclass(frozen=True, kw_only=True)
class ZeroWrites(Scheme):
    """Matrices that write the stream start at 0, and so does the gradient of all others."""

    def residual(self, site: Site) -> Residual:
        return Residual(added, norm=Norm())

    def std(self, weight: Weight) -> float:
        return 0.0 if weight.role in WRITES else super().std(weight)


def added(x: Tensor, f: Branch, norm: Branch) -> Tensor:
    return x + f(norm(x))


@dataclass(frozen=True, kw_only=True)
class NoNorm(Scheme):
    """Nothing holds the stream; `gain` is that of the initialization."""

    gain: float = 1.0

    def residual(self, site: Site) -> Residual:
        return Residual(plain)

    def std(self, weight: Weight) -> float:
        return xavier(weight, self.gain) if weight.site else super().std(weight)


def plain(x: Tensor, f: Branch) -> Tensor:
    return x + f(x)


# What is measured


def test_k2_deepnorm_first_update_does_not_depend_on_depth(table_m1: Callable[..., Config]) -> None:
    """K2 from 8 to 128 layers; for a sign step the exponent is 1/2 (table M1). K3 at 64 layers."""
    seen = probe(table_m1("deepnorm", 128))
    assert list(seen.signals) == [8, 16, 32, 64, 128] and seen.dim == 64
    assert abs(seen.exponents["sgd"]) < 0.1
    assert seen.exponents["sign"] == pytest.approx(0.5, abs=0.05)
    assert seen.exponents["stream_variance"] == pytest.approx(0, abs=1e-3)
    assert gradient_ratio(seen.signals[64]) == pytest.approx(1, abs=0.1)


def test_k2_post_ln_first_update_grows_with_depth(
    table_m1: Callable[..., Config], shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K2 on the rows of tests/schemes/test_claims.py, since Post-LN's exponent depends on the draw (docs/probe.md)."""
    rows = torch.from_numpy(np.asarray(TokenShard(shard).tokens[:130], np.int64)).view(2, 65)
    monkeypatch.setattr("nlm.probe.measure.first_rows", lambda _: (Batch(rows), ""))
    assert 1.5 < probe(table_m1("post_ln", 128)).exponents["sgd"] < 3


def test_the_stream_grows_by_two_a_layer(table_m1: Callable[..., Config]) -> None:
    """K8: with variance 1 + 2l the exponent is near 1."""
    assert probe(table_m1("peri_ln", 32)).exponents["stream_variance"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("scheme", ["deepnorm", "pre_ln", "ngpt"])
def test_the_numbers_are_those_of_autograd_and_of_a_step(run_config: RunConfig, scheme: str) -> None:
    config = run_config("run", {"n_layers": 5, "scheme": {"name": scheme}})
    batch, _ = first_rows(config)
    model = build_model(config).double()
    seen = measure(model, batch)

    model = build_model(config).double()
    x = model.embed(batch.inputs)
    streams = [model.stem(x)]
    rotary = model.rotary(batch.inputs.shape[1])
    for block in model.blocks.values():
        streams.append(block(streams[-1], rotary, None, None, None)[0])
    logits = model.logits(model.head(model.final(streams[-1])))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    names, matrices, layers = zip(
        *((name, p, w.site.layer) for name, p, w in weights(model) if w.site and w.role in MATRICES), strict=True
    )
    gradients = torch.autograd.grad(loss, [*matrices, *streams])
    of_matrices, of_streams = gradients[: len(names)], gradients[len(names) :]

    assert seen.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert seen.stream_grad_norm == pytest.approx([float(g.norm()) for g in of_streams[1:]], rel=1e-9)
    by_layer = [torch.cat([g.flatten() for g, l in zip(of_matrices, layers, strict=True) if l == n]) for n in range(5)]
    assert seen.grad_norm == pytest.approx([float(g.norm()) for g in by_layer], rel=1e-9)
    rms = [float(x.detach().square().mean().sqrt()) for x in streams]
    assert seen.rms[:, 0, 0] == pytest.approx(rms[:-1], rel=1e-9) and seen.rms[:, 1, 2] == pytest.approx(rms[1:])
    assert not seen.off.any()

    for name, lr, direction in (("sgd", 1e-6, lambda g: g), ("sign", 1e-8, torch.sign)):
        stepped = build_model(config).double()
        optimizer = torch.optim.SGD([stepped.get_parameter(name) for name in names], lr=lr)
        for parameter, g in zip(optimizer.param_groups[0]["params"], of_matrices, strict=True):
            parameter.grad = direction(g)
        optimizer.step()
        after: list[Tensor] = []
        for block in stepped.blocks.values():
            block.register_forward_hook(lambda _, __, out, after=after: after.append(out[0].detach()))
        stepped(batch.inputs)
        change = [
            float((a - b.detach()).norm() / b.detach().norm()) / lr for a, b in zip(after, streams[1:], strict=True)
        ]
        assert seen.update[name] == pytest.approx(change, rel=1e-3), name


def test_a_probe_leaves_the_model_as_it_was(run_config: RunConfig) -> None:
    config = run_config("run")
    model, untouched = build_model(config).double(), build_model(config).double()
    measure(model, first_rows(config)[0])
    assert model.signals is None
    for (name, parameter), before in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.allclose(parameter, before, rtol=0, atol=1e-14), name


@pytest.mark.parametrize(
    ("table", "name"),
    [(t, n) for t in (SCHEMES, NORMS, SCORES) for n in t],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_everything_that_has_a_name_can_be_probed(run_config: RunConfig, table: dict[str, Any], name: str) -> None:
    """With the gates and grouped heads that a large model has, and kept documents apart."""
    choice = {"scheme": {"name": name}} if table is SCHEMES else {"norm": name}
    if table is SCORES:
        choice = {"attention": {"score": name}}
    if name == "batchnorm":
        choice |= {"architecture": "encoder"}
    shape = {"dim": 96, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 240, "activation": "swiglu", "n_layers": 4}
    config = run_config("run", shape | choice, data={"document_mask": True})
    seen = probe(config, width=32)
    assert seen.dim == 32 and list(seen.signals) == [4, 8, 16]
    for signal in seen.signals.values():
        assert all(np.isfinite(v).all() for v in (signal.rms, signal.grad_norm, *signal.update.values()))
    assert name in text(seen, judge(seen)) or table is not SCHEMES


def test_depths() -> None:
    assert depths(1000) == [62, 125, 250, 500, 1000] and depths(128) == [8, 16, 32, 64, 128]
    assert depths(32) == [4, 8, 16, 32] and depths(8) == [4, 8, 16] and depths(1) == [1, 2, 4]


def test_a_narrow_model_keeps_its_proportions(run_config: RunConfig) -> None:
    model = run_config("run", {"dim": 512, "n_heads": 32, "n_kv_heads": 8, "head_dim": 32, "ffn_dim": 1408}).model
    narrow = narrowed(model, 64)
    assert (narrow.dim, narrow.ffn_dim) == (64, 176)
    assert narrow.n_heads == 4 * narrow.n_kv_heads and narrow.head_dim >= 8
    assert narrow.n_heads * narrow.head_dim == 2 * 64  # attention is twice as wide as the stream
    assert narrowed(model, 512) is model


def test_a_sign_step_moves_a_wide_model_further(run_config: RunConfig) -> None:
    """What the narrow model shows is scaled by the ratio of the widths: within the spread of draws, as measured."""
    config = run_config("run", {"dim": 256, "ffn_dim": 512, "n_layers": 8, "scheme": {"name": "deepnorm"}})
    narrow, wide = probe(config), probe(config, width=256)
    assert (narrow.width_factor, wide.width_factor) == (4, 1)
    predicted = narrow.own.update["sign"][-1] * narrow.width_factor
    assert predicted == pytest.approx(wide.own.update["sign"][-1], rel=0.3)


def test_tokens_are_those_of_the_data_where_there_is_some(run_config: RunConfig) -> None:
    batch, said = first_rows(run_config("run"))
    assert said == "2 x 32 tokens of the training data"
    assert bytes(batch.tokens[0].tolist()).decode(errors="replace").count(" ") >= 3  # words
    config = run_config("run", data={"train": "nowhere"})
    batch, said = first_rows(config)
    assert said.startswith("2 x 32 random tokens") and "nowhere" in said
    assert torch.equal(batch.tokens, first_rows(config)[0].tokens) and int(batch.tokens.max()) < 257
    assert not torch.equal(
        batch.tokens, first_rows(run_config("run", data={"train": "nowhere"}, train={"seed": 1}))[0].tokens
    )


# The verdict


@pytest.mark.parametrize(
    ("scheme", "n_layers", "optim", "outcome"),
    [
        # validation loss after 200 steps (unigram level 3.30), in order: 3.30, 3.30, 3.34, 2.74, 3.30, 2.61, 2.78, 2.65
        ("post_ln", 32, {}, FAILS),
        ("post_ln", 12, {}, FAILS),
        ("post_ln", 32, {"lr": 1e-3, "warmup_steps": 50}, UNCERTAIN),
        ("deepnorm", 32, {}, SURVIVES),
        ("deepnorm", 32, {"lr": 1e-1}, FAILS),
        ("pre_ln", 32, {}, SURVIVES),
        ("pre_ln", 32, {"lr": 2e-2}, SURVIVES),
        ("peri_ln", 32, {}, SURVIVES),
    ],
)
def test_the_verdict_is_that_of_the_trainings(
    table_m3: Callable[..., Config], scheme: str, n_layers: int, optim: dict[str, Any], outcome: str
) -> None:
    assert judge(probe(table_m3(scheme, n_layers, **optim))).outcome == outcome


def judged(signal: Signal, config: Config) -> tuple[str, str]:
    verdict = judge(Probe(config, config.model.dim, "", {config.model.n_layers: signal}))
    return verdict.outcome, " ".join(finding.text for finding in verdict.findings)


def test_each_rule_by_itself(table_m3: Callable[..., Config]) -> None:
    config = table_m3("pre_ln", 16)
    signal = probe(config).own
    assert judged(signal, config)[0] == SURVIVES
    falling, rising = np.geomspace(1, 1e-3, 16), np.geomspace(1e-3, 1, 16)
    for profile, word in ((falling, "explode"), (rising, "vanish")):
        outcome, said = judged(replace(signal, grad_norm=profile), config)
        assert outcome == FAILS and word in said and "layers 0 to 1 " in said and "layers 14 to 15" in said
    assert judged(replace(signal, grad_norm=np.geomspace(1, 1 / 18, 16)), config)[0] == SURVIVES

    idle = np.where(np.arange(16) < 2, 0.0, signal.grad_norm)
    outcome, said = judged(replace(signal, grad_norm=idle), config)
    assert outcome == SURVIVES and "no matrix moves in the first step in 2 of 16 layers" in said
    silent = np.where(idle > 0, signal.stream_grad_norm, 0.0)
    assert "vanish" in judged(replace(signal, grad_norm=idle, stream_grad_norm=silent), config)[1]

    def grown(rms: Any) -> Signal:
        return replace(signal, rms=np.broadcast_to(np.asarray(rms)[:, None, None], (16, 2, 3)))

    l = np.arange(1, 17)
    assert judged(grown(l**2.0), config)[0] == SURVIVES
    assert "exponentially" in judged(grown(1.5**l), config)[1]
    assert "above 65,504" in judged(grown(70_000 + l), config)[1]
    broken = signal.rms.copy()
    broken[5:] = np.inf
    assert judged(replace(signal, rms=broken), config) == (NEVER, "the stream is not finite from layer 5 on")
    gradients = signal.grad_norm.copy()
    gradients[:3] = np.nan
    assert judged(replace(signal, grad_norm=gradients), config) == (
        NEVER,
        "gradients are not finite in layer 2 and below",
    )


def test_branches_that_are_off_do_not_vanish(
    table_m3: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SCHEMES, "gated", Gated)
    monkeypatch.setitem(SCHEMES, "zero_writes", ZeroWrites)
    gates, zeros = probe(table_m3("gated", 8)), probe(table_m3("zero_writes", 8))
    assert gates.own.off.all() and not gates.own.grad_norm.any() and not gates.own.update["sign"].any()
    assert zeros.own.off.all() and zeros.own.grad_norm.all() and zeros.own.update["sign"].all()
    for seen in (gates, zeros):
        verdict = judge(seen)
        assert verdict.outcome == SURVIVES
        assert "8 of 8 layers are off" in text(seen, verdict) and "vanish" not in text(seen, verdict)
        assert len(list(save(seen, verdict, tmp_path))) == 3
    assert np.isnan(gates.exponents["sgd"]) and np.isnan(gradient_ratio(gates.own))


def test_a_stream_that_nothing_holds(table_m3: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "no_norm", NoNorm)
    config = table_m3("no_norm", 48)
    verdict = judge(probe(config))
    assert verdict.outcome == FAILS and any("stream" in f.text for f in verdict.findings if f.outcome == FAILS)
    scheme = config.model.scheme.model_copy(update={"gain": 1e5})
    lost = judge(probe(config.model_copy(update={"model": config.model.model_copy(update={"scheme": scheme})})))
    assert lost.outcome == NEVER and "not finite" in lost.findings[0].text


# The command


def test_the_command_in_a_process(table_m3: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(table_m3("deepnorm", 20).to_toml())
    command = [sys.executable, "-m", "nlm", "probe", str(tmp_path / "run.toml"), "train.seed=3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "pictures")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "deepnorm, 20 layers, at initialization: 2 x 32 tokens of the training data, seed 3"
    layers = [line.split() for line in lines[3:19]]
    assert layers[0][0] == "0" and layers[-1][0] == "19" and all(len(row) == 9 for row in layers)
    assert f"{SURVIVES}:" in lines and not (tmp_path / "run").exists()

    numbers = json.loads((tmp_path / "pictures" / "probe.json").read_text())
    assert numbers["verdict"] == SURVIVES and len(numbers["signals"]["20"]["grad_norm"]) == 20
    assert float(layers[-1][-1]) == pytest.approx(numbers["signals"]["20"]["update"]["sign"][-1], rel=0.01)
    for name in ("layers.png", "depth.png"):
        picture = imread(tmp_path / "pictures" / name)
        assert picture.shape[0] > 300 and (picture[..., :3].min(axis=2) < 0.9).mean() > 0.01, name
    assert not (tmp_path / "probe.json").exists()


def test_the_pictures_show_the_numbers() -> None:
    curve = np.array([1.0, 0.0, 4.0, np.inf, 16.0])
    figure = layer_figure({"RMS": {"attn": curve, "ffn": curve + 1}, "gradient norm": {"off": np.zeros(5)}}, "title")
    attn, ffn = figure.axes[0].lines
    assert np.array_equal(attn.get_ydata(), [1, np.nan, 4, np.nan, 16], equal_nan=True) and ffn.get_ydata()[1] == 1
    figure = depth_figure(np.array([4, 8, 16]), {"sgd": np.array([2.0, 4.0, 8.0]), "off": np.zeros(3)}, [1, np.nan], "")
    points, fit = figure.axes[0].lines
    assert points.get_ydata().tolist() == [2, 4, 8] and fit.get_ydata() == pytest.approx([2, 4, 8])
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]


def test_a_verdict_is_no_error(
    table_m3: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(table_m3("post_ln", 12).to_toml())
    assert main(["probe", str(tmp_path / "run.toml"), "--width", "16"]) == 0
    shown = capsys.readouterr().out
    assert f"{FAILS}:" in shown and "probed 16 wide instead of 32" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_bad_arguments(table_m3: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(table_m3("pre_ln").to_toml())
    for arguments, said in (
        ([str(path), "model.dims=3", "optim.lr=-1"], ["model.dims: unknown key", "optim.lr"]),
        ([str(tmp_path / "none.toml")], ["none.toml: cannot be read"]),
        ([str(path), "--width", "4"], ["--width: expected at least 8, got 4"]),
    ):
        assert main(["probe", *arguments]) == 2
        captured = capsys.readouterr()
        assert all(words in captured.err for words in said) and not captured.out
    with pytest.raises(SystemExit) as end:
        main(["probe", str(path), "--width", "wide"])
    assert end.value.code == 2
