"""A cluster: which nodes there are, and how ranks are started on them. One TOML file, torch-free as every config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from nlm.config import ConfigError, Section, describe, nearest, read_file

Port = Annotated[int, Field(ge=1024, le=65535)]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""What Kubernetes admits."""


class Cluster(Section):
    """`workdir` is the clone of nlm, at the same path on every node (by default this one), `python` the interpreter
    there (.venv/bin/python, or python3). `environment`: variables that all ranks get, such as NCCL's for the fabric.
    """

    ranks_per_node: PositiveInt
    workdir: str | None = None
    python: str | None = None
    environment: dict[str, str] = {}

    @property
    def n_nodes(self) -> int:
        raise NotImplementedError

    @property
    def ranks(self) -> int:
        return self.n_nodes * self.ranks_per_node


class LocalCluster(Cluster):
    """This machine, by torchrun. Ranks that fail are started again `max_restarts` times."""

    max_restarts: NonNegativeInt = 0

    @property
    def n_nodes(self) -> int:
        return 1


class Hosts(Cluster):
    """Machines by name, the first of which holds the rendezvous, at `port`. `interface` is the network between them."""

    hosts: Annotated[list[str], Field(min_length=1)]
    port: Port = 29400
    interface: str | None = None

    @property
    def n_nodes(self) -> int:
        return len(self.hosts)


class SshCluster(Hosts):
    """torchrun on every host, by `ssh` with its `options`. `max_restarts` of ranks that fail, and of lost hosts, each
    after `reconnect_s`, in which a host may start."""

    max_restarts: NonNegativeInt = 0
    reconnect_s: PositiveInt = 30
    options: list[str] = []


class DeepSpeedCluster(Hosts):
    """DeepSpeed's launcher on this machine, which starts the ranks of all hosts by pdsh; a single host is this one."""


class MpiCluster(Hosts):
    """Open MPI's mpirun, with its `options`."""

    options: list[str] = []


class SlurmCluster(Cluster):
    """`sbatch`, with its `options`. `gpus`: asks for one a rank. `time` is Slurm's, such as "1-00:00:00".

    In a `container` ranks run in `image`, which sees the clone and `mounts` ("/data:/data").
    """

    nodes: PositiveInt
    gpus: bool = True
    interface: str | None = None
    max_restarts: NonNegativeInt = 0
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    options: list[str] = []
    container: Literal["pyxis", "apptainer"] | None = None
    image: str | None = None
    mounts: list[str] = []

    @property
    def n_nodes(self) -> int:
        return self.nodes


class KubernetesCluster(Cluster):
    """A Job, or Kubeflow's PyTorchJob, called `name`. `claim`: the persistent volume that is mounted as `workdir`.

    `gpus`: asks for one a rank. `image` has Python and what nlm depends on; its code is that of the clone.
    """

    nodes: PositiveInt
    workdir: str = "/nlm"
    image: str
    claim: str
    name: Name = "nlm"
    namespace: Name | None = None
    job: Literal["job", "pytorchjob"] = "job"
    gpus: bool = True
    port: Port = 29400
    interface: str | None = None
    max_restarts: NonNegativeInt = 0

    @property
    def n_nodes(self) -> int:
        return self.nodes


KINDS: Mapping[str, type[Cluster]] = {
    "local": LocalCluster,
    "ssh": SshCluster,
    "deepspeed": DeepSpeedCluster,
    "mpi": MpiCluster,
    "slurm": SlurmCluster,
    "kubernetes": KubernetesCluster,
}


def read_cluster(path: str | Path) -> Cluster:
    """Errors: ConfigError with every problem."""
    table = read_file(Path(path))
    kind = table.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError([f"{path}: kind: expected how ranks are started, got {kind!r}; {nearest(str(kind), KINDS)}"])
    try:
        cluster = KINDS[kind].model_validate(table)
    except ValidationError as error:
        raise ConfigError(describe(error.errors(), prefix=f"{path}: ")) from None
    if isinstance(cluster, SlurmCluster) and (cluster.container is None) != (cluster.image is None):
        raise ConfigError([f"{path}: container and image: expected both or neither"])
    if isinstance(cluster, SlurmCluster) and cluster.mounts and cluster.container is None:
        raise ConfigError([f"{path}: mounts: are of a container; set container and image, or remove it"])
    return cluster
