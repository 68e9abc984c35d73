"""How long a step may take: an estimate, a roofline over the kernels that were traced, and nothing that was measured.

Every kernel takes its arithmetic at the peak or its memory traffic at the bandwidth, both times `efficiency`, and no
less than the host needs to start it. Collectives of tensor parallelism are waited for, as the model does; those of data
parallelism run beside the computation and count where they take longer than it. Latencies do not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod

from nlm.config import Config, ParallelConfig
from nlm.mesh import AXES, MeshAxis
from nlm.parallel.pipeline import stages_of
from nlm.parallel.recompute import times_again
from nlm.parallel.shard import reshards
from nlm.plan.gpus import Machine
from nlm.plan.memory import Costs, Stage, stages_on
from nlm.plan.schedule import makespan, orders
from nlm.plan.trace import Rise


@dataclass(frozen=True)
class Estimate:
    """Of a step, in seconds: all of it, the pipeline's computation with what it waits for, and what comes on top; and
    how many tokens are learned from in a second."""

    step_s: float
    pipeline_s: float
    communication_s: float
    update_s: float
    mfu: float
    tokens_s: float


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
        runs = [run for stage in stages_on(config, costs, 0).values() for run in chain(*stage.runs)]
        away = 2 * parallel.microbatches * sum(run.stream * run.places.total() for run in runs)
        communication_s += away / machine.host_bandwidth / machine.efficiency
    update_s = kernels_s(machine, Rise(0, 0, 0, 0, moved, 0, 0), 1)
    step_s = pipeline_s + communication_s + update_s
    tokens_s = costs.shape.tokens * parallel.microbatches * parallel.data_ranks / step_s
    mfu = flops_a_token * tokens_s / parallel.ranks / machine.peak_flops
    return Estimate(step_s, pipeline_s, communication_s, update_s, mfu, tokens_s)


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
    return once * parallel.tp / costs.shape.tokens


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
        sent["pp"] = parallel.microbatches * ahead * sum(stages[0].streams)
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
            forward, backward = costs.trace.first.forward, costs.trace.later.backward
            found["F", s] = _sum((n, forward[place]) for place, n in stage.all.items())
            works = [(float(n), backward[place]) for place, n in stage.all.items()]
            for run in chain(*stage.runs):
                once_more = max(0.0, times_again(config.parallel.recompute, run.n_blocks) - 1)  # than in the trace
                works += [(once_more * n, forward[place]) for place, n in run.places.items()]
            found["B", s] = inputs = _sum(works)
            if costs.deferred:
                found["I", s], found["W", s] = inputs, (weights := _weight_gradients(stage))
                found["B", s] = _sum([(1, inputs), (1, weights)])
    return found


def _sum(parts: Iterable[tuple[float, Rise]]) -> Rise:
    """Each so many times."""
    return Rise(*(sum(column) for column in zip(*([n * x for x in of] for n, of in parts), strict=True)))


def _weight_gradients(stage: Stage) -> Rise:
    """The products that have been put off: one for each matrix but the embedding, which is no product. Those of
    cross-attention that read an encoder's positions are counted as if they read the decoder's."""
    shape, border = stage.costs.shape, stage.costs.trace.layers.n_encoder
    flops = kernels = 0
    for place, n in stage.all.items():
        positions = shape.source if isinstance(place, int) and place < border else shape.target
        matrices = [m for of in stage.tensors(place) for m in of.shapes if len(m) == 2 and place != "embed"]
        flops += 2 * shape.rows * positions * n * sum(map(prod, matrices))
        kernels += n * len(matrices)
    return Rise(0, 0, flops, 0, 0, kernels, 0)
