"""Runs over several hosts, which can lose each other: to torch, ssh and the scripts of launch/ they are real ones
(tools/hosts.py). Two hosts of two ranks."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tomli_w
from hosts import INTERFACE, Host, hosts, missing
from slow_link import measure, planned_bytes

from nlm.checkpoint import checkpoints
from nlm.compare import differences
from nlm.config import Config
from nlm.train import train

LIMIT = 1e-5
"""Relative, in float32, as for layouts on one host (tools/relay.py)."""
DEADLINE_S = 300
STEPS = 8
SLOW = 3e5
"""Bytes/s of a link over which a step takes half a second or more: time enough for a host to be lost between two."""
if reason := missing("tc"):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def config(
    make_config: Callable[..., Config], shard: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """`config(name, layout)`, of runs side by side."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, **parallel: object) -> Config:
        return make_config(
            {"vocab_size": 257},
            train={"steps": STEPS, "batch_tokens": 512, "seq_len": 32},
            data={"train": shard},
            log={"dir": str(folder / name), "every": 1, "tensorboard": False},
            checkpoint={"every": 2},
            statistics={"enabled": False},
            parallel=parallel,
        )

    return make


@pytest.fixture(scope="module")
def one(config: Callable[..., Config]) -> Path:
    """The run of one process that nothing disturbs."""
    return train(config("one"))


def written(config: Config) -> Path:
    path = Path(config.log.dir).with_suffix(".toml")
    path.write_text(config.to_toml())
    return path


