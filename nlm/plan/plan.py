"""What a config will cost: everything that `nlm plan` says."""

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np

from nlm.anatomy import Role
from nlm.config import Config
from nlm.model import held
from nlm.plan.choose import chosen
from nlm.plan.estimate import Estimate, bubble, estimate, hardware_flops, traffic
from nlm.plan.flops import flops_per_token
from nlm.plan.gpus import Machine
from nlm.plan.layers import Layers
from nlm.plan.layouts import FREE_SHARE, RECOMPUTE, Layout, Tracer, fullest, layouts
from nlm.plan.memory import Parameters
from nlm.plan.trace import part_of


@dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs and seconds of the layout of a config, and the layouts of some GPUs.

    `memory` [KINDS] by mode of recomputation is that of the pipeline rank which needs most; `traffic` the bytes that
    the first rank sends in a step, by axis; `flops` those of a token that are of use, `hardware_flops` all of them.
    `estimate` and `layouts` are there when the machine is known.
    """

    config: Config
    parameters: dict[str, int]
    flops: float
    hardware_flops: float
    checkpoint_bytes: float
    memory: dict[str, np.ndarray]
    traffic: dict[str, float]
    bubble: float
    machine: Machine | None
    estimate: Estimate | None
    layouts: list[Layout]
    gpus: int


def plan(config: Config, machine: Machine | None = None, gpus: int | None = None) -> Plan:
    """Nothing of the model's size is allocated. `gpus`: of how many to compare the layouts; by default no others than
    that of the config.

    Errors: ValueError for an engine whose memory is not known.
    """
    if config.parallel.engine != "torch":
        raise ValueError(
            "parallel.engine: what DeepSpeed keeps in memory is not planned; plan with engine = 'torch' and the same "
            "dp_shard, which divides as ZeRO 3 does, without zero and offload"
        )
    if config.parallel.recompute == "auto":
        gib = config.parallel.memory_gib or ((1 - FREE_SHARE) * machine.memory_gib if machine else None)
        if gib is None:
            raise ValueError("parallel.memory_gib: recompute = 'auto' is to fit into it; set it, or give --gpu")
        config = chosen(config, gib)
    tracer = Tracer(config)
    own, flops = tracer.costs(config)[0], flops_per_token(config)
    others = {mode: with_parallel(config, recompute=mode) for mode in RECOMPUTE}
    by_role = parameters_by_role(config)
    return Plan(
        config,
        by_role,
        flops,
        hardware_flops(config, own),
        _checkpoint_bytes(config, tracer.own, sum(by_role.values())),
        {mode: fullest(other, tracer.costs(other)) for mode, other in others.items()},
        {axis: sent for axis, sent in traffic(config, own).items() if sent},
        bubble(config, own),
        machine,
        estimate(config, own, machine, flops) if machine else None,
        layouts(config, machine, gpus, tracer) if machine and gpus else [],
        gpus or config.parallel.ranks,
    )


def with_parallel(config: Config, **keys: object) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=keys)})


def parameters_by_role(config: Config) -> dict[str, int]:
    """Of the whole model, every parameter counted once."""
    layers = Layers(config)
    alike = Counter(map(layers.like, range(config.model.n_all_layers)))
    found: Counter[str] = Counter()
    for h in held(part_of(with_parallel(config, tp=1, sequence_parallel=False), layers.traced)):
        found[h.weight.role] += prod(h.weight.shape) * (alike[h.weight.site.number] if h.weight.site else 1)
    return {role: found[role] for role in Role if found[role]}


def _checkpoint_bytes(config: Config, parameters: Parameters, n: int) -> float:
    """Parameters and what the optimizer keeps of each, and what every rank has as a whole, once."""
    weights = n * (8 if config.train.precision == "fp64" else 4)
    saved = parameters.update("saved", weights / config.parallel.tp)
    return weights + parameters.update("state", weights) + saved
