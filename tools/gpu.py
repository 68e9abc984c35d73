"""The goals of one GPU, measured: `python tools/gpu.py` writes a table of them into docs/performance.md.

Every model is a process of its own, as two do not fit; they take turns, `--rounds` times. `--tiny` does the same with
small models, so that a CPU shows that it runs (with TRITON_INTERPRET=1, kernels too).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from peers import write_table
from torch import Tensor

from nlm.batch import Batch
from nlm.build import build_engine, parse_config
from nlm.environment import device_name
from nlm.init import to_unit
from nlm.mesh import Mesh
from nlm.metrics import Efficiency
from nlm.runtime import collected_by_hand, peak_memory_gib, pick_device
from nlm.statistics.record import LayerStatistics

DENSE = {"n_layers": 24, "dim": 2048, "n_heads": 16, "ffn_dim": 5632, "vocab_size": 32768}
"""1.4 billion parameters."""
DEEP = {"n_layers": 1000, "dim": 1024, "n_heads": 8, "ffn_dim": 1024, "vocab_size": 32768}
"""7.4 billion; as wide an FFN as is usual would not fit beside its gradients and moments."""
TINY = {"n_layers": 2, "dim": 32, "n_heads": 2, "ffn_dim": 48, "vocab_size": 64}


@dataclass(frozen=True)
class Goal:
    """A model, and what its step is held against: a share of the GPU's peak, or the time of another."""

    model: dict[str, Any]
    rows: int
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    least_mfu: float | None = None
    beside: str | None = None
    largest_ratio: float | None = None
    record_every: int = 0


def dense(scheme: str, **more: Any) -> Goal:
    return Goal(DENSE | {"scheme": {"name": scheme}}, 16, **more)


TRITON = {"parallel": {"kernels": "triton"}}
GOALS = {
    "1.4B, pre_ln": dense("pre_ln", least_mfu=0.55),
    "1.4B, ngpt": dense("ngpt", beside="1.4B, pre_ln", largest_ratio=1.05),
    **{
        f"1.4B, {s}": dense(s, beside="1.4B, pre_ln", largest_ratio=1.03) for s in ("deepnorm", "peri_ln", "normformer")
    },
    "1.4B, pre_ln, statistics every 10 steps": dense(
        "pre_ln", beside="1.4B, pre_ln", largest_ratio=1.01, record_every=10
    ),
    **{
        f"1.4B, {s}, kernels = triton": dense(s, keys=TRITON, beside=f"1.4B, {s}", largest_ratio=1.0)
        for s in ("pre_ln", "ngpt", "deepnorm", "peri_ln")
    },
    "1,000 layers, D=1024, pre_ln": Goal(
        DEEP | {"scheme": {"name": "pre_ln"}},
        16,
        {"optim": {"name": "adamw_bf16"}, "parallel": {"recompute": "sqrt"}},
        least_mfu=0.40,
    ),
}


def measure(name: str, tiny: bool, steps: int) -> dict[str, float]:
    """Seconds a step, the share of the GPU's peak, peak memory."""
    goal, device, seq_len = GOALS[name], pick_device(), 16 if tiny else 2048
    rows = 2 if tiny else goal.rows
    model = {"activation": "swiglu", "norm": "rmsnorm"} | goal.model | (TINY if tiny else {})
    config = parse_config(
        {
            "model": model,
            "train": {"steps": 1, "batch_tokens": rows * seq_len, "seq_len": seq_len, "precision": "bf16"},
            "optim": {"lr": 1e-4} | goal.keys.get("optim", {}),
            "parallel": {"compile": True} | goal.keys.get("parallel", {}),
            "data": {"train": "-"},
            "log": {"dir": "-"},
        }
    )
    engine = build_engine(config, Mesh(device=device))
    recording = LayerStatistics(engine, config.statistics) if goal.record_every else None
    tokens = torch.randint(model["vocab_size"], (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens.to(device))

    def step(number: int) -> None:
        record = recording if goal.record_every and number % goal.record_every == 0 else None
        if record:
            record.begin(batch, number)
        engine.forward_backward(batch)
        _, norms = engine.clip()
        if record:
            record.before_update()
        engine.update(1e-4)
        if record:
            record.vectors(norms)

    with collected_by_hand():
        numbers = count()
        timed(lambda: step(next(numbers)), 10, device)
        seconds = timed(lambda: step(next(numbers)), steps, device)
    speed = Efficiency(config, device_name(device))
    mfu = speed.of(rows * seq_len / seconds).get("mfu", float("nan"))
    return {"step_s": seconds, "mfu": mfu, "peak_gib": peak_memory_gib(device)}


def timed(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that the device takes for it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times


def kernels(tiny: bool) -> Iterator[str]:
    """Forward and backward of each kernel against what Inductor makes of its reference."""
    from nlm.kernels.check import REFERENCES

    device, dim, tokens, heads, head_dim = pick_device(), 32 if tiny else 2048, 4 if tiny else 16384, 2, 8
    if not tiny:
        heads, head_dim = 16, 128

    def normal(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(learned)

    x, f = normal(1, tokens, dim), normal(1, tokens, dim, dtype=torch.bfloat16)
    gain, other, alpha = normal(dim), normal(dim), normal(learned=False)
    q = normal(1, tokens, heads, head_dim, dtype=torch.bfloat16)
    table, scale = normal(tokens, 1, head_dim, learned=False), normal(heads, head_dim)
    ops = torch.ops.nlm
    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "x + f, norm": (ops.residual.default, (x, f, None, None, None, gain, None, "none", "rms", 1e-5)),
        "α x + f, norm": (ops.residual.default, (x, f, alpha, None, None, gain, None, "none", "rms", 1e-5)),
        "x + norm f, norm": (ops.residual.default, (x, f, None, gain, None, other, None, "rms", "rms", 1e-5)),
        "nGPT's step": (ops.sphere_step.default, (x, f, gain, 1e-12)),
        "rotary": (ops.rotary.default, (q, table, table, None, None, None, None, False, torch.bfloat16)),
        "rotary, unit, scale": (ops.rotary.default, (q, table, table, None, scale, None, 1e-12, False, torch.float32)),
    }

    def once(function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        found = function(*given)
        outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y.numel()]
        leaves = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    for name, (kernel, given) in cases.items():
        compiled = torch.compile(REFERENCES[kernel], dynamic=False)
        yield beside(name, partial(once, kernel, given), partial(once, compiled, given), "Inductor's", 1.2, tiny)


def updates(tiny: bool) -> Iterator[str]:
    """The kernel of AdamW against torch's and the projection after it."""
    from nlm.kernels.adamw import table, update

    def torchs(optimizer: torch.optim.AdamW, projected: list[tuple[Tensor, int]], left_out: Tensor) -> None:
        optimizer.step()
        for weight, axis in projected:
            to_unit(weight, axis, left_out)

    device, shape, n = pick_device(), (48, 32) if tiny else (5632, 2048), 2 if tiny else 16
    for name, axes, goal in (("AdamW", (None, None), 1.0), ("AdamW, projected", (1, 0), 1.2)):
        weights, gradients, ms, vs = (
            [torch.randn(of, device=device) for of in (shape, shape[::-1]) * n] for _ in range(4)
        )
        left_out = torch.zeros((), dtype=torch.bool, device=device)
        rates, t = (torch.full(size, x, dtype=torch.float64, device=device) for size, x in (((2 * n,), 1e-4), ((), 9)))
        optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), fused=True)
        optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient

        made = table(weights, [m.zero_() for m in ms], [v.zero_() for v in vs], axes * n)
        ours = partial(update, made, gradients, rates, rates, t, (0.9, 0.95), 1e-8, left_out)
        projected = [(weight, axis) for weight, axis in zip(weights, axes * n, strict=True) if axis is not None]
        yield beside(name, ours, partial(torchs, optimizer, projected, left_out), "torch's", goal, tiny)