def torchrun(host: Host, config: Config, of: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    ranks = {"HOSTS": of, "RANKS_PER_NODE": "2", "INTERFACE": INTERFACE, "MAX_RESTARTS": "1"} | environment
    return host.start(["launch/torchrun.sh", written(config), *overrides], **ranks)


def said(*made: Host) -> str:
    return "\n".join(f"{host.name}: {host.said(process)}" for host in made for process in host.started)


def until(ready: Callable[[], bool], *made: Host) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline, said(*made)
        time.sleep(0.2)


def ended(*processes: subprocess.Popen[str]) -> list[int]:
    return [process.wait(DEADLINE_S) for process in processes]


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return (
        max((json.loads(line)["step"] for line in metrics.read_text().splitlines()), default=0)
        if metrics.exists()
        else 0
    )


def same(run: Path, reference: Path) -> None:
    found = differences(run, reference)
    assert found["batch_digest"].first is None, "not the same data"
    assert max(found[kind].size for kind in ("loss", "parameters", "optimizer")) < LIMIT, found


def half_way(run: Path, process: subprocess.Popen[str], *made: Host) -> None:
    """Waits until it has written a checkpoint."""
    until(lambda: bool(checkpoints(run)) or process.poll() is not None, *made)
    assert 0 < steps(run) < STEPS, said(*made)


def test_a_host_is_lost_and_another_takes_its_place(config: Callable[..., Config], one: Path, tmp_path: Path) -> None:
    """Tensor parallel in a host, sharded over both. Packets to and from one vanish; the other notices, and goes on from
    the checkpoint with a third. All are known by address only."""
    handed = config("another", tp=2, dp_shard=2)
    run = Path(handed.log.dir)
    with hosts(3, tmp_path, known=False) as made:
        a, b, c = made
        a.slow_down(SLOW)
        of = f"{a.address} {b.address}"
        first = torchrun(a, handed, of)
        torchrun(b, handed, of)
        half_way(run, first, *made)
        b.cut()
        spare = torchrun(c, handed, of)
        assert ended(first, spare) == [0, 0], said(*made)
        assert a.said(first).count("no heartbeat for 30 s") == 2, said(a)
        assert a.said(first).count("resuming after step") == 1, said(a)
    same(run, one)


def test_a_host_is_lost_and_the_other_goes_on_alone(config: Callable[..., Config], one: Path, tmp_path: Path) -> None:
    """The same command with fewer hosts and another layout."""
    handed = config("alone", dp_shard=2)
    run = Path(handed.log.dir)
    with hosts(2, tmp_path) as made:
        a, b = made
        a.slow_down(SLOW)
        environment = {"RANKS_PER_NODE": "1", "MAX_RESTARTS": "0"}
        first = torchrun(a, handed, "a b", **environment)
        torchrun(b, handed, "a b", **environment)
        half_way(run, first, *made)
        b.cut()
        assert ended(first) == [1], said(a)
        assert re.search(r"nlm: rank \d on b: .* for 30 s", a.said(first)), said(a)  # torch chooses where rank 0 is
        alone = torchrun(a, handed, "a", "parallel.dp_shard=1", **environment)
        assert ended(alone) == [0], said(a)
        assert a.said(alone).count("resuming after step") == 1, said(a)
    same(run, one)


def launched(
    kind: str, handed: Config, made: Sequence[Host], folder: Path, **table: object
) -> Callable[[], subprocess.Popen[str]]:
    """What starts `nlm launch` on the first of the hosts, which reaches the others by ssh."""
    for host in made:
        host.serve_ssh()
    table |= {"kind": kind, "hosts": [host.name for host in made], "interface": INTERFACE, "python": sys.executable}
    cluster = folder / "cluster.toml"
    cluster.write_text(tomli_w.dumps(table | {"environment": {"OMP_NUM_THREADS": "1"}}))
    command = [sys.executable, "-m", "nlm", "launch", written(handed), "--cluster", cluster]
    return lambda: made[0].start(command)


@pytest.mark.skipif(bool(reason := missing("sshd", "ssh", "ssh-keygen")), reason=reason or "")
def test_a_host_is_lost_and_comes_back(config: Callable[..., Config], one: Path, tmp_path: Path) -> None:
    """Tensor parallel in a host, a pipeline over both. One crashes; `nlm launch` connects to it again."""
    handed = config("returned", tp=2, pp=2, microbatches=2)
    run = Path(handed.log.dir)
    with hosts(2, tmp_path) as made:
        a, b = made
        a.slow_down(SLOW)
        both = launched("ssh", handed, made, tmp_path, ranks_per_node=2, max_restarts=1, reconnect_s=1)()
        half_way(run, both, *made)
        b.crash()
        b.serve_ssh()
        assert ended(both) == [0], said(*made)
        assert a.said(both).count("nlm: b: the connection is lost; once more in 1 s") == 1, said(a)
        assert a.said(both).count("resuming after step") == 1, said(a)
        assert a.said(both).count(f"step {STEPS}/{STEPS}") == 1, said(a)
    same(run, one)


@pytest.mark.skipif(bool(reason := missing("sshd", "ssh", "ssh-keygen", "pdsh")), reason=reason or "")
def test_deepspeed_reaches_both(config: Callable[..., Config], one: Path, tmp_path: Path) -> None:
    """DeepSpeed's launcher, by pdsh over ssh, one rank a host: asked to stop, and started again."""
    handed = config("deepspeed", dp_replicate=2)
    run = Path(handed.log.dir)
    with hosts(2, tmp_path) as made:
        a, _ = made
        a.slow_down(SLOW)
        start = launched("deepspeed", handed, made, tmp_path, ranks_per_node=1)
        first = start()
        half_way(run, first, *made)
        a.signal(first, signal.SIGTERM)
        assert ended(first) == [75], said(*made)
        assert a.said(first).count("stopped early, after a checkpoint; the same command goes on") == 1, said(a)
        again = start()
        assert ended(again) == [0], said(*made)
        assert a.said(again).count("resuming after step") == 1, said(a)
        assert a.said(again).count(f"step {STEPS}/{STEPS}") == 1, said(a)
    same(run, one)


def test_the_link_carries_what_is_planned(tmp_path: Path) -> None:
    """By axis of the mesh. Headers, acknowledgements and heartbeats come on top."""
    with hosts(2, tmp_path) as made:
        found = measure(made, tmp_path, steps=2)
    for axis, of in found.items():
        assert 1 <= of.sent / planned_bytes(axis) < 1.05, (axis, of.sent, planned_bytes(axis))
