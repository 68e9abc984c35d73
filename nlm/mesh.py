"""The mesh of ranks: how many stand along each axis of the layout, and where this one stands."""

from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nlm.config import ParallelConfig
from nlm.parallel.tensor import Ranks, TensorParallel

T = TypeVar("T")
MeshAxis = Literal["pp", "dp_replicate", "dp_shard", "tp"]
AXES: tuple[MeshAxis, ...] = ("pp", "dp_replicate", "dp_shard", "tp")
"""From the outermost, whose neighbours are farthest apart, to the innermost."""
DATA_AXES: tuple[MeshAxis, ...] = ("dp_replicate", "dp_shard")
"""Along which ranks have other rows of the same batch."""


class Mesh:
    """This rank's place. One rank alone needs no process group; more must have joined one."""

    def __init__(self, parallel: ParallelConfig | None = None, device: torch.device | None = None) -> None:
        self.sizes: dict[MeshAxis, int] = {axis: getattr(parallel, axis, 1) for axis in AXES}
        self.device = device or torch.device("cpu")
        self.device_mesh: DeviceMesh | None = None
        if any(size > 1 for size in self.sizes.values()):
            self.device_mesh = init_device_mesh(self.device.type, tuple(self.sizes.values()), mesh_dim_names=AXES)
        self.tp = TensorParallel(self.group("tp"), parallel is not None and parallel.sequence_parallel)
        self.data = tuple(Ranks(group) for axis in DATA_AXES if (group := self.group(axis)))
        self.ends = self._ends()

    def rank(self, axis: MeshAxis) -> int:
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)

    def group(self, axis: MeshAxis) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axis` only; None where it is alone."""
        if self.device_mesh is None or self.sizes[axis] == 1:
            return None
        return self.device_mesh.get_group(axis)

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that talks to people and writes the run's files."""
        return self.device_mesh is None or dist.get_rank() == 0

    @property
    def data_size(self) -> int:
        """How many parts each batch is divided into."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    @property
    def data_rank(self) -> int:
        return self.rank("dp_replicate") * self.sizes["dp_shard"] + self.rank("dp_shard")

    def sum(self, x: Tensor) -> Tensor:
        """In place: the sum over all ranks of the mesh."""
        if self.device_mesh is not None:
            dist.all_reduce(x)
        return x

    def max(self, x: Tensor) -> Tensor:
        """In place: the largest over all ranks of the mesh."""
        if self.device_mesh is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def told(self, value: T) -> T:
        """What the rank that speaks has."""
        if self.device_mesh is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def _ends(self) -> dist.ProcessGroup | None:
        """This rank with its counterpart at the other end of the pipeline; None for ranks in its middle."""
        if self.device_mesh is None or self.sizes["pp"] == 1:
            return None
        pairs = torch.stack([self.device_mesh.mesh[0], self.device_mesh.mesh[-1]]).flatten(1).T
        group, _ = dist.new_subgroups_by_enumeration(pairs.tolist())
        return group  # type: ignore[no-any-return]
