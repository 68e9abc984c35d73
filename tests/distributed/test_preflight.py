"""Ranks, hosts and links that cannot carry a run: each is named, with what was expected of it.

The faults are real (mount, network and host name namespaces, a full disk, a clock that the C library shifts, changed
code), but for what a processor computes: no sick one can be had (unfit_rank.py).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_faults import DEADLINE_S, HOST, LAUNCHER, PACKAGE, Ranks

from nlm.config import Config

WORKER = Path(__file__).with_name("unfit_rank.py")
SCRIPT = PACKAGE.parent / "launch" / "preflight.py"
SHIFTED_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *t) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, t);
  if (clock == CLOCK_REALTIME) t->tv_sec += 3;
  return result;
}
"""


def may(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def in_namespaces(host: str, *own: str, first: str = "true", network: str | None = None) -> list[str]:
    """What to put before a command for it to run on another "host", with what `first` does there."""
    where = ["ip", "netns", "exec", network] if network else []
    return [*where, "unshare", "--uts", *own, "sh", "-c", f'hostname {host} && {first} && exec "$@"', "sh"]


MOUNTS = may("unshare", "--mount", "--uts", "sh", "-c", "mount -t tmpfs none /mnt && hostname elsewhere")
needs_mounts = pytest.mark.skipif(not MOUNTS, reason="may not mount: needs root and unshare")


class Unfit:
    """What three ranks say: rank 0 is well, 1 has a folder and a clock of its own, 2 a slow link and wrong products."""

    def __init__(self, folder: Path, make_config: Callable[..., Config]) -> None:
        self.ranks = Ranks(folder, make_config, 3)
        self.missing: dict[str, str] = {}
        self.codes: dict[int, int] = {}
        self.said = ""
        (folder / "shift.c").write_text(SHIFTED_CLOCK)
        shift = str(folder / "shift.so")
        if not may("cc", "-shared", "-fPIC", "-o", shift, str(folder / "shift.c"), "-ldl"):
            self.missing["clock"] = "needs a C compiler"
        self.network = f"nlm{os.getpid()}"
        self.slow = self._slow_link()
        if not self.slow:
            self.missing["link"] = "may not make a network namespace with a slow link: needs root, ip and tc"
        self.run = folder / "run"
        self.run.mkdir()
        own_folder = f"mount -t tmpfs none {self.run}"
        before = {
            0: in_namespaces("node0"),
            1: in_namespaces("node1", "--mount", first=own_folder),
            2: in_namespaces("node2", network=self.network if self.slow else None),
        }
        for rank in range(3):
            environment = dict(zip(LAUNCHER, (str(rank), "3", "0", "127.0.0.1", str(self.ranks.port)), strict=True))
            environment |= {"FAULT": "wrong"} if rank == 2 else {}
            if self.slow:
                end = "b" if rank == 2 else "a"
                environment |= {"MASTER_ADDR": self.address, "GLOO_SOCKET_IFNAME": self.network + end}
            if rank == 1 and "clock" not in self.missing:
                environment["LD_PRELOAD"] = shift
            self.ranks.run(rank, [*before[rank], sys.executable, str(WORKER)], (f"log.dir={self.run}",), environment)

    def _slow_link(self) -> bool:
        a, b, net = self.network + "a", self.network + "b", f"10.213.{os.getpid() % 250}"
        self.address = f"{net}.1"
        commands = [
            f"ip netns add {self.network}",
            f"ip link add {a} type veth peer name {b} netns {self.network}",
            f"ip addr add {net}.1/24 dev {a}",
            f"ip link set {a} up",
            f"ip -n {self.network} addr add {net}.2/24 dev {b}",
            f"ip -n {self.network} link set {b} up",
            f"ip -n {self.network} link set lo up",
            f"tc -n {self.network} qdisc add dev {b} root tbf rate 40mbit burst 64kb latency 200ms",
        ]
        return MOUNTS and all(may(*command.split()) for command in commands)

    def clear(self) -> None:
        self.ranks.clear()
        may("ip", "netns", "del", self.network)
        may("ip", "link", "del", self.network + "a")


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]) -> Iterator[Unfit]:
    found = Unfit(tmp_path_factory.mktemp("unfit"), make_config)
    try:
        found.codes = found.ranks.end()
        found.said = found.ranks.said(0)
        yield found
    finally:
        found.clear()


def blamed(said: str, check: str) -> set[str]:
    """Who is, for that check."""
    return {rank for line in re.findall(rf"nlm: (.+?): {check}: ", said) for rank in line.split(", ")}


@needs_mounts
def test_all_ranks_end_and_say_the_same(unfit: Unfit) -> None:
    assert unfit.codes == {0: 1, 1: 1, 2: 1}
    assert unfit.said.startswith("nlm: preflight failed:\n") and "Traceback" not in unfit.said, unfit.said
    for rank in range(3):  # torch has warnings of its own about addresses without a name
        assert [line for line in unfit.ranks.said(rank).splitlines() if line.startswith("nlm: ")] == (
            unfit.said.splitlines()
        )
    assert not blamed(unfit.said, "health") and not list(unfit.run.glob(".preflight*"))


