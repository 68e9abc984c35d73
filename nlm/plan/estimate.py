"""How long a step may take: an estimate, a roofline over the kernels that were traced, and nothing that was measured.

Every kernel takes its arithmetic at the peak or its memory traffic at the bandwidth, both times `efficiency`, and no
less than the host needs to start it. Collectives of tensor parallelism are waited for, as the model does; those of data
parallelism run beside the computation and count where they take longer than it. Latencies do not count.
"""

from dataclasses import dataclass
from math import prod

from nlm.config import Config, ParallelConfig
from nlm.mesh import AXES, MeshAxis
from nlm.parallel.pipeline import stages_of
from nlm.parallel.recompute import times_again
from nlm.parallel.shard import reshards
from nlm.plan.gpus import Machine
from nlm.plan.memory import Costs, Stage, rows, stages_on, stream_bytes
from nlm.plan.schedule import makespan, orders
from nlm.plan.trace import Rise


@dataclass(frozen=True)
class Estimate:
    """Of a step, in seconds: all of it, the pipeline's computation with what it waits for, and what comes on top."""

    step_s: float
    pipeline_s: float
    communication_s: float
    update_s: float
    mfu: float


def kernels_s(machine: Machine, rise: Rise, tp: int) -> float:
    """Of kernels, and of what they send to tensor parallel ranks."""
    at_peak = rise.flops + rise.slow_flops  # GPUs that have float8 take bfloat16 at half the rate
    computed = at_peak / machine.peak_flops + rise.moved * _inverse(machine.memory_bandwidth)
    return max(computed / machine.efficiency, rise.kernels * machine.host_s) + sending_s(machine, rise.sent, tp)


def sending_s(machine: Machine, sent: float, spread: int) -> float:
    """Of bytes that a rank sends to others of a group that is spread over so many consecutive GPUs."""
    bandwidth = machine.link_bandwidth if spread <= machine.gpus_per_node else machine.network_bandwidth
    return sent * _inverse(bandwidth) / machine.efficiency


def _inverse(bandwidth: float | None) -> float:
    return 0.0 if bandwidth is None else 1 / bandwidth


def estimate(config: Config, costs: Costs, machine: Machine, flops_a_token: float) -> Estimate:
    parallel = config.parallel
    seconds = {key: kernels_s(machine, rise, parallel.tp) for key, rise in _works(config, costs).items()}
    pipeline_s = makespan(orders(parallel), seconds, parallel.n_stages - 1)
    sent, together = traffic(config, costs), parallel.tp * parallel.dp_shard
    spread: dict[MeshAxis, int] = {
        "dp_shard": together,
        "dp_replicate": together * parallel.dp_replicate,
        "pp": parallel.ranks,
    }
    sending = {axis: sending_s(machine, sent[axis], n) for axis, n in spread.items()}
    data_s = sending["dp_shard"] + sending["dp_replicate"]
    communication_s = sending["pp"] + max(0.0, data_s - pipeline_s)
    whole = sum(stage.whole for stage in stages_on(config, costs, 0).values())
    moved = costs.parameters.update("moved", whole) / parallel.dp_shard
    if parallel.recompute == "offload":  # there and back, while nothing else is done
        stack = sum(len(stage.part.layers) for stage in stages_on(config, costs, 0).values())
        away = 2 * parallel.microbatches * stack * stream_bytes(config)
        communication_s += away / machine.host_bandwidth / machine.efficiency
    update_s = kernels_s(machine, Rise(0, 0, 0, 0, moved, 0, 0), 1)
    step_s = pipeline_s + communication_s + update_s
    mfu = flops_a_token * config.train.batch_tokens / parallel.ranks / step_s / machine.peak_flops
    return Estimate(step_s, pipeline_s, communication_s, update_s, mfu)


def bubble(config: Config, costs: Costs) -> float:
    """The share of the pipeline's time in which a rank, on the average, waits for others; time is counted in FLOPs."""
    flops = {key: rise.flops for key, rise in _works(config, costs).items()}
    order = orders(config.parallel)
    busy = sum(flops[action.kind, action.stage] for actions in order for action in actions)
    return 1 - busy / len(order) / makespan(order, flops, config.parallel.n_stages - 1)


def hardware_flops(config: Config, costs: Costs) -> float:
    """A token, of all ranks together, what is computed again included."""
    works, parallel = _works(config, costs), config.parallel
    once = sum(rise.flops for (kind, _), rise in works.items() if kind in ("F", "B"))
    return once * parallel.tp / (rows(config) * config.train.seq_len)


def traffic(config: Config, costs: Costs) -> dict[MeshAxis, float]:
    """Bytes that the first rank sends in a step, by axis of the mesh; collectives as a ring has them."""
    parallel, sent = config.parallel, dict.fromkeys(AXES, 0.0)
    stages = stages_on(config, costs, 0)
    whole = sum(stage.whole for stage in stages.values())
    works = _works(config, costs)
    sent["tp"] = parallel.microbatches * sum(works[kind, s].sent for s in stages for kind in "FB")
    if parallel.pp > 1:
        order, last = _stage_ranks(parallel), parallel.n_stages - 1
        ahead = sum(s < last and order[s + 1] != 0 for s in stages) + sum(s > 0 and order[s - 1] != 0 for s in stages)
        sent["pp"] = parallel.microbatches * ahead * stream_bytes(config)
    shards, copies = parallel.dp_shard, parallel.dp_replicate
    if shards > 1:  # gathered in each forward and, where dropped, each backward; in a pipeline, once; reduced once
        gathers = parallel.microbatches * (2 if reshards(parallel) else 1) if parallel.pp == 1 else 1
        sent["dp_shard"] = (gathers + 1) * whole * (shards - 1) / shards
    sent["dp_replicate"] = 2 * whole / shards * (copies - 1) / copies
    return sent


def _stage_ranks(parallel: ParallelConfig) -> dict[int, int]:
    return {stage: rank for rank in range(parallel.pp) for stage in stages_of(rank, parallel)}


def _works(config: Config, costs: Costs) -> dict[tuple[str, int], Rise]:
    """What a microbatch is in every stage, by kind of action and stage."""
    found = {}
    for rank in range(config.parallel.pp):
        for s, stage in stages_on(config, costs, rank).items():
            places = list(stage.all.items())
            forward, backward = (
                Rise(*(sum(n * getattr(passed[place], name) for place, n in places) for name in Rise._fields))
                for passed in (costs.trace.first.forward, costs.trace.later.backward)
            )
            found["F", s] = forward
            once_more = times_again(config.parallel.recompute, len(stage.part.layers)) - 1
            if once_more > 0:
                backward = Rise(*(b + once_more * f for f, b in zip(forward, backward, strict=True)))
            found["B", s] = backward
            if costs.deferred:
                found["I", s], found["W", s] = backward, (weights := _weight_gradients(config, stage))
                found["B", s] = Rise(*map(sum, zip(backward, weights, strict=True)))
    return found


def _weight_gradients(config: Config, stage: Stage) -> Rise:
    """The products that have been put off: one for each matrix but the embedding, which is no product."""
    held = [(n, of) for place, n in stage.all.items() if place != "embed" for of in stage.tensors(place)]
    matrices = [(n, shape) for n, of in held for shape in of.shapes if len(shape) == 2]
    products = 2 * rows(config) * config.train.seq_len * sum(n * prod(shape) for n, shape in matrices)
    return Rise(0, 0, products, 0, 0, sum(n for n, _ in matrices), 0)
