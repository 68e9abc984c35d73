"""Speed of nlm, as ratios measured in alternation: `python tools/bench.py BENCH`.

Every contender is a process of its own, or one a rank, that waits its turn, so that they share the machine's moods
but not their memory. Reported are medians over the rounds of CPU seconds a step and rank (all threads) and of wall
seconds, the ratio to the first contender (above 1: faster), and the peak resident memory of a process.

  depth       quickstart's width at 100 and at 1,000 layers; the target is at most 1.05 × 10 times the time
  compile     the same, compiled from nothing, at 10 and at 1,000 layers: `first_s` is the first step, which compiles
  recompute   1,000 layers in every mode of parallel.recompute
  statistics  1,000 layers, every step recorded, judged and written to `layers/`, against none, eager or compiled,
              narrow or wide: `tools/statistics_cost.py` makes a table of it
  tp, pp, dp  quickstart's width and 1,024 tokens a step at --layers (200) layers, on two ranks: tensor parallelism
              against one process, the pipeline's schedules against 1F1B, FSDP2 and ZeRO against plain torch DDP
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launched import free_port
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nlm.batch import Batch
from nlm.build import build_engine, build_model, parse_config
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.parallel.gloo import one_thread_each
from nlm.plan.layouts import RECOMPUTE
from nlm.runtime import collected_by_hand, keep_freed_memory, peak_memory_gib, pick_device
from nlm.statistics.health import Monitor
from nlm.statistics.record import LayerStatistics
from nlm.statistics.store import LayerWriter

Step = Callable[[int], None]
"""Trains one step; the argument counts them."""

WIDTH = {"vocab_size": 512, "dim": 64, "n_heads": 2, "ffn_dim": 128, "activation": "relu"}

WIDER: dict[str, Any] = {
    "model": {"dim": 128, "n_heads": 4, "ffn_dim": 512},
    "seq_len": 128,
    "recompute": "block",
}


def config(model: dict[str, Any], seq_len: int, rows: int = 1, **parallel: Any) -> Config:
    return parse_config(
        {
            "model": {"scheme": {"name": "pre_ln"}} | model,
            "train": {"steps": 1, "batch_tokens": rows * seq_len, "seq_len": seq_len},
            "optim": {"lr": 1e-4},
            "parallel": parallel,
            "data": {"train": "-"},
            "log": {"dir": "-"},
        }
    )


def batch(vocab_size: int, rows: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (rows, seq_len + 1), generator=generator).to(pick_device())


def deep(
    n_layers: int, record: bool = False, seq_len: int = 64, model: dict[str, Any] | None = None, **parallel: Any
) -> Step:
    """As `nlm train` steps: clipping, projection and, to record, statistics."""
    keep_freed_memory()
    settings = config(WIDTH | {"n_layers": n_layers} | (model or {}), seq_len, rows=16, **parallel)
    if settings.parallel.ranks > 1:
        dist.init_process_group()
    mesh = Mesh(settings.parallel, pick_device())
    engine = build_engine(settings, mesh)
    rows = batch(WIDTH["vocab_size"], 16, seq_len).chunk(mesh.data_size)[mesh.data_rank]
    layer_statistics = LayerStatistics(engine, settings.statistics)
    monitor = Monitor(engine.whole.scheme.growth, settings.model.head_dim, 10**6)
    contexts = ExitStack()
    scratch = Path(contexts.enter_context(tempfile.TemporaryDirectory()))
    writer = contexts.enter_context(LayerWriter(scratch, n_layers, 0))
    contexts.enter_context(collected_by_hand())

    def step(i: int) -> None:
        if record:
            layer_statistics.begin(Batch(rows))
        engine.forward_backward(Batch(rows))
        _, norms = engine.clip()
        if record:
            layer_statistics.before_update()
        engine.update(1e-4)
        if record:
            vectors = layer_statistics.vectors(norms)
            writer.write(i, vectors)
            monitor.judge(i, vectors)

    return step


def plain_ddp(n_layers: int) -> Step:
    """The same model in nothing but torch: DDP, clipping and AdamW as its manual has them."""
    keep_freed_memory()
    dist.init_process_group()
    model = DistributedDataParallel(build_model(config(WIDTH | {"n_layers": n_layers}, 64), device=pick_device()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = batch(WIDTH["vocab_size"], 16, 64).chunk(dist.get_world_size())[dist.get_rank()]

    def step(_: int) -> None:
        (model(rows[:, :-1], targets=rows[:, 1:]) / rows[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass(frozen=True)
class Contender:
    make: Callable[..., Step]
    arguments: dict[str, Any]
    ranks: int = 1


def layouts(n_layers: int) -> dict[str, dict[str, Contender]]:
    """Benchmark -> contenders on two ranks."""

    def two(**parallel: Any) -> Contender:
        return Contender(deep, {"n_layers": n_layers, **parallel}, ranks=2)

    zero = {"engine": "deepspeed", "dp_shard": 2}
    return {
        "tp": {
            "one process": Contender(deep, {"n_layers": n_layers}),
            "tp2": two(tp=2),
            "tp2, sequence parallel": two(tp=2, sequence_parallel=True),
        },
        "pp": {
            schedule: two(pp=2, schedule=schedule, microbatches=4)
            for schedule in ("1f1b", "interleaved", "zbv", "dualpipev")
        },
        "dp": {
            "torch DDP": Contender(plain_ddp, {"n_layers": n_layers}, ranks=2),
            "ddp": two(dp_replicate=2),
            **{f"fsdp2, {n} a unit": two(dp_shard=2, blocks_per_unit=n) for n in (1, 10, 25)},
            "fsdp2, kept": two(dp_shard=2, reshard=False),
            **{f"ZeRO-{stage}": two(zero=stage, **zero) for stage in (1, 2, 3)},
            "ZeRO-1, every step recorded": two(zero=1, record=True, **zero),
        },
    }


BENCHES: dict[str, tuple[int, dict[str, Contender]]] = {
    "depth": (
        2,
        {
            "1,000 layers": Contender(deep, {"n_layers": 1000}),
            "100 layers": Contender(deep, {"n_layers": 100}),
        },
    ),
    "compile": (
        1,
        {f"{n:,} layers, compiled": Contender(deep, {"n_layers": n, "compile": True}) for n in (10, 1000)},
    ),
    "recompute": (1, {mode: Contender(deep, {"n_layers": 1000, "recompute": mode}) for mode in RECOMPUTE}),
    **{
        name: (
            1,
            {
                "none recorded": Contender(deep, {"n_layers": 1000} | keys),
                "every step recorded": Contender(deep, {"n_layers": 1000, "record": True} | keys),
            },
        )
        for name, keys in (
            ("statistics", {}),
            ("statistics-compiled", {"compile": True}),
            ("statistics-wide", WIDER),
            ("statistics-wide-compiled", WIDER | {"compile": True}),
        )
    },
}
"""Name of the benchmark -> steps a turn, contenders by name."""


def work(connection: Connection, contender: Contender, rank: int, port: int, threads: int) -> None:
    """Answers each number of steps with (CPU s, wall s, peak GiB) a step, until it is sent 0."""
    torch.set_num_threads(threads)
    one_thread_each()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": contender.ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in ranks.items()}
    step, count, device = contender.make(**contender.arguments), 0, pick_device()
    while n := connection.recv():
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(n):
            step(count)
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        connection.send((cpu / n, wall / n, peak_memory_gib(device)))


def race(steps: int, contenders: dict[str, Contender], rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """One record a contender. The first turn of each, which warms up and compiles, is not counted."""
    context = mp.get_context("spawn")
    runners: dict[str, tuple[list[BaseProcess], list[Connection], list[list[float]]]] = {}
    for name, contender in contenders.items():
        pipes = [context.Pipe() for _ in range(contender.ranks)]
        port = free_port()
        processes = [
            context.Process(target=work, args=(theirs, contender, rank, port, threads), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        runners[name] = (processes, [ours for ours, _ in pipes], [])
    for _ in range(rounds + 1):
        for _, connections, turns in runners.values():
            for connection in connections:
                connection.send(steps)
            answers = [connection.recv() for connection in connections]
            turns.append([statistics.mean(column) for column in zip(*answers, strict=True)])
    first: dict[str, float] = {}
    for name, (processes, connections, turns) in runners.items():
        for process, connection in zip(processes, connections, strict=True):
            connection.send(0)
            process.join()
        cpu, wall = (statistics.median(turn[i] for turn in turns[1:]) for i in (0, 1))
        first = first or {"cpu": cpu, "wall": wall}
        yield {
            "contender": name,
            "cpu_s": round(cpu, 4),
            "wall_s": round(wall, 4),
            "first_s": round(steps * turns[0][1], 1),
            "cpu_ratio": round(first["cpu"] / cpu, 3),
            "wall_ratio": round(first["wall"] / wall, 3),
            "peak_gib": round(turns[-1][2], 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[*BENCHES, *layouts(0)])
    parser.add_argument("--layers", type=int, default=200, help="of tp, pp and dp")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders beside the first; by default all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="of the benches in one process")
    options = parser.parse_args()
    many = layouts(options.layers)
    if options.bench in many:
        steps, contenders, threads = 1, many[options.bench], 1
    else:
        (steps, contenders), threads = BENCHES[options.bench], options.threads
    if options.only is not None:
        unknown = set(options.only) - set(contenders)
        if unknown:
            parser.error(f"--only: no contender {', '.join(sorted(unknown))}; there are {', '.join(contenders)}")
        first = next(iter(contenders))
        contenders = {name: made for name, made in contenders.items() if name == first or name in options.only}
    if options.bench == "compile":
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    for record in race(steps, contenders, options.rounds, threads):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
