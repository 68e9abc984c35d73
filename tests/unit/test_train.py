"""The loop: what a run computes, leaves behind, and does again after it was killed."""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nlm import build_model, load_checkpoint, read_layers
from nlm.checkpoint import checkpoints
from nlm.config import Config, ConfigError
from nlm.data import TokenShard
from nlm.data.corpus import Corpus
from nlm.optim import OPTIMIZERS
from nlm.storage import read_all
from nlm.train import train

RunConfig = Callable[..., Config]
DEADLINE_S = 300


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    newest = checkpoints(run)[-1]
    return read_all(newest / "tensors") | load_file(newest / "state.safetensors")


def assert_same_state(run: Path, other: Path) -> None:
    ours, theirs = state(run), state(other)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def kill_when(config: Config, reached: Callable[[], bool], number: signal.Signals = signal.SIGKILL) -> str:
    """`nlm train` in a process of its own, killed at once when `reached` -> what it said to stderr."""
    path = Path(config.log.dir).with_suffix(".toml")
    path.write_text(config.to_toml())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nlm", "train", path],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == -number
    return said


@pytest.mark.parametrize("scheme", ["pre_ln", "ngpt"])
def test_a_killed_run_ends_bit_identical(scheme: str, run_config: RunConfig) -> None:
    """SIGKILL once between checkpoints, once in the middle of writing one, then to the end."""

    def config(name: str) -> Config:
        model = {"scheme": {"name": scheme}, "attention": {"score": "qknorm"}, "n_layers": 40}
        return run_config(name, model, train={"steps": 60}, checkpoint={"every": 4, "keep_last": 1})

    straight, killed = train(config("straight")), Path(config("killed").log.dir)
    folder = killed / "checkpoints"
    kill_when(config("killed"), lambda: len(losses_so_far(killed)) >= 6 and len(checkpoints(killed)) > 0)
    assert [path.name for path in checkpoints(killed)] == ["step-00000004"]
    kill_when(config("killed"), lambda: any(p.name >= ".partial-step-00000012" for p in folder.glob(".partial-*")))
    assert checkpoints(killed)
    train(config("killed"))
    assert [path.name for path in folder.iterdir()] == ["step-00000060"]
    assert_same_state(straight, killed)
    assert losses(killed) == losses(straight) and len(losses(killed)) == 60
    ours, theirs = read_layers(killed), read_layers(straight)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_crash_in_native_code_says_where(run_config: RunConfig) -> None:
    config = run_config("crashed", train={"steps": 10**6})
    said = kill_when(config, lambda: len(losses_so_far(Path(config.log.dir))) > 2, signal.SIGSEGV)
    assert "Segmentation fault" in said and "nlm/train.py" in said


def test_garbage_is_collected_after_every_step(run_config: RunConfig) -> None:
    """Never in the middle of one, and by no other thread, which only some ranks might do."""
    places: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            places.append(sys._getframe(1).f_code.co_name)

    gc.callbacks.append(note)
    try:
        train(run_config("collected", train={"steps": 50}))
    finally:
        gc.callbacks.remove(note)
    steps = places.index("_steps")
    assert places[steps : steps + 50] == ["_steps"] * 50
    assert gc.isenabled() and gc.get_freeze_count() == 0


