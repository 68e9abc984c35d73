"""Runs over several hosts, which can lose each other: to torch, ssh and the scripts of launch/ they are real ones
(tools/hosts.py). Two hosts of two ranks."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from hosts import INTERFACE, Host, hosts, missing
from slow_link import measure, planned_bytes

from nlm.compare import differences
from nlm.config import Config
from nlm.train import train

RunConfig = Callable[..., Config]
LIMIT = 1e-5
"""Relative, in float32, as for layouts on one host (tools/relay.py)."""
DEADLINE_S = 300
STEPS = 12
if reason := missing("tc"):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def config(run_config: RunConfig) -> Callable[..., Config]:
    """`config(name, layout)`: steps that take a while, and no statistics, which would make them take longer."""

    def make(name: str, **parallel: object) -> Config:
        return run_config(
            name,
            train={"steps": STEPS, "batch_tokens": 512},
            checkpoint={"every": 2},
            statistics={"enabled": False},
            parallel=parallel,
        )

    return make


@pytest.fixture
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


def test_a_host_is_lost_and_another_takes_its_place(config: Callable[..., Config], one: Path, tmp_path: Path) -> None:
    """Tensor parallel in a host, sharded over both. Packets to and from one vanish; the other notices, and goes on from
    the checkpoint with a third. All are known by address only."""
    with hosts(3, tmp_path / "hosts", known=False) as made:
        a, b, c = made
        of, handed = f"{a.address} {b.address}", config("run", tp=2, dp_shard=2)
        run = Path(handed.log.dir)
        first = torchrun(a, handed, of)
        torchrun(b, handed, of)
        until(lambda: steps(run) >= 3 or first.poll() is not None, *made)
        b.cut()
        cut_at = steps(run)
        assert 3 <= cut_at < STEPS, said(*made)
        spare = torchrun(c, handed, of)
        assert ended(first, spare) == [0, 0], said(*made)
        assert a.said(first).count("no heartbeat for 30 s") == 2, said(a)
        assert a.said(first).count("resuming after step") == 1, said(a)
    same(run, one)


def test_a_host_is_lost_and_the_other_goes_on_alone(config: Callable[..., Config], one: Path, tmp_path: Path) -> None:
    """The same command with fewer hosts and another layout."""
    handed = config("run", dp_shard=2)
    run = Path(handed.log.dir)
    with hosts(2, tmp_path / "hosts") as made:
        a, b = made
        environment = {"RANKS_PER_NODE": "1", "MAX_RESTARTS": "0"}
        first = torchrun(a, handed, "a b", **environment)
        torchrun(b, handed, "a b", **environment)
        until(lambda: steps(run) >= 3 or first.poll() is not None, *made)
        b.cut()
        assert 3 <= steps(run) < STEPS, said(*made)
        assert ended(first) == [1], said(a)
        assert re.search(r"nlm: rank \d on b: .* for 30 s", a.said(first)), said(a)  # torch chooses where rank 0 is
        alone = torchrun(a, handed, "a", "parallel.dp_shard=1", **environment)
        assert ended(alone) == [0], said(a)
        assert a.said(alone).count("resuming after step") == 1, said(a)
    same(run, one)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("ssh", {"pp": 2, "microbatches": 2}), ("deepspeed", {"dp_replicate": 2})],
    ids=["ssh", "deepspeed"],
)
def test_from_one_host_on_both(
    kind: str, layout: dict[str, int], config: Callable[..., Config], one: Path, tmp_path: Path
) -> None:
    """`nlm launch` reaches the other by ssh, or DeepSpeed by pdsh; one rank a host."""
    if reason := missing("sshd", "ssh", "ssh-keygen", *(["pdsh"] if kind == "deepspeed" else [])):
        pytest.skip(reason)
    handed, cluster = config("run", **layout), tmp_path / "cluster.toml"
    table = {"kind": kind, "hosts": ["a", "b"], "ranks_per_node": 1, "interface": INTERFACE, "python": sys.executable}
    cluster.write_text(tomli_w.dumps(table | {"environment": {"OMP_NUM_THREADS": "1"}}))
    with hosts(2, tmp_path / "hosts") as made:
        for host in made:
            host.serve_ssh()
        run = made[0].start([sys.executable, "-m", "nlm", "launch", written(handed), "--cluster", cluster])
        assert ended(run) == [0], said(*made)
        assert made[0].said(run).count(f"step {STEPS}/{STEPS}") == 1, said(*made)
    same(Path(handed.log.dir), one)


def test_the_link_carries_what_is_planned(tmp_path: Path) -> None:
    """By axis of the mesh. Headers, acknowledgements and heartbeats come on top."""
    with hosts(2, tmp_path / "hosts") as made:
        found = measure(made, tmp_path, steps=2)
    for axis, of in found.items():
        assert 1 <= of.sent / planned_bytes(axis) < 1.05, (axis, of.sent, planned_bytes(axis))