@needs_mounts
def test_a_folder_of_its_own(unfit: Unfit) -> None:
    assert blamed(unfit.said, "disk") == {"rank 1 on node1"}
    assert f"expected in {unfit.run} the token that rank 0 left; came no such file; put log.dir" in unfit.said


@needs_mounts
def test_a_clock_that_is_ahead(unfit: Unfit) -> None:
    if "clock" in unfit.missing:
        pytest.skip(unfit.missing["clock"])
    assert blamed(unfit.said, "clock") == {"rank 1 on node1"}
    (skew,) = re.findall(r"within 500 ms of rank 0's; came ([+-]\d+) ms \(±", unfit.said)
    assert 2000 < int(skew) < 4000


@needs_mounts
def test_a_link_that_is_slow(unfit: Unfit) -> None:
    """The kernel lets 5 MB/s through; both links of that rank are slow, and no other's."""
    if "link" in unfit.missing:
        pytest.skip(unfit.missing["link"])
    assert blamed(unfit.said, "point to point") == {"rank 2 on node2"}
    (came,) = re.findall(r"to its neighbours, .*; came ([\d.]+) GB/s; test that link alone", unfit.said)
    assert 0.001 < float(came) < 0.02


@needs_mounts
def test_a_product_that_is_wrong(unfit: Unfit) -> None:
    assert blamed(unfit.said, "product") == {"rank 2 on node2"}
    assert re.search(
        r"expected a product as exact as rounding lets it be; came [\d.e+]+ times as much; this", unfit.said
    )


@pytest.fixture
def ranks(tmp_path: Path, make_config: Callable[..., Config]) -> Iterator[Ranks]:
    made = Ranks(tmp_path, make_config, 2)
    yield made
    made.clear()


def launcher(ranks: Ranks, rank: int, **more: str) -> dict[str, str]:
    return dict(zip(LAUNCHER, (str(rank), "2", str(rank), "127.0.0.1", str(ranks.port)), strict=True)) | more


def test_a_check_that_never_ends(ranks: Ranks) -> None:
    """Its rank lives and beats; it is the one that is named. The checks after it are run all the same."""
    ranks.run(0, [sys.executable, WORKER], (), launcher(ranks, 0, CHECK_S="30", FAULT="moody"))
    ranks.run(1, [sys.executable, WORKER], (), launcher(ranks, 1, CHECK_S="30", FAULT="endless"))
    assert ranks.end() == {0: 1, 1: 1}
    said = ranks.everything()
    line = (
        f"nlm: rank 1 on {HOST}: product: expected it to come to its end; came no end within 30 s; see what else runs"
    )
    assert said.count(line) == 1
    assert f"nlm: rank 0 on {HOST}: product: expected the same product twice; came two that differ" in said
    assert len(said.splitlines()) == 3, said


def test_other_code_and_another_torch(ranks: Ranks, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGE, copy / "nlm", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "nlm" / "guard.py").write_text((PACKAGE / "guard.py").read_text() + "\n# another version\n")
    ranks.run(0, [sys.executable, WORKER], (), launcher(ranks, 0))
    ranks.run(1, [sys.executable, WORKER], (), launcher(ranks, 1, PYTHONPATH=str(copy), FAULT="another torch"))
    assert ranks.end() == {0: 2, 1: 2}
    said = ranks.everything()
    assert re.search(
        rf"rank 1 on {HOST}: torch is '2\.0\.1' and not '[\w.+]+', sha256 of nlm/guard.py is '\w+' and not '\w+'\n",
        said,
    )


@needs_mounts
def test_a_disk_that_is_full(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """One process, without a launcher, through launch/preflight.py."""
    disk, path = tmp_path / "disk", tmp_path / "config.toml"
    disk.mkdir()
    path.write_text(make_config(log={"dir": str(disk)}).to_toml())
    there = in_namespaces("node0", "--mount", first=f"mount -t tmpfs -o size=1m none {disk}")
    done = subprocess.run(
        [*there, sys.executable, str(SCRIPT), str(path)],
        env={key: value for key, value in os.environ.items() if key not in LAUNCHER}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1, done.stderr
    assert (
        "rank 0 on node0: disk: expected it to come to its end; came OSError: [Errno 28] No space left" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 2, done.stderr
    heading, *_, row = (line for line in done.stdout.splitlines() if line.strip())
    assert heading.startswith("preflight: 1 rank on 1 host, torch ") and re.match(r" ?0 +node0 .*!", row), done.stdout
    assert "GB/s" not in done.stdout and "°C" not in done.stdout, "of one CPU there is nothing to say about that"