def losses_so_far(run: Path) -> list[str]:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def test_a_finished_run_is_left_alone(run_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config("once")
    run = train(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(config) == run
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "already trained, 8 steps" in capsys.readouterr().out


def test_a_finished_run_can_go_further(run_config: RunConfig) -> None:
    """With a constant rate, 8 steps and then 4 more are 12 steps."""
    constant = {"schedule": "constant"}
    train(run_config("further", optim=constant))
    further = train(run_config("further", optim=constant, train={"steps": 12}))
    assert_same_state(further, train(run_config("straight", optim=constant, train={"steps": 12})))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_where_it_was(name: str, run_config: RunConfig) -> None:
    """Bit by bit, and it has lowered the loss."""
    rates = {"sgdp": 0.3, "lars": 10.0, "lion": 3e-4, "lamb": 1e-2}
    optim = {"name": name, "lr": rates.get(name, 3e-3)} | ({"free_steps": 3} if name == "lawn" else {})
    straight = train(run_config("straight", optim=optim))
    train(run_config("resumed", optim=optim, train={"stop_after": 5}))
    resumed = train(run_config("resumed", optim=optim))
    assert_same_state(straight, resumed)
    assert losses(straight) == losses(resumed) and losses(straight)[-1] < losses(straight)[0] - 0.1


def test_another_optimizer_is_another_run(run_config: RunConfig) -> None:
    train(run_config("run"))
    with pytest.raises(ConfigError, match=r"optim\.name: the run to resume has 'adamw', the config 'lion'"):
        train(run_config("run", optim={"name": "lion"}, train={"steps": 9}))


def test_it_learns_real_text(run_config: RunConfig, shard: str) -> None:
    """Far below the entropy of the letters alone, which every model reaches that looks at no context."""
    model = {"dim": 64, "ffn_dim": 128}
    schedule = {"train": {"steps": 400, "batch_tokens": 1024, "seq_len": 64}, "optim": {"lr": 3e-3, "warmup_steps": 20}}
    run = train(run_config("learns", model, **schedule, log={"every": 100}, data={"train": shard, "validation": shard}))
    counts = np.bincount(TokenShard(shard).tokens)
    p = counts[counts > 0] / counts.sum()
    assert records(run)[-1]["validation_loss"] < -(p * np.log(p)).sum() - 0.8


def test_the_first_loss_is_that_of_the_first_batch(run_config: RunConfig, shard: str) -> None:
    config = run_config("first", train={"steps": 1})
    rows = torch.from_numpy(Corpus(config).batch(1).tokens)
    logits = build_model(config)(rows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert losses(train(config)) == [pytest.approx(expected, rel=1e-6)]


def test_validation_is_over_the_whole_of_its_batches(run_config: RunConfig, shard: str) -> None:
    config = run_config("valid", data={"validation": shard}, evaluate={"batches": 3}, log={"every": 8})
    run = train(config)
    model, _ = load_checkpoint(run / "checkpoints" / "step-00000008")
    tokens = torch.from_numpy(np.array(TokenShard(shard).tokens[: 3 * 4 * 32 + 1], np.int64))
    total = 0.0
    with torch.no_grad():
        for i in range(12):
            x, y = tokens[32 * i : 32 * (i + 1)], tokens[32 * i + 1 : 32 * (i + 1) + 1]
            total += torch.nn.functional.cross_entropy(model(x[None])[0], y, reduction="sum").item()
    assert [r["step"] for r in records(run) if "validation_loss" in r] == [8]
    assert records(run)[-1]["validation_loss"] == pytest.approx(total / (12 * 32), rel=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        {"microbatches": 2},
        {"microbatches": 4},
        {"recompute": "block"},
        {"recompute": "sqrt"},
        {"recompute": "nested", "microbatches": 2},
        {"recompute": "auto", "memory_gib": 2.0},
        {"compile": True, "recompute": "selective"},
        {"compile": True},
        {"compile": True, "recompute": "block"},
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(parallel: dict[str, Any], run_config: RunConfig) -> None:
    torch.compiler.reset()
    plain, other = train(run_config("plain")), train(run_config("other", parallel=parallel))
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    ours, theirs = read_layers(other), read_layers(plain)
    for name in theirs:
        assert np.allclose(ours[name], theirs[name], rtol=1e-3), name


def test_bf16(run_config: RunConfig) -> None:
    """Near the fp32 run, but not it; the weights stay fp32."""
    run = train(run_config("bf16", train={"precision": "bf16"}))
    plain = losses(train(run_config("fp32")))
    assert losses(run) == pytest.approx(plain, rel=0.02) and losses(run) != plain
    assert {t.dtype for name, t in state(run).items() if not name.startswith(("rng", "guard"))} == {torch.float32}


def test_without_statistics_there_are_none(run_config: RunConfig) -> None:
    run = train(run_config("bare", statistics={"enabled": False}))
    assert len(losses(run)) == 8 and not (run / "layers").exists()
    assert losses(run) == losses(train(run_config("full")))


def test_the_resolved_config_is_in_the_run(run_config: RunConfig) -> None:
    config = run_config("config")
    assert (train(config) / "config.toml").read_text() == config.to_toml()


def test_vanishing_numbers_are_zero_in_a_run_only(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor can do that."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush denormals")
    seen: list[float] = []

    def rate(*_: object) -> float:
        seen.append(float(torch.full((8,), 1e-30)[3] * 1e-9))
        return 1e-3

    monkeypatch.setattr("nlm.train.learning_rate", rate)
    train(run_config("flushed", train={"steps": 1}))
    assert seen == [0.0]
    assert float(torch.full((8,), 1e-30)[3] * 1e-9) > 0
