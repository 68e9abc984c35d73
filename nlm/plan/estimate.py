"""How long a step may take: an estimate, a roofline over the kernels that were traced, and nothing that was measured.

Every kernel takes its arithmetic at the peak or its memory traffic at the bandwidth, both times `efficiency`, and no
less than the host needs to start it. Collectives of tensor parallelism are waited for, as the model does; those of data
parallelism run beside the computation and count where they take longer than it. Latencies do not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from nlm.config import Config
from nlm.plan.memory import Costs, Stage, stream_bytes
from nlm.plan.trace import Rise


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind: peak FLOP/s at the config's precision, bytes/s, GiB. What is None does not count.

    Assumed unless given: `efficiency`, the share of peaks and bandwidths that kernels and collectives reach;
    `host_s`, what Python and dispatch take for each kernel; nodes of 8 GPUs, each with a network of 400 Gbit/s, as
    NVIDIA's DGX H100 has.
    """

    name: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float = 50e9
    gpus_per_node: int = 8
    efficiency: float = 0.7
    host_s: float = 10e-6

    def seconds(self, rise: Rise, ranks: int) -> float:
        """Of kernels, and of what they send to tensor parallel ranks."""
        computed = rise.flops / self.peak_flops + rise.moved * _inverse(self.memory_bandwidth)
        return max(computed / self.efficiency, rise.kernels * self.host_s) + self.sending_s(rise.sent, ranks)

    def sending_s(self, sent: float, spread: int) -> float:
        """Of bytes that a rank sends to others of a group that is spread over so many consecutive GPUs."""
        bandwidth = self.link_bandwidth if spread <= self.gpus_per_node else self.network_bandwidth
        return sent * _inverse(bandwidth) / self.efficiency


def _inverse(bandwidth: float | None) -> float:
    return 0.0 if bandwidth is None else 1 / bandwidth


@dataclass(frozen=True)
class Estimate:
    """Of a step; seconds, and shares of it."""

    step_s: float
    pipeline_s: float
    exposed_s: float
    update_s: float
    mfu: float


def work(config: Config, costs: Costs, stage: Stage) -> dict[str, Rise]:
    """What a microbatch is in a stage, by kind of action."""
    forward = _sum(costs.trace.first.forward[stage.like(place)] for place in stage.places)
    backward = _sum(costs.trace.later.backward[stage.like(place)] for place in stage.places)
    if not costs.deferred:
        return {"F": forward, "B": backward}
    tokens = stream_bytes(config) and config.train.seq_len * (config.batch_rows // config.parallel.data_ranks)
    matrices = [shape for shape in stage.tensors.shapes if len(shape) == 2]
    products = 2 * tokens / config.parallel.microbatches * sum(prod(shape) for shape in matrices)
    weights = Rise(0, 0, products, 0, len(matrices), 0)
    return {"F": forward, "I": backward, "W": weights, "B": _sum([backward, weights])}


def _sum(rises: Iterable[Rise]) -> Rise:
    return Rise(*(map(sum, zip(*rises, strict=True))))
