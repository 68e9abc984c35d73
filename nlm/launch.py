"""`nlm launch`: the scripts of launch/, with the variables that a cluster file gives them.

The scripts know how ranks are started, the cluster file where; here the one becomes arguments of the other.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from nlm.build import load_config
from nlm.cluster import (
    Cluster,
    DeepSpeedCluster,
    Hosts,
    KubernetesCluster,
    LocalCluster,
    MpiCluster,
    SlurmCluster,
    SshCluster,
    read_cluster,
)
from nlm.config import ConfigError
from nlm.stop import REQUEUE

ROOT = Path(__file__).parents[1]
LOST = 255  # ssh's exit code for a connection that failed
INTERRUPT = b"\x03"  # Ctrl-C, to the terminal that ssh -tt opens


@dataclass(frozen=True)
class Command:
    """What is run here; as text, what to paste into a shell."""

    words: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    stdin: str | None = None

    def __str__(self) -> str:
        text = shlex.join(self.words)
        for name, value in reversed(list(self.environment.items())):
            text = f"{name}={shlex.quote(value)} {text}"
        if self.folder is not None:
            text = f"cd {shlex.quote(self.folder)} && {text}"
        return text if self.stdin is None else f"{text} <<'EOF'\n{self.stdin}EOF"


def launch(
    config: str, overrides: Sequence[str], cluster_file: str | Path, sweep: Path | None = None, dry_run: bool = False
) -> int:
    """Trains `config` on the ranks of a cluster, or prints the commands that would -> the exit code of what ran.

    `sweep`: a file of overrides, a line a run, each a job of a Slurm array.
    Errors: ConfigError for a bad config or cluster, and where the two differ in the number of ranks. FileNotFoundError
    for nlm without launch/.
    """
    cluster = read_cluster(cluster_file)
    lines = _lines(sweep, cluster) if sweep else [[]]
    _check(cluster, cluster_file, config, [[*overrides, *line] for line in lines])
    if not (ROOT / "launch" / "env.sh").exists():
        raise FileNotFoundError(
            f"{ROOT / 'launch'}: not there: the launch scripts come with nlm's clone; "
            "install nlm from it with `pip install --editable .`"
        )
    commands = commands_of(cluster, [_from_root(config), *overrides], sweep, len(lines))
    if dry_run:
        print("\n".join(map(str, commands)))
        return 0
    return _run_on_hosts(commands, cluster) if isinstance(cluster, SshCluster) else _run(commands[0])


def commands_of(
    cluster: Cluster, arguments: Sequence[str], sweep: Path | None = None, n_runs: int = 1
) -> list[Command]:
    """One, or for ssh one a host. `arguments`: the config and its overrides."""
    workdir = cluster.workdir or str(ROOT)
    variables = _variables(cluster)
    match cluster:
        case LocalCluster():
            return [Command(["launch/torchrun.sh", *arguments], variables, workdir)]
        case SshCluster():
            there = Command(["launch/torchrun.sh", *arguments], variables, workdir)
            # The cluster's first: of several that have one name, the first counts.
            options = ["-tt", *cluster.options, "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15"]
            return [Command(["ssh", *options, host, str(there)]) for host in cluster.hosts]
        case DeepSpeedCluster():
            return [Command(["launch/deepspeed.sh", *arguments], variables, workdir)]
        case MpiCluster():
            return [Command(["launch/mpirun.sh", *arguments], variables, workdir)]
        case SlurmCluster():
            if sweep:
                variables["SWEEP"] = str(sweep.resolve())
            array = [f"--array=0-{n_runs - 1}"] if sweep else []
            return [Command([*_sbatch(cluster), *array, "launch/slurm.sbatch", *arguments], variables, workdir)]
        case KubernetesCluster():
            return [_kubectl(cluster, arguments)]
    raise AssertionError(f"{type(cluster).__name__} has no launch script")


def _variables(cluster: Cluster) -> dict[str, str]:
    """Those of launch/env.sh, and the cluster's own."""
    named = {
        "HOSTS": " ".join(cluster.hosts) if isinstance(cluster, Hosts) else None,
        "RANKS_PER_NODE": None if isinstance(cluster, SlurmCluster) else cluster.ranks_per_node,
        "MASTER_PORT": getattr(cluster, "port", None),
        "INTERFACE": getattr(cluster, "interface", None),
        "MAX_RESTARTS": getattr(cluster, "max_restarts", None) or None,
        "PYTHON": cluster.python,
        "MPIRUN_OPTIONS": " ".join(cluster.options) or None if isinstance(cluster, MpiCluster) else None,
    }
    if isinstance(cluster, SlurmCluster):
        named |= {"CONTAINER": cluster.container, "IMAGE": cluster.image, "MOUNTS": ",".join(cluster.mounts) or None}
    if isinstance(cluster, DeepSpeedCluster | MpiCluster):
        named["EXPORT"] = " ".join(cluster.environment) or None
    return {name: str(value) for name, value in named.items() if value is not None} | cluster.environment


