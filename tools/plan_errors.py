"""How far `nlm plan` is off: `python tools/plan_errors.py`, which measures what it plans.

Two steps of every config below are run, and the most memory that tensors took at any moment is read from torch: on the
CPU from the events of its profiler, on a GPU from `torch.cuda.max_memory_allocated`. FLOPs are those that torch's
FlopCounterMode counts in a real forward and backward. Of several ranks, which meet by gloo, the first counts.

What is found goes to docs/plan.json, from which the table in docs/plan.md is written. What is there is not measured
again, but for `--again ROW …`.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from launched import free_port
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nlm import build_model
from nlm.build import build_engine, parse_config
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.parallel.gloo import one_thread_each
from nlm.plan.flops import flops_per_token
from nlm.plan.layouts import Tracer
from nlm.plan.memory import rank_memory
from nlm.plan.shapes import Shape
from nlm.plan.trace import blank
from nlm.runtime import pick_device

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- measured: -->", "<!-- :measured -->"
Table = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A config, by what it has of its own."""

    text: str
    model: Table = field(default_factory=dict)
    train: Table = field(default_factory=dict)
    parallel: Table = field(default_factory=dict)
    optim: Table = field(default_factory=dict)
    more: Mapping[str, Table] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        model = {"vocab_size": 512, "dim": 128, "n_layers": 12, "n_heads": 4, "scheme": {"name": "pre_ln"}}
        return parse_config(
            {
                "model": model | self.model,
                "train": {"steps": 2, "batch_tokens": 1024, "seq_len": 128} | self.train,
                "optim": {"lr": 1e-3} | self.optim,
                "parallel": self.parallel,
                "data": {"train": "none"},
                "log": {"dir": "none"},
                **self.more,
            }
        )


def named(scheme: str, **model: Any) -> Table:
    return {"scheme": {"name": scheme}, **model}


TWO_STACKS: Table = {"architecture": "encoder_decoder", "n_encoder_layers": 6, "n_layers": 6}
SOURCES: Table = {"source_len": 96}
ROWS = {
    "plain": Row("12 layers"),
    "shallow": Row("4 layers, dim 256, vocabulary of 4,096", {"n_layers": 4, "dim": 256, "vocab_size": 4096}),
    "deep": Row(
        "200 layers, dim 64, no statistics", {"n_layers": 200, "dim": 64}, more={"statistics": {"enabled": False}}
    ),
    "deep block": Row("200 layers, dim 64, recompute", {"n_layers": 200, "dim": 64}, parallel={"recompute": "block"}),
    "microbatches": Row("4 microbatches", parallel={"microbatches": 4}),
    "bf16": Row("bf16", train={"precision": "bf16"}),
    "bf16 block": Row(
        "bf16, recompute, 2 microbatches",
        train={"precision": "bf16"},
        parallel={"recompute": "block", "microbatches": 2},
    ),
    "swiglu": Row(
        "Peri-LN, RMSNorm, SwiGLU, tied, grouped queries",
        named("peri_ln", norm="rmsnorm", activation="swiglu", tied=True, n_kv_heads=2),
    ),
    "weighed": Row("Sub-LN, soft cap, biases", named("sub_ln", attention={"score": "softcap"}, bias=True)),
    "linear": Row("DeepNorm, Galerkin attention", named("deepnorm", attention={"score": "galerkin"})),
    "ngpt": Row("nGPT, Muon", named("ngpt"), optim={"name": "muon"}),
    "brainformer": Row("Brainformer, DyT, Adafactor", named("brainformer", norm="dyt"), optim={"name": "adafactor"}),
    "encoder": Row(
        "encoder, PowerNorm, AdamP", {"architecture": "encoder", "norm": "powernorm"}, optim={"name": "adamp"}
    ),
    "two stacks": Row("6 encoder layers, 6 decoder layers", TWO_STACKS, SOURCES),
    "tp": Row("2 ranks: tp", parallel={"tp": 2}),
    "tp+sp": Row("2 ranks: tp, sequence parallel", parallel={"tp": 2, "sequence_parallel": True}),
    "ddp": Row("2 ranks: dp_replicate", parallel={"dp_replicate": 2}),
    "ddp microbatches": Row("2 ranks: dp_replicate, 2 microbatches", parallel={"dp_replicate": 2, "microbatches": 2}),
    "fsdp": Row("2 ranks: dp_shard", parallel={"dp_shard": 2}),
    "fsdp block": Row(
        "2 ranks: dp_shard, 24 layers, 4 blocks a unit, recompute",
        {"n_layers": 24},
        parallel={"dp_shard": 2, "blocks_per_unit": 4, "recompute": "block"},
    ),
    "fsdp microbatches": Row("2 ranks: dp_shard, 2 microbatches", parallel={"dp_shard": 2, "microbatches": 2}),
    "fsdp kept": Row("2 ranks: dp_shard, not resharded", parallel={"dp_shard": 2, "reshard": False}),
    "pp": Row("2 ranks: pp, 1F1B, 4 microbatches", parallel={"pp": 2, "microbatches": 4}),
    "interleaved": Row("2 ranks: pp, interleaved", parallel={"pp": 2, "schedule": "interleaved", "microbatches": 4}),
    "zbv": Row("2 ranks: pp, ZBV", parallel={"pp": 2, "schedule": "zbv", "microbatches": 4}),
    "dualpipev": Row("2 ranks: pp, DualPipeV", parallel={"pp": 2, "schedule": "dualpipev", "microbatches": 4}),
    "fsdp pp": Row("4 ranks: dp_shard and pp", parallel={"dp_shard": 2, "pp": 2, "microbatches": 4}),
    "fsdp tp": Row("4 ranks: dp_shard and tp", parallel={"dp_shard": 2, "tp": 2}),
    "two stacks tp": Row("2 ranks: tp, 6 and 6 layers", TWO_STACKS, SOURCES, {"tp": 2}),
    "two stacks fsdp": Row(
        "2 ranks: dp_shard, 6 and 6 layers, 4 blocks a unit, recompute",
        TWO_STACKS,
        SOURCES,
        {"dp_shard": 2, "blocks_per_unit": 4, "recompute": "block"},
    ),
    "two stacks pp": Row(
        "2 ranks: pp, 6 and 6 layers, 4 microbatches", TWO_STACKS, SOURCES, {"pp": 2, "microbatches": 4}
    ),
}


