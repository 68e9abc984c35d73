"""What goes over the link between two hosts, and what it costs where the link is slow: `python tools/slow_link.py`.

Two ranks, each on a host of its own (hosts.py), take steps in one layout after the other, so that every axis of the
mesh once lies across the link. Counted are the bytes that the first host's interface has sent, headers included, and
the time of a step; beside them stands what `nlm plan` says. As the machine that it plans for has to be given, it is one
on which the computation takes as long as the step that was measured over a link without a limit.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from hosts import INTERFACE, Host, hosts, missing

from nlm.build import build_engine, parse_config
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.parallel.launch import process_group
from nlm.plan.estimate import estimate, traffic
from nlm.plan.flops import flops_per_token
from nlm.plan.gpus import Machine
from nlm.plan.layouts import Tracer
from nlm.plan.memory import Costs
from nlm.plan.shapes import Shape
from nlm.plan.trace import blank

LAYOUTS = {
    "dp_replicate": {"dp_replicate": 2},
    "dp_shard": {"dp_shard": 2},
    "pp": {"pp": 2, "microbatches": 4},
    "tp": {"tp": 2},
}
"""By the axis that lies across the link."""
GLOO = {"dp_shard": 4 / 3}
"""What gloo sends beyond the plan, which is of rings; measured with torch 2.13 between two ranks. It fits two gathers
as planned, and a reduce-scatter that is an all-reduce, of which each keeps a part."""
PORT = 29400
DEADLINE_S = 500


@dataclass(frozen=True)
class Measured:
    """Of a step: the bytes that the first rank's host sent, and the median of the seconds it took."""

    sent: float
    step_s: float


def config_of(layout: str) -> Config:
    return parse_config(
        {
            "model": {"vocab_size": 512, "dim": 128, "n_layers": 4, "n_heads": 4, "scheme": {"name": "pre_ln"}},
            "train": {"steps": 1, "batch_tokens": 1024, "seq_len": 128},
            "optim": {"lr": 1e-3},
            "parallel": LAYOUTS[layout],
            "statistics": {"enabled": False},
            "data": {"train": "none"},
            "log": {"dir": "none"},
        }
    )


def measure(made: Sequence[Host], folder: Path, steps: int, bytes_s: float | None = None) -> dict[str, Measured]:
    """By layout. `bytes_s` limits what each of the two hosts sends."""
    if bytes_s is not None:
        for host in made:
            host.slow_down(bytes_s)
    result = folder / "measured.json"
    result.unlink(missing_ok=True)
    store = {"MASTER_ADDR": made[0].address, "MASTER_PORT": str(PORT), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    own = [sys.executable, __file__, "--steps", str(steps), "--result", str(result)]
    ranks = [
        host.start(own, **store, RANK=str(rank), GLOO_SOCKET_IFNAME=INTERFACE, PYTHONWARNINGS="ignore")
        for rank, host in enumerate(made)
    ]
    codes = [process.wait(DEADLINE_S) for process in ranks]
    if codes != [0, 0]:
        raise subprocess.SubprocessError("\n".join(host.said(p) for host, p in zip(made, ranks, strict=True)))
    return {layout: Measured(**of) for layout, of in json.loads(result.read_text(encoding="utf-8")).items()}


def as_rank(steps: int, result: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for layout in LAYOUTS:
        config = config_of(layout)
        with process_group(config, torch.device("cpu")) as step_ended:
            mesh = Mesh(config.parallel, torch.device("cpu"))
            engine = build_engine(config, mesh)
            batch = blank(config, Shape(config.batch_rows // mesh.data_size, config.train.seq_len, config.source_len))
            sent, times = 0, []
            for step in range(1 + steps):
                dist.barrier()
                if step == 1:  # the first has made its connections
                    sent, times = _bytes_sent(), []
                began = time.monotonic()
                engine.forward_backward(batch)
                engine.clip()
                engine.update(1e-3, torch.zeros((), dtype=torch.bool))
                dist.barrier()
                times.append(time.monotonic() - began)
                step_ended()
            found[layout] = Measured((_bytes_sent() - sent) / steps, median(times))
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps({layout: asdict(of) for layout, of in found.items()}), encoding="utf-8")


def _bytes_sent() -> int:
    """Of this host's interface."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if f"{INTERFACE}:" in line)
    return int(line.partition(":")[2].split()[8])


def planned_bytes(layout: str) -> float:
    """What the first rank sends in a step by gloo, all of it over the link."""
    config = config_of(layout)
    return traffic(config, _costs(config))[layout] * GLOO.get(layout, 1)  # type: ignore[index]


def _costs(config: Config) -> Costs:
    (costs,) = Tracer(config).costs(config)
    return costs


def planned_share(layout: str, bytes_s: float, step_s: float) -> float:
    """Of a step, what it takes longer over the link than over one without a limit, where it takes `step_s`."""
    config = config_of(layout)
    costs, flops = _costs(config), flops_per_token(config)
    fast = Machine("", 1.0, 1, network_bandwidth=float("inf"), gpus_per_node=1, efficiency=1, host_s=0)
    fast = replace(fast, peak_flops=estimate(config, costs, fast, flops).step_s / step_s)
    slow = replace(fast, network_bandwidth=bytes_s / GLOO.get(layout, 1))
    return 1 - step_s / estimate(config, costs, slow, flops).step_s


def _row(layout: str, link: str, of: Measured, *shares: str) -> str:
    cells = layout, link, f"{of.sent / 1e6:.2f}", f"{planned_bytes(layout) / 1e6:.2f}", f"{of.step_s:.2f}", *shares
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb-s", nargs="+", type=float, default=[100, 25, 6.25], help="of the link, in 10^6 bytes/s")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        as_rank(options.steps, options.result)
        return 0
    if reason := missing("tc"):
        sys.exit(reason)
    print("| across the link | link, MB/s | sent a step, MB | planned | a step, s | of it for the link | planned |")
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder, hosts(2, Path(folder)) as made:
        free = measure(made, Path(folder), options.steps)
        for layout, of in free.items():
            print(_row(layout, "no limit", of, "", ""), flush=True)
        for mb_s in options.mb_s:
            for layout, of in measure(made, Path(folder), options.steps, 1e6 * mb_s).items():
                share = 1 - free[layout].step_s / of.step_s
                planned = planned_share(layout, 1e6 * mb_s, free[layout].step_s)
                print(_row(layout, f"{mb_s:g}", of, f"{share:.0%}", f"{planned:.0%}"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
