"""A run that is asked to stop: by a signal to one rank or all of them, or because its time is up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launched import free_port

from nlm.checkpoint import checkpoints
from nlm.config import Config
from nlm.stop import Stopped
from nlm.storage import read_all
from nlm.train import train

RunConfig = Callable[..., Config]
DEADLINE_S = 240
SECTIONS = {"optim": {"schedule": "constant"}, "checkpoint": {"keep_last": 99}, "log": {"every": 3}}


def steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def stopped_at(run: Path) -> int:
    (checkpoint,) = checkpoints(run)
    return int(checkpoint.name[-8:])


def assert_goes_on(config: Config, straight: Config, at: int) -> None:
    """A few steps more, and everything is as if it had not stopped."""
    ours, theirs = (
        train(config.model_copy(update={"train": config.train.model_copy(update={"steps": at + 3})}))
        for config in (config, straight)
    )
    tensors, expected = (read_all(checkpoints(run)[-1] / "tensors") for run in (ours, theirs))
    assert tensors.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-3, atol=1e-6)


class Launched:
    """Ranks of one run, without an agent."""

    def __init__(self, config: Config, ranks: int, path: Path) -> None:
        path.write_text(config.to_toml())
        self.run = Path(config.log.dir)
        launcher = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "nlm", "train", path],
                env=os.environ
                | {"OMP_NUM_THREADS": "1"}
                | (launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def steps(self, at_least: int) -> None:
        """Waits until it has taken so many."""
        deadline = time.monotonic() + DEADLINE_S
        while max(steps(self.run), default=0) < at_least:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in self.ranks)
            time.sleep(0.01)

    def said(self) -> str:
        """To stderr, when all have ended with the code that asks for another start, EX_TEMPFAIL."""
        said = [rank.communicate(timeout=DEADLINE_S)[1] for rank in self.ranks]
        assert [rank.returncode for rank in self.ranks] == [75] * len(self.ranks), said
        return "".join(said)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    made: list[Launched] = []

    def make(config: Config, ranks: int) -> Launched:
        made.append(Launched(config, ranks, tmp_path / "config.toml"))
        return made[-1]

    yield make
    for launched in made:
        for rank in launched.ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal(number: signal.Signals, run_config: RunConfig, launch: Callable[..., Launched]) -> None:
    config = run_config("run", **SECTIONS | {"train": {"steps": 10**6}})
    launched = launch(config, 1)
    launched.steps(4)
    launched.ranks[0].send_signal(number)
    message = f"nlm: {number.name}: stopped early, after a checkpoint; the same command goes on\n"
    assert launched.said() == message
    at = stopped_at(launched.run)
    assert at - 3 < max(steps(launched.run)) <= at
    assert_goes_on(config, run_config("straight", **SECTIONS), at)


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"pp": 2, "microbatches": 2}], ids=str)
def test_a_signal_to_one_rank_of_two(
    layout: dict[str, int], run_config: RunConfig, launch: Callable[..., Launched]
) -> None:
    """The other learns of it, both stop at the same step, one says so."""
    config = run_config("run", **SECTIONS | {"train": {"steps": 10**6}, "parallel": layout})
    launched = launch(config, 2)
    launched.steps(4)
    launched.ranks[1].send_signal(signal.SIGUSR1)
    assert launched.said() == "nlm: SIGUSR1: stopped early, after a checkpoint; the same command goes on\n"
    one_rank = config.model_copy(update={"parallel": run_config("unused").parallel})
    assert_goes_on(one_rank, run_config("straight", **SECTIONS), stopped_at(launched.run))


def test_torchrun_is_told_to_stop(run_config: RunConfig, tmp_path: Path) -> None:
    """It passes the signal on to its ranks and waits for their checkpoint."""
    config = run_config("run", **SECTIONS | {"train": {"steps": 10**6}, "parallel": {"tp": 2}})
    path, run = tmp_path / "config.toml", Path(config.log.dir)
    path.write_text(config.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    agent = subprocess.Popen(
        [*command, "-m", "nlm", "train", path], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while max(steps(run), default=0) < 4:
            assert time.monotonic() < deadline and agent.poll() is None
            time.sleep(0.01)
        agent.send_signal(signal.SIGTERM)
        said = agent.communicate(timeout=DEADLINE_S)[1].decode()
    finally:
        agent.kill()
        agent.wait()
    assert "nlm: SIGTERM: stopped early, after a checkpoint" in said
    assert stopped_at(run) >= 4


def test_the_time_is_up(run_config: RunConfig) -> None:
    config, began = run_config("run", **SECTIONS | {"train": {"steps": 10**6, "max_minutes": 0.05}}), time.monotonic()
    with pytest.raises(Stopped, match=r"0\.05 minutes are up: stopped early"):
        train(config)
    assert time.monotonic() - began >= 3, "they were not up"
    at = stopped_at(Path(config.log.dir))
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL, "the signals are still taken"
    unlimited = config.train.model_copy(update={"max_minutes": None})
    assert_goes_on(config.model_copy(update={"train": unlimited}), run_config("straight", **SECTIONS), at)


def test_a_run_that_stops_after_a_step_is_no_failure(run_config: RunConfig) -> None:
    config = run_config("run", **SECTIONS | {"train": {"steps": 10**6, "stop_after": 4}})
    assert stopped_at(train(config)) == 4
    assert steps(Path(config.log.dir)) == [1, 3, 4]


def test_a_second_interrupt_ends_it_at_once(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in the middle of a step."""

    def twice(*_: object) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr("nlm.train.learning_rate", twice)
    with pytest.raises(KeyboardInterrupt):
        train(run_config("run"))
