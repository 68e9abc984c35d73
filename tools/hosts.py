"""Hosts on this machine: Linux namespaces, joined by a bridge to which nothing else is.

Each has an interface, an address, a hostname, an /etc/hosts, a home and processes of its own; files are shared, as on
a cluster. What it runs ends with it, and it ends with the process that made it.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTERFACE = "eth0"
SSH_PORT = 2222


def missing(*programs: str) -> str | None:
    """Why there can be no hosts here with these programs, or None."""
    needed = ("unshare", "nsenter", "ip", *programs)
    if absent := [name for name in needed if not _which(name)]:
        return f"not installed: {', '.join(absent)}"
    make = ["unshare", *NEW, "sh", "-c", "hostname x && ip link add y type bridge && mount -t tmpfs tmpfs /run"]
    tried = subprocess.run(make, capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@dataclass
class Host:
    """`outside`: the pid of its first process as this process sees it; `switch`: of that which holds the bridge."""

    name: str
    address: str
    folder: Path
    switch: int
    outside: int
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
        """What it says goes to a file, `said`: nobody need read it for it to go on."""
        own = {"HOME": str(self.home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
        with (self.folder / f"said-{len(self.started)}").open("w") as said:
            process = subprocess.Popen(
                [*_inside(self.outside, *NAMESPACES), "env", f"--chdir={ROOT}", *command],
                env=os.environ | own | environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.started.append(process)
        return process

    def run(self, *command: str | Path) -> str:
        process = self.start(command)
        code, said = process.wait(60), self.said(process)
        assert code == 0, f"{command}: {said}"
        return said

    def said(self, process: subprocess.Popen[str]) -> str:
        return (self.folder / f"said-{self.started.index(process)}").read_text()

    def signal(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """To the command itself: nsenter, its parent, passes nothing on."""
        for child in _children(process.pid):
            os.kill(child, number)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def cut(self) -> None:
        """As if its cable were pulled: packets vanish, and neither side is told."""
        self._port("down")

    def mend(self) -> None:
        self._port("up")

    def crash(self) -> None:
        """All that runs there is killed at once; the host is up again, with nothing started."""
        self.run("sh", "-c", "kill -KILL -1")

    def _port(self, state: str) -> None:
        subprocess.run([*_inside(self.switch, "--net"), "ip", "link", "set", "dev", self.name, state], check=True)

    def slow_down(self, bytes_s: float) -> None:
        """What it sends; bursts of at most 64 KiB go faster."""
        rate = f"{8 * bytes_s:.0f}bit"
        shape = ["root", "tbf", "rate", rate, "burst", "65536", "limit", str(2**20)]
        self.run("tc", "qdisc", "replace", "dev", INTERFACE, *shape)

    def serve_ssh(self) -> None:
        """At SSH_PORT, to whoever has the key in a home of these hosts."""
        keys, port = self.folder.parent / "keys", str(SSH_PORT)
        options = {"HostKey": keys / "host", "AuthorizedKeysFile": keys / "user.pub", "StrictModes": "no"}
        options |= {"UsePAM": "no", "PermitRootLogin": "yes", "PasswordAuthentication": "no", "PidFile": "none"}
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self.start([str(_which("sshd")), "-D", "-e", "-f", os.devnull, "-p", port, *words])


NAMESPACES = ("--net", "--uts", "--mount", "--pid")
NEW = (*NAMESPACES, "--fork", "--mount-proc")
SETUP = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/passwd" /etc/passwd
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
echo ready
exec cat
"""


@contextmanager
def hosts(n: int, folder: Path, known: bool = True) -> Iterator[tuple[Host, ...]]:
    """`n` of them, called a, b, …, at 10.77.0.1, ….2, …; what belongs to them lies in `folder`.

    As on Debian, a host finds 127.0.1.1 under its own name. The others' names are `known` to it, or only addresses.
    """
    addresses = {chr(ord("a") + i): f"10.77.0.{i + 1}" for i in range(n)}
    _write_keys(folder / "keys")
    with ExitStack() as stack:
        switch = stack.enter_context(_until_closed(["unshare", "--net", "sh", "-c", "echo ready; exec cat"]))
        subprocess.run([*_inside(switch, "--net"), "sh", "-c", BRIDGE], check=True)
        made = []
        for name, address in addresses.items():
            own = folder / name
            others = {a: b for a, b in addresses.items() if a != name and known}
            _write_files(own, name, others, folder / "keys")
            command = ["unshare", *NEW, "sh", "-c", SETUP, "setup", name, str(own)]
            (outside,) = _children(stack.enter_context(_until_closed(command)))
            veth = f"ip link add name {name} type veth peer name {INTERFACE} netns {outside}"
            subprocess.run(
                [*_inside(switch, "--net"), "sh", "-c", f"{veth} && ip link set dev {name} master br0 up"], check=True
            )
            made.append(host := Host(name, address, own, switch, outside))
            host.run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", "dev", INTERFACE, "up")
        yield tuple(made)


BRIDGE = "ip link add br0 type bridge && ip link set br0 up"


@contextmanager
def _until_closed(command: Sequence[str]) -> Iterator[int]:
    """Something that lives as long as its stdin is open, once it is ready -> its pid."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "ready\n", f"{command} failed"
        yield process.pid
    finally:
        process.stdin.close()  # the first process of a namespace of pids takes all others with it
        process.wait()
        process.stdout.close()


def _write_files(own: Path, name: str, others: dict[str, str], keys: Path) -> None:
    (own / "home" / ".ssh").mkdir(parents=True)
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *(f"{address} {other}" for other, address in others.items())]
    (own / "hosts").write_text("\n".join(lines) + "\n")
    users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (own / "passwd").write_text("\n".join([f"root:*:0:0::{own}/home:/bin/bash", *users]) + "\n")
    if keys.exists():
        options = f"IdentityFile {keys}/user\nUserKnownHostsFile {keys}/known\nPort {SSH_PORT}\n"
        (own / "home" / ".ssh" / "config").write_text(f"{options}StrictHostKeyChecking yes\n")


def _write_keys(folder: Path) -> None:
    if not shutil.which("ssh-keygen"):
        return
    folder.mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "known").write_text(f"* {(folder / 'host.pub').read_text()}")


def _inside(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", f"--target={pid}", *namespaces]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