def _sbatch(cluster: SlurmCluster) -> list[str]:
    named = {
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "gpus-per-node": cluster.ranks_per_node if cluster.gpus else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return ["sbatch", *options, *cluster.options]


def _kubectl(cluster: KubernetesCluster, arguments: Sequence[str]) -> Command:
    own = dict(cluster.environment)
    own |= {name: value for name in ("INTERFACE", "PYTHON") if (value := getattr(cluster, name.lower())) is not None}
    values = {
        "NAME": cluster.name,
        "IMAGE": cluster.image,
        "CLAIM": cluster.claim,
        "WORKDIR": cluster.workdir,
        "NNODES": cluster.nodes,
        "WORKERS": cluster.nodes - 1,
        "RANKS_PER_NODE": cluster.ranks_per_node,
        "GPUS": cluster.ranks_per_node if cluster.gpus else 0,
        "MASTER_PORT": cluster.port,
        "MAX_RESTARTS": cluster.max_restarts,
        # Kubernetes would replace $(A).
        "COMMAND": json.dumps(
            [word.replace("$(", "$$(") for word in [*map("=".join, own.items()), "launch/torchrun.sh", *arguments]]
        ),
    }
    script = {"job": "k8s.yaml", "pytorchjob": "k8s-pytorchjob.yaml"}[cluster.job]
    text = (ROOT / "launch" / script).read_text(encoding="utf-8")
    manifest = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    where = ["--namespace", cluster.namespace] if cluster.namespace else []
    return Command(["kubectl", *where, "apply", "-f", "-"], stdin=Template(manifest).substitute(values))


def _check(cluster: Cluster, file: str | Path, config: str, runs: Sequence[Sequence[str]]) -> None:
    """Every run's config is valid and has as many ranks as the cluster, and no two write the same folder."""
    folders = []
    for overrides in runs:
        loaded = load_config(config, overrides)
        folders.append(loaded.log.dir)
        parallel = loaded.parallel
        if parallel.ranks != cluster.ranks:
            sizes = f"{parallel.pp} · {parallel.dp_replicate} · {parallel.dp_shard} · {parallel.tp} = {parallel.ranks}"
            raise ConfigError(
                [
                    f"parallel: pp · dp_replicate · dp_shard · tp = {sizes} ranks, but {file} has {cluster.n_nodes} · "
                    f"{cluster.ranks_per_node} = {cluster.ranks} (nodes · ranks_per_node); make the two equal"
                ]
            )
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise ConfigError([f"log.dir: {', '.join(sorted(twice))}: of several runs of the sweep; give each its own"])


def _lines(sweep: Path, cluster: Cluster) -> list[list[str]]:
    if not isinstance(cluster, SlurmCluster):
        raise ConfigError(["--sweep: is a Slurm array; give a cluster of kind 'slurm'"])
    lines = [line.split() for line in sweep.read_text(encoding="utf-8").splitlines()]
    if not lines or not all(lines):
        raise ConfigError([f"{sweep}: expected overrides (key=value …) in every line, and no empty line"])
    return lines


def _from_root(config: str) -> str:
    """As the nodes, whose working directory is the clone, know the file."""
    path = Path(config).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _run(command: Command) -> int:
    """In the place of this process, which its signals then reach."""
    if command.stdin is not None:
        return subprocess.run(command.words, input=command.stdin, text=True).returncode
    sys.stdout.flush()
    if command.folder is not None:
        os.chdir(command.folder)
    os.execvpe(command.words[0], command.words, os.environ | command.environment)


def _run_on_hosts(commands: Sequence[Command], cluster: SshCluster) -> int:
    """All at once; a host whose connection is lost is tried again while the others wait for it. Signals, and the first
    failure, stop all -> the first exit code that is neither "done" nor "asked to stop", else that of these."""
    running: dict[int, subprocess.Popen[bytes]] = {}
    stop = threading.Event()

    def ask(*_: object) -> None:
        stop.set()
        for process in list(running.values()):
            if process.stdin is not None and process.poll() is None:
                process.stdin.write(INTERRUPT)

    def on_host(n: int) -> int:
        for restarts in range(cluster.max_restarts, -1, -1):
            running[n] = subprocess.Popen(commands[n].words, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
            code = running[n].wait()
            if code != LOST or stop.is_set() or not restarts:
                break
            again = f"once more in {cluster.reconnect_s} s"
            print(f"nlm: {cluster.hosts[n]}: the connection is lost; {again}", file=sys.stderr, flush=True)
            stop.wait(cluster.reconnect_s)
        if code not in (0, REQUEUE):
            ask()
        return code

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, ask)
    with ThreadPoolExecutor(len(commands)) as pool:
        codes = list(pool.map(on_host, range(len(commands))))
    failed = [code for code in codes if code not in (0, REQUEUE)]
    return failed[0] if failed else max(codes)
