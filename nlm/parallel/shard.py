"""Sharding parameters, gradients and optimizer state over data parallel ranks: FSDP2, and HSDP on a 2-D mesh."""

from functools import partial
from math import ceil

from torch.distributed.fsdp import fully_shard

from nlm.config import ParallelConfig
from nlm.mesh import Mesh
from nlm.model import Transformer

UNITS = 40
"""By default the stack is gathered in about this many units: a unit's host time is a block's, whatever it holds, and
a unit of a 40th of the stack is still small beside the shards and activations of all of it."""
UNITS_KEPT = 10
"""Of parameters that stay gathered, units need to be small only to gather one while another computes."""


def shard(model: Transformer, parallel: ParallelConfig, mesh: Mesh) -> None:
    """In place, before the parameters are materialized; nothing where dp_shard = 1.

    Under a pipeline the parameters stay gathered through the step: every microbatch would gather them anew.
    """
    if mesh.device_mesh is None or mesh.sizes["dp_shard"] == 1 or parallel.engine != "torch":
        return
    axes = ("dp_replicate", "dp_shard") if mesh.sizes["dp_replicate"] > 1 else ("dp_shard",)
    reshard = reshards(parallel)
    divide = partial(fully_shard, mesh=mesh.device_mesh[axes], reshard_after_forward=reshard)
    blocks = list(model.layers.values())
    size = blocks_per_unit(parallel, len(blocks))
    for start in range(0, len(blocks), size):
        divide(blocks[start : start + size])
    divide(model)


def reshards(parallel: ParallelConfig) -> bool:
    """Whether gathered parameters are dropped after the forward."""
    return parallel.reshard and parallel.pp == 1


def blocks_per_unit(parallel: ParallelConfig, n_blocks: int) -> int:
    """How many of a rank's consecutive blocks are gathered at a time, which may have none."""
    return parallel.blocks_per_unit or max(1, ceil(n_blocks / (UNITS if reshards(parallel) else UNITS_KEPT)))
