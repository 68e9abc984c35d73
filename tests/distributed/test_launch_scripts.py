"""The scripts of launch/ as `nlm launch --dry-run` prints them, run by a shell: real launchers, on this machine."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from launched import free_port

from nlm.checkpoint import checkpoints
from nlm.config import Config
from nlm.launch import launch

RunConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
DEADLINE_S = 400
STOPS_S = 280
"""Less than the 300 s for which torchrun's agents wait for one that has left."""
CLUSTERS = {
    "two-hosts": {"kind": "ssh", "hosts": ["localhost", "localhost"], "ranks_per_node": 1, "max_restarts": 1},
    "deepspeed": {"kind": "deepspeed", "hosts": ["localhost"], "ranks_per_node": 2},
    "mpirun": {"kind": "mpi", "hosts": ["localhost"], "ranks_per_node": 2},
}


@pytest.fixture
def shells() -> Iterator[Callable[[list[str]], list[subprocess.Popen[str]]]]:
    """Every command in a shell of its own."""
    started: list[subprocess.Popen[str]] = []

    def run(commands: list[str]) -> list[subprocess.Popen[str]]:
        environment = {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        new = [
            subprocess.Popen(
                ["bash", "-c", command],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in commands
        ]
        started.extend(new)
        return new

    yield run
    for process in started:
        process.terminate()  # which the scripts pass on
        process.wait(DEADLINE_S)


def steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_run_is_stopped_and_goes_on(
    kind: str,
    run_config: RunConfig,
    shells: Callable[[list[str]], list[subprocess.Popen[str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 75 everywhere, though one shell alone was told, and torchrun starts nothing again; in the end 0."""
    if kind == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("Open MPI's mpirun is not installed")
    config = run_config("run", train={"steps": 10**6}, optim={"schedule": "constant"}, parallel={"dp_shard": 2})
    path, cluster, run = tmp_path / "config.toml", tmp_path / "cluster.toml", Path(config.log.dir)
    path.write_text(config.to_toml())
    common = {"port": free_port(), "python": sys.executable, "environment": {"OMP_NUM_THREADS": "1"}}
    cluster.write_text(tomli_w.dumps(CLUSTERS[kind] | common))

    def start(*overrides: str) -> list[subprocess.Popen[str]]:
        assert launch(str(path), overrides, cluster, dry_run=True) == 0
        commands = capsys.readouterr().out.splitlines()
        # What ssh would have the hosts run: here all of them are this machine.
        return shells([shlex.split(line)[-1] if kind == "two-hosts" else line for line in commands])

    def ended(processes: list[subprocess.Popen[str]], within_s: float = DEADLINE_S) -> tuple[list[int | None], str]:
        said = "".join(process.communicate(timeout=within_s)[0] for process in processes)
        return [process.returncode for process in processes], said

    processes = start()
    deadline = time.monotonic() + DEADLINE_S
    while max(steps(run), default=0) < 2:
        assert time.monotonic() < deadline, "no two steps"
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.1)
    processes[-1].send_signal(signal.SIGTERM)
    codes, said = ended(processes, STOPS_S)
    assert codes == [75] * len(processes), said
    assert said.count("stopped early, after a checkpoint; the same command goes on") == 1, said
    (checkpoint,) = checkpoints(run)
    at = int(checkpoint.name[-8:])
    assert at in (max(steps(run)), max(steps(run)) + 1)
    if kind == "two-hosts":
        codes, said = ended(start(f"train.steps={at + 2}"))
        assert codes == [0, 0], said
        assert max(steps(run)) == at + 2