def beside(name: str, ours: Callable[[], None], theirs: Callable[[], None], whose: str, goal: float, tiny: bool) -> str:
    """A line of the table. A kernel that misses its goal is to be deleted."""
    device, times = pick_device(), []
    for once in (ours, theirs):
        timed(once, 3, device)
        times.append(statistics.median(timed(once, 2 if tiny else 50, device) for _ in range(3)))
    ratio = times[1] / times[0]
    met = "met" if ratio >= goal else "**missed**: to be deleted"
    took = f"{times[0] * 1e6:,.0f} µs"
    return f"| kernel: {name} | {took} | | | {ratio:.2f} times as fast as {whose}, goal {goal}: {met} |"


def table(tiny: bool, rounds: int, steps: int) -> Iterator[str]:
    device = pick_device()
    yield f"| {device_name(device)} | step | MFU | peak GiB | goal |"
    yield "|---|---|---|---|---|"
    yield from kernels(tiny)
    yield from updates(tiny)
    turns: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name in GOALS:
            command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--steps", str(steps)]
            said = subprocess.run([*command, *["--tiny"] * tiny], capture_output=True, text=True, check=False)
            if said.returncode:
                yield f"| {name} | failed: {' '.join(said.stderr.split())[-200:]} | | | |"
                continue
            turns[name].append(json.loads(said.stdout.splitlines()[-1]))
    found = {name: {key: statistics.median(turn[key] for turn in of) for key in of[0]} for name, of in turns.items()}
    for name, of in found.items():
        goal, says = GOALS[name], ""
        if goal.least_mfu is not None:
            says = f"MFU {goal.least_mfu:.0%}: " + ("met" if of["mfu"] >= goal.least_mfu else "**missed**")
        if goal.largest_ratio is not None and goal.beside in found:
            ratio = of["step_s"] / found[goal.beside]["step_s"]
            met = "met" if ratio <= goal.largest_ratio else "**missed**"
            says = f"{ratio:.3f} times {goal.beside}, goal {goal.largest_ratio}: {met}"
        yield f"| {name} | {of['step_s'] * 1e3:,.1f} ms | {of['mfu']:.1%} | {of['peak_gib']:.1f} | {says} |"


def unmeasured() -> Iterator[str]:
    """The table where there is no GPU."""
    yield "| goal | |"
    yield "|---|---|"
    yield "| every kernel 1.2 times as fast as Inductor's | not measured: no GPU |"
    for name, goal in GOALS.items():
        of = f"MFU {goal.least_mfu:.0%}" if goal.beside is None else f"at most {goal.largest_ratio} times {goal.beside}"
        yield f"| {name}: {of} | not measured: no GPU |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=GOALS, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed, of each turn; multiples of 10 see statistics")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tiny, options.steps)))
        return
    lines = []
    measures = torch.cuda.is_available() or options.tiny
    for line in table(options.tiny, options.rounds, options.steps) if measures else unmeasured():
        lines.append(line)
        print(line, flush=True)
    if not options.tiny:
        write_table("gpu", lines)


if __name__ == "__main__":
    main()
