"""The layouts of so many GPUs: which there are, which fit, and which is likely to be the fastest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np

from nlm.build import parse_config
from nlm.config import Config, ConfigError, ParallelConfig
from nlm.plan.estimate import Estimate, estimate
from nlm.plan.flops import flops_per_token
from nlm.plan.gpus import Machine
from nlm.plan.memory import Costs, Parameters, costs_of, defers, rank_memory
from nlm.plan.shapes import Shape, shapes
from nlm.plan.trace import Trace, between, trace

FREE_SHARE = 0.1
"""Of a GPU's memory, what is to stay free: for the plan's error, fragments of torch's allocator, NCCL's buffers and the
work space of libraries."""
RECOMPUTE = tuple(m for m in get_args(ParallelConfig.model_fields["recompute"].annotation) if m != "auto")
"""Modes of recomputation, from those that take the least time to those that take the least memory."""


@dataclass(frozen=True)
class Layout:
    """`memory` [KINDS] is in bytes, of the pipeline rank that needs most; the `estimate` is of the longest rows."""

    config: Config
    memory: np.ndarray
    estimate: Estimate

    @property
    def gib(self) -> float:
        return float(self.memory.sum()) / 2**30

    def fits(self, machine: Machine) -> bool:
        return self.gib <= (1 - FREE_SHARE) * machine.memory_gib

    def overrides(self, config: Config) -> list[str]:
        """What makes a config one of this layout, to be typed."""
        mine, given = self.config.parallel.model_dump(), config.parallel.model_dump()
        return [f"parallel.{key}={_toml(mine[key])}" for key in mine if mine[key] != given[key]]


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Tracer:
    """Costs of the layouts of a model, of which many share what has to be traced.

    What an update costs is traced in the layout of `config` and, in others, taken to grow as the rank's weights do.
    """

    def __init__(self, config: Config) -> None:
        self.own = Parameters(config)
        self._parameters = {_tensor_parallel(config): self.own}
        self._traces: dict[tuple[Any, ...], Trace] = {}

    def costs(self, config: Config, most: int | None = None) -> list[Costs]:
        """By shape. With `most`, between what one row a microbatch costs and what so many rows do."""
        if (key := _tensor_parallel(config)) not in self._parameters:
            self._parameters[key] = Parameters(config, self.own.updates)
        parameters = self._parameters[key]

        def traced(shape: Shape, mode: str) -> Trace:
            if most is None or shape.rows in (1, most):
                return self._trace(config, shape, mode)
            few, many = (self._trace(config, shape._replace(rows=n), mode) for n in (1, most))
            return between(few, many, (shape.rows - 1) / (most - 1))

        return [costs_of(config, shape, parameters, partial(traced, shape)) for shape in shapes(config)]

    def _trace(self, config: Config, shape: Shape, mode: str) -> Trace:
        key = (*shape, *_tensor_parallel(config), mode, defers(config))
        if key not in self._traces:
            self._traces[key] = trace(config, shape, mode, defers(config))
        return self._traces[key]


def fullest(config: Config, costs: Iterable[Costs]) -> np.ndarray:
    """[KINDS]: bytes, of the shape and the pipeline rank that need most."""
    found = (rank_memory(config, of, rank) for of in costs for rank in range(config.parallel.pp))
    return max(found, key=np.sum)


def _tensor_parallel(config: Config) -> tuple[int, bool]:
    return config.parallel.tp, config.parallel.sequence_parallel


def layouts(config: Config, machine: Machine, gpus: int, tracer: Tracer) -> list[Layout]:
    """For each way to arrange the GPUs, the fastest layout that fits, or the smallest; the best first."""
    candidates = list(_candidates(config, gpus, machine.gpus_per_node))
    flops = flops_per_token(config)
    most = max((shape.rows for candidate in candidates for shape in shapes(candidate)), default=1)
    best: dict[tuple[int, ...], Layout] = {}
    for candidate in candidates:
        costs, parallel = tracer.costs(candidate, most), candidate.parallel
        found = Layout(candidate, fullest(candidate, costs), estimate(candidate, costs[0], machine, flops))
        key = (parallel.dp_replicate, parallel.dp_shard, parallel.tp, parallel.pp)
        if key not in best or _rank(found, machine) < _rank(best[key], machine):
            best[key] = found
    return best_first(best.values(), machine)


def best_first(found: Iterable[Layout], machine: Machine) -> list[Layout]:
    return sorted(found, key=lambda layout: _rank(layout, machine))


def _rank(layout: Layout, machine: Machine) -> tuple[bool, float]:
    """What fits comes before what does not, there by time, here by memory."""
    fits = layout.fits(machine)
    return not fits, layout.estimate.step_s if fits else layout.gib


def _candidates(config: Config, gpus: int, node: int) -> Iterator[Config]:
    """Every layout that trains this config's batches on so many GPUs; tensor parallel ranks share a node."""
    table = config.model_dump(exclude_none=True)
    for parallel in _parallel(config, gpus, node):
        try:
            yield parse_config(table | {"parallel": table["parallel"] | parallel})
        except ConfigError:
            continue


def _parallel(config: Config, gpus: int, node: int) -> Iterator[dict[str, Any]]:
    """Keys of [parallel], whether they fit to the model or not."""
    given = config.parallel
    for tp in (n for n in _divisors(gpus) if n <= node):
        for pp in _divisors(gpus // tp):
            data = gpus // tp // pp
            if config.batch_rows % data:
                continue
            sequence = tp > 1 and config.train.seq_len % tp == 0 == config.source_len % tp
            schedules = {"1f1b", given.schedule} if pp > 1 else {"1f1b"}
            for microbatches in _microbatches(config.batch_rows // data):
                for schedule in sorted(schedules):
                    for replicas, shards in _data(data, node // tp):
                        for recompute in RECOMPUTE:
                            yield {
                                "tp": tp,
                                "sequence_parallel": sequence,
                                "pp": pp,
                                "schedule": schedule,
                                "dp_replicate": replicas,
                                "dp_shard": shards,
                                "microbatches": microbatches,
                                "recompute": recompute,
                            }


def _data(ranks: int, in_node: int) -> list[tuple[int, int]]:
    """dp_replicate and dp_shard: all copies, all shards, or shards within a node and copies between."""
    found = [(ranks, 1), (1, ranks)]
    if 1 < in_node < ranks and ranks % in_node == 0:
        found.append((ranks // in_node, in_node))
    return sorted(set(found))


def _microbatches(n_rows: int) -> list[int]:
    """Into which a rank's rows can be divided, each of a power of two rows or of all."""
    return [n_rows // size for size in _divisors(n_rows) if size == n_rows or size & (size - 1) == 0]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
