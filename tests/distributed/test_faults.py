"""Ranks that do not fit together, or die: every one ends soon, and says which rank is to blame.

Real processes; the limits are shorter than in life (faulty_rank.py).
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launched import free_port

import nlm
from nlm.cli import main
from nlm.config import Config
from nlm.parallel.launch import process_group

PACKAGE = Path(nlm.__file__).parent
WORKER = Path(__file__).with_name("faulty_rank.py")
HOST = socket.gethostname()
DEADLINE_S = 240  # most of it for importing torch, on a machine with more to do
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The processes of one launch, without an agent, and what each wrote to stderr."""

    def __init__(
        self, folder: Path, make_config: Callable[..., Config], world_size: int, mesh: int | None = None
    ) -> None:
        self.folder, self.world_size, self.port = folder, world_size, free_port()
        self.config = folder / "run.toml"
        ranks = mesh or world_size
        config = make_config(
            parallel={"dp_replicate": ranks}, train={"batch_tokens": 12 * ranks}, log={"dir": str(folder)}
        )
        self.config.write_text(config.to_toml())
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, *overrides: str, **environment: str) -> None:
        launcher = (str(rank), str(self.world_size), str(rank), "127.0.0.1", str(self.port))
        self.run(rank, [sys.executable, WORKER], overrides, dict(zip(LAUNCHER, launcher, strict=True)) | environment)

    def run(
        self, rank: int, command: list[str | Path], overrides: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        with (self.folder / f"stderr-{rank}").open("wb") as stderr:
            self.processes[rank] = subprocess.Popen(
                [*command, "train", self.config, *overrides],
                env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)} | environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def start_all(self, **environment: str) -> None:
        for rank in range(self.world_size):
            self.start(rank, **environment)

    def all_step(self) -> None:
        """Waits until every rank is inside the loop of collectives."""
        deadline = time.monotonic() + DEADLINE_S
        while len(list(self.folder.glob("stepping-*"))) < self.world_size:
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)

    def end(self, within_s: float = DEADLINE_S, but: int | None = None) -> dict[int, int]:
        """The exit code of every rank `but` one."""
        deadline = time.monotonic() + within_s
        return {
            rank: p.wait(max(0.1, deadline - time.monotonic())) for rank, p in self.processes.items() if rank != but
        }

    def said(self, rank: int) -> str:
        return (self.folder / f"stderr-{rank}").read_text()

    def everything(self) -> str:
        said = "".join(self.said(rank) for rank in self.processes)
        assert "Traceback" not in said, said
        return said

    def clear(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # of its own session: a launcher's workers as well
                process.wait()


@pytest.fixture
def launch(tmp_path: Path, make_config: Callable[..., Config]) -> Iterator[Callable[..., Ranks]]:
    launched: list[Ranks] = []

    def make(world_size: int, mesh: int | None = None) -> Ranks:
        launched.append(Ranks(tmp_path, make_config, world_size, mesh))
        return launched[-1]

    yield make
    for ranks in launched:
        ranks.clear()


Launch = Callable[..., Ranks]


def test_ranks_join_compute_and_leave(launch: Launch) -> None:
    """Without a word, also where the host of the store, or another, is the last to be done."""
    ranks = launch(3)
    ranks.start_all(FAULT_RANKS="1")
    assert ranks.end() == {0: 0, 1: 0, 2: 0}
    assert ranks.everything() == ""


def test_another_number_of_ranks_than_the_mesh(launch: Launch) -> None:
    ranks = launch(2, mesh=4)
    ranks.start_all()
    assert ranks.end() == {0: 2, 1: 2}
    said = ranks.everything()
    assert said.count("1 · 4 · 1 · 1 = 4 ranks, but there are 2; type `torchrun --nproc-per-node 4 -m nlm") == 1
    assert len(said.splitlines()) == 1


def test_no_launcher(launch: Launch) -> None:
    ranks = launch(1, mesh=2)
    ranks.run(0, [sys.executable, WORKER], (), {})
    assert ranks.end() == {0: 2}
    assert "= 2 ranks, but there is 1; type `torchrun --nproc-per-node 2" in ranks.everything()


def test_one_process_without_a_launcher_joins_nothing(launch: Launch) -> None:
    ranks = launch(1)
    ranks.run(0, [sys.executable, WORKER], (), {})
    assert ranks.end() == {0: 0} and ranks.everything() == ""


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("WORLD_SIZE", "", "WORLD_SIZE: missing"),
        ("MASTER_ADDR", "", "MASTER_ADDR: missing"),
        ("RANK", "2", "RANK: expected less than WORLD_SIZE = 2, got 2"),
        ("MASTER_PORT", "http", "MASTER_PORT: expected a whole number, got 'http'"),
    ],
)
def test_environments_that_contradict(
    variable: str,
    value: str,
    problem: str,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: nothing is joined."""
    ranks = launch(2)

    def train(_: Config) -> None:
        with process_group(nlm.load_config(ranks.config), torch.device("cpu")):
            pytest.fail("it joined")

    monkeypatch.setattr("nlm.train.train", train)
    monkeypatch.setattr("nlm.cli.keep_lines", lambda _: None)  # which takes the streams of a process for good
    for name, usual in zip(LAUNCHER, ("0", "2", "0", "127.0.0.1", str(ranks.port)), strict=True):
        monkeypatch.setenv(name, value if name == variable else usual)
    assert main(["train", str(ranks.config)]) == 2
    shown = capsys.readouterr().err
    assert problem in shown and "`torchrun`" in shown and len(shown.splitlines()) == 2


@pytest.mark.parametrize("server", ["silent", "talking", "a store", "another run's"])
def test_a_port_in_use(server: str, launch: Launch) -> None:
    ranks, other = launch(2), launch(2)
    if server == "another run's":
        other.start_all(FAULT="none")
        other.all_step()
        ranks.port = other.port
    elif server == "a store":
        store = dist.TCPStore("127.0.0.1", ranks.port, is_master=True, wait_for_workers=False)
    else:
        listener = socket.create_server(("127.0.0.1", ranks.port))
        if server == "talking":
            threading.Thread(target=refuse_as_http, args=(listener,), daemon=True).start()
    ranks.start_all()
    assert ranks.end() == {0: 1, 1: 1}
    assert f"nlm: 127.0.0.1:{ranks.port}: rank 0 on {HOST} cannot listen there" in ranks.said(0)
    assert "address already in use; choose another MASTER_PORT" in ranks.said(0)
    reasons = {
        "silent": "what listens there is not the store of this run",
        "a store": "what listens there is not the store of this run",
        "talking": "cannot join the other ranks there: Ping failed",
        "another run's": "another run, which has a rank 1 too, is there",
    }
    assert reasons[server] in ranks.said(1).splitlines()[-1]
    if server == "another run's":
        time.sleep(2)
        assert all(process.poll() is None for process in other.processes.values()), "the other run is disturbed"
    elif server == "a store":
        assert store.num_keys() <= 1, "the other store is written to"
    else:
        listener.close()


def refuse_as_http(listener: socket.socket) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client:
            client.recv(1000)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_rank_that_never_arrives(launch: Launch) -> None:
    ranks = launch(3)
    ranks.start(0)
    ranks.start(2)
    assert ranks.end() == {0: 1, 2: 1}
    assert ranks.everything().count("nlm: rank 1 of 3 did not arrive within 6 s") == 1


def test_rank_0_never_arrives(launch: Launch) -> None:
    ranks = launch(2)
    ranks.start(1)
    assert ranks.end() == {1: 1}
    assert f"127.0.0.1:{ranks.port}: rank 1 on {HOST} waited 6 s" in ranks.everything()


def test_another_config_on_one_rank(launch: Launch) -> None:
    ranks = launch(3)
    for rank in range(3):
        ranks.start(rank, f"optim.lr={0.002 if rank == 1 else 0.001}")
    assert ranks.end() == {0: 2, 1: 2, 2: 2}
    said = ranks.everything()
    assert said.count(f"rank 1 on {HOST}: optim.lr is 0.002 and not 0.001") == 1 and len(said.splitlines()) == 2


def test_other_code_on_one_rank(launch: Launch, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "copy" / "nlm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "copy" / "nlm" / "guard.py").write_text((PACKAGE / "guard.py").read_text() + "\n# another version\n")
    ranks = launch(2)
    ranks.start(0)
    ranks.start(1, PYTHONPATH=str(tmp_path / "copy"))
    assert ranks.end() == {0: 2, 1: 2}
    said = ranks.everything()
    assert len(re.findall(rf"rank 1 on {HOST}: sha256 of nlm/guard.py is '\w+' and not '\w+'\n", said)) == 1
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_rank_dies_inside_a_collective(rank: int, how: signal.Signals, launch: Launch) -> None:
    """Without an agent; rank 0 hosts the store."""
    ranks = launch(3)
    ranks.start_all(FAULT="none")
    ranks.all_step()
    died = ranks.processes[rank]
    died.send_signal(how)
    began = time.monotonic()
    assert set(ranks.end(20, but=rank).values()) == {1}
    print(f"rank {rank} {how.name}: the others ended after {time.monotonic() - began:.1f} s")
    for other in {0, 1, 2} - {rank}:
        blamed = [line for line in ranks.said(other).splitlines() if line.startswith("nlm: ")]
        assert len(blamed) == 1 and blamed[0].startswith(f"nlm: rank {rank} on {HOST}: "), blamed
        silence = "is gone" if how == signal.SIGKILL else "has not answered for 4 s"
        assert (silence if rank == 0 else "no heartbeat for 4 s") in blamed[0]
    ranks.everything()
    died.send_signal(signal.SIGCONT)
    assert died.wait(DEADLINE_S) != 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_raises(rank: int, launch: Launch) -> None:
    ranks = launch(3)
    ranks.start_all(FAULT="raise", FAULT_RANKS=str(rank))
    assert ranks.end() == {0: 1, 1: 1, 2: 1}
    assert ranks.said(rank) == "nlm: step 10: loss nan\n"
    for other in {0, 1, 2} - {rank}:
        assert f"nlm: rank {rank} on {HOST}: FloatingPointError: step 10: loss nan\n" in ranks.said(other)
    ranks.everything()


def test_all_ranks_raise_the_same(launch: Launch) -> None:
    ranks = launch(3)
    ranks.start_all(FAULT="raise", FAULT_RANKS="0 1 2")
    assert ranks.end() == {0: 1, 1: 1, 2: 1}
    assert ranks.everything() == "nlm: step 10: loss nan\n"


def test_it_takes_its_time_until_the_first_step(launch: Launch) -> None:
    """To build and compile the model, which is no hang."""
    ranks = launch(2)
    for rank in range(2):
        ranks.start(rank, "faults.hang_minutes=0.05", FAULT="starts late", FAULT_RANKS="1")
    assert ranks.end() == {0: 0, 1: 0}
    assert ranks.everything() == ""


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_hangs(rank: int, launch: Launch) -> None:
    """It lives and beats, but takes no step; the others wait for it. All say so, and what each did is in files."""
    ranks = launch(3)
    for each in range(3):
        ranks.start(each, "faults.hang_minutes=0.05", FAULT="hang", FAULT_RANKS=str(rank))
    assert ranks.end() == {0: 1, 1: 1, 2: 1}
    where = r"it is at cli\.py:\d+ in _train, from there at faulty_rank\.py:\d+ in read_for_ever"
    waiting = r"waiting in all_reduce number 12 of group 0, at cli\.py:\d+ in _train: rank \d and 1 more"
    dumps = ranks.folder / "hang"
    for other in range(3):
        pattern = rf"nlm: rank {rank} on {HOST}: no step has ended for 3 s: {where}; {waiting}; see {dumps}\n"
        assert re.search(pattern, ranks.said(other)), ranks.said(other)
        assert (dumps / f"trace_rank_{other}").stat().st_size > 1000
        stacks = (dumps / f"stacks_rank_{other}.txt").read_text()
        assert (("in read_for_ever" in stacks) == (other == rank) and "in all_reduce" in stacks) or other == rank
    ranks.everything()


def torchrun(ranks: Ranks, **environment: str) -> None:
    command: list[str | Path] = [
        *(sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"),
        *("--master-port", str(ranks.port), "--nproc-per-node", str(ranks.world_size), WORKER),
    ]
    ranks.run(0, command, (), environment)


def test_a_rank_of_torchrun_dies(launch: Launch) -> None:
    ranks = launch(3)
    torchrun(ranks, FAULT="none")
    ranks.all_step()
    agent = ranks.processes[0].pid
    workers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in workers}
    (worker,) = (pid for pid, environment in environments.items() if "RANK=1" in environment)
    os.kill(int(worker), signal.SIGKILL)
    assert ranks.end() == {0: 1}
    said = ranks.said(0)
    assert re.search(r"Root Cause.*host +: .*\n +rank +: 1 .*\(SIGKILL\)", said, re.DOTALL)


def test_ranks_of_torchrun_speak_once(launch: Launch) -> None:
    ranks = launch(2, mesh=4)
    torchrun(ranks)
    assert ranks.end() == {0: 1}
    said = ranks.said(0)
    assert said.count("nlm: the mesh needs") == 1
    assert re.search(r"exitcode +: 2 ", said)


def test_ranks_of_torchrun_leave_quietly(launch: Launch) -> None:
    ranks = launch(2)
    torchrun(ranks, FAULT_RANKS="0")
    assert ranks.end() == {0: 0}
    assert "nlm: " not in ranks.everything()