def planned(config: Config) -> tuple[float, float]:
    """Bytes of the first rank at its peak, and FLOPs a token."""
    return float(rank_memory(config, Tracer(config).costs(config)[0]).sum()), flops_per_token(config)


def measured_bytes(config: Config) -> int:
    """Of the first rank."""
    if config.parallel.ranks == 1:
        return peak_bytes(config, Mesh(device=pick_device()))
    with NamedTemporaryFile("r") as file:
        mp.spawn(_rank, (config, free_port(), file.name), config.parallel.ranks)
        return int(file.read())


def _rank(rank: int, config: Config, port: int, result: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    address = f"tcp://127.0.0.1:{port}"
    one_thread_each()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=config.parallel.ranks)
    peak = peak_bytes(config, Mesh(config.parallel))
    if rank == 0:
        Path(result).write_text(str(peak), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def peak_bytes(config: Config, mesh: Mesh) -> int:
    """What all tensors of two steps took when they took most."""
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(mesh.device)
        _steps(config, mesh)
        return torch.cuda.max_memory_allocated(mesh.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        _steps(config, mesh)
    now = peak = 0
    assert events.profiler is not None and events.profiler.kineto_results is not None
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _steps(config: Config, mesh: Mesh) -> None:
    """What training does in a step that is logged, but for writing; memory does not depend on the tokens."""
    engine, rows = build_engine(config, mesh), config.batch_rows // mesh.data_size
    for _ in range(2):
        batch = blank(config, Shape(rows, config.train.seq_len, config.source_len))
        engine.forward_backward(batch.to(mesh.device))
        engine.clip()
        before = [tensor.clone() for tensor in engine.pieces.tensors] if config.statistics.enabled else []
        engine.update(1e-3, torch.zeros((), dtype=torch.bool, device=mesh.device))
        del before


def measured_flops(config: Config) -> float:
    """A token, of a whole model in one process, without fused attention, in which some scores are computed twice."""
    model, rows = build_model(config), config.batch_rows // config.parallel.data_ranks // config.parallel.microbatches
    batch = blank(config, Shape(rows, config.train.seq_len, config.source_len))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch.arguments()).backward()
    return counter.get_total_flops() / (rows * config.train.seq_len)


def measure(row: Row) -> Table:
    config = row.config
    memory, flops = planned(config)
    return {
        "planned_mib": memory / 2**20,
        "measured_mib": measured_bytes(config) / 2**20,
        "planned_flops": flops,
        "measured_flops": measured_flops(config),
        "device": pick_device().type,
    }


def lines(found: Mapping[str, Table]) -> Iterator[str]:
    yield "| config | on | planned, MiB | measured | error | FLOPs a token, planned | measured | error |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in ROWS.items():
        of = found[name]
        memory, flops = (of[f"planned_{unit}"] / of[f"measured_{unit}"] - 1 for unit in ("mib", "flops"))
        yield (
            f"| {row.text} | {of['device']} | {of['planned_mib']:.2f} | {of['measured_mib']:.2f} | {memory:+.2%} | "
            f"{of['planned_flops']:,.0f} | {of['measured_flops']:,.0f} | {flops:+.2%} |"
        )


def document(text: str, found: Mapping[str, Table]) -> str:
    """The text with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + "\n".join([BEGIN, "", *lines(found), "", END]) + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="+", default=[], choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    again = parser.parse_args().again
    torch.set_num_threads(1)
    path = DOCS / "plan.json"
    found: dict[str, Table] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, row in ROWS.items():
        if name in again or name not in found:
            found[name] = measure(row)
            of = found[name]
            print(f"{name}: {of['planned_mib'] / of['measured_mib'] - 1:+.2%} of memory", file=sys.stderr, flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    markdown = DOCS / "plan.md"
    markdown.write_text(document(markdown.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
