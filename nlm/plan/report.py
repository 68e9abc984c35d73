"""What a plan says: as text and as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from io import StringIO
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from nlm.plan.layouts import FREE_SHARE, Layout
from nlm.plan.plan import Plan
from nlm.plan.segment import KINDS

GIB = 2**30
WIDTH = 110
SHOWN = 10
"""Layouts at most."""


def text(plan: Plan) -> str:
    """Tables for the console."""
    console = Console(file=StringIO(), width=WIDTH, highlight=False, color_system=None)
    console.print(Group(*_parts(plan)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in shown.splitlines())


def _parts(plan: Plan) -> Iterator[Table | str]:
    model, parallel = plan.config.model, plan.config.parallel
    yield f"{model.scheme.name}, {model.n_all_layers} layers: {_count(sum(plan.parameters.values()))} parameters"
    yield _roles(plan)
    again = plan.hardware_flops / plan.flops - 1
    yield f"FLOPs a token      {_count(plan.flops)}, and {again:.0%} on top that are computed again"
    yield f"checkpoint         {_size(plan.checkpoint_bytes)}"
    yield ""
    yield f"Memory of a rank, {_ranks(plan)}, at its highest moment, GiB; * is this config's"
    yield _memory(plan)
    if parallel.compile:
        yield "planned as it runs without compile, which takes less"
    sent = ", ".join(f"{axis} {_size(size)}" for axis, size in plan.traffic.items())
    yield f"A rank sends a step  {sent or 'nothing: it is alone'}"
    if parallel.pp > 1:
        yield f"Pipeline bubble      {plan.bubble:.1%} of the time, {parallel.schedule}"
    if plan.machine and plan.estimate:
        of = plan.estimate
        yield (
            f"A step on {plan.machine.name}     {of.step_s:.3g} s, an estimate: computation {of.pipeline_s:.3g} s, "
            f"communication {of.communication_s:.3g} s, update {of.update_s:.3g} s"
        )
        yield f"MFU                  {of.mfu:.1%}; {of.tokens_s:,.0f} tokens/s"
    if plan.layouts:
        yield ""
        yield f"Layouts of {plan.gpus} GPUs, each with what is fastest and fits"
        yield _layouts(plan)
        yield advice(plan)


def _roles(plan: Plan) -> Table:
    table = Table(*plan.parameters, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    table.add_row(*map(_count, plan.parameters.values()))
    return table


def _memory(plan: Plan) -> Table:
    table = Table("recompute", *KINDS, "all", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, memory in plan.memory.items():
        own = "*" if mode == plan.config.parallel.recompute else ""
        table.add_row(mode + own, *(_gib(of) for of in memory), _gib(memory.sum()))
    return table


def _layouts(plan: Plan) -> Table:
    table = Table("", "GiB", "step, s", "MFU", "overrides", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    assert plan.machine is not None
    for layout in plan.layouts[:SHOWN]:
        fits = "fits" if layout.fits(plan.machine) else "too large"
        of = layout.estimate
        overrides = " ".join(layout.overrides(plan.config)) or "as it is"
        table.add_row(fits, f"{layout.gib:.1f}", f"{of.step_s:.3g}", f"{of.mfu:.1%}", overrides)
    return table


def advice(plan: Plan) -> str:
    """The layout to take and why, or what keeps the nearest from fitting and what would help."""
    assert plan.machine is not None
    best, memory_gib = plan.layouts[0], plan.machine.memory_gib
    how = " ".join(best.overrides(plan.config)) or "the config as it is"
    usable = (1 - FREE_SHARE) * memory_gib
    needs = f"{best.gib:.1f} GiB of the {usable:.1f} that may be used of {memory_gib:g}"
    if not best.fits(plan.machine):
        return f"None fits. The nearest: {how}\nneeds {needs}; {_remedy(best, usable)}"
    for other in (layout for layout in plan.layouts[1:] if layout.fits(plan.machine)):
        ahead = other.estimate.step_s / best.estimate.step_s - 1
        return f"Recommended: {how}\nby the estimate {ahead:.0%} faster than the next; it needs {needs}"
    return f"Recommended: {how}\nno other fits; it needs {needs}"


def _remedy(layout: Layout, usable: float) -> str:
    """What would make a layout fit that is too large."""
    memory = dict(zip(KINDS, layout.memory / GIB, strict=True))
    state = layout.gib - memory["activations"] - memory["logits"]
    if state > usable:
        return f"parameters and what belongs to them take {state:.1f}: more GPUs, fewer layers or a smaller model.dim"
    return f"activations and logits take {layout.gib - state:.1f}: more GPUs or a shorter train.seq_len"


def numbers(plan: Plan) -> dict[str, Any]:
    """For machines: bytes, FLOPs, seconds."""

    def of(memory: np.ndarray) -> dict[str, float]:
        return dict(zip(KINDS, map(float, memory), strict=True)) | {"all": float(memory.sum())}

    return {
        "parameters": plan.parameters,
        "flops_a_token": plan.flops,
        "hardware_flops_a_token": plan.hardware_flops,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "memory_bytes": {mode: of(memory) for mode, memory in plan.memory.items()},
        "sent_bytes": plan.traffic,
        "bubble": plan.bubble,
        "machine": plan.machine and asdict(plan.machine),
        "estimate": plan.estimate and asdict(plan.estimate),
        "layouts": [
            {
                "overrides": layout.overrides(plan.config),
                "fits": plan.machine is not None and layout.fits(plan.machine),
                "memory_bytes": of(layout.memory),
                "estimate": asdict(layout.estimate),
            }
            for layout in plan.layouts
        ],
    }


def to_json(plan: Plan) -> str:
    return json.dumps(numbers(plan), indent=1, allow_nan=False)


def _ranks(plan: Plan) -> str:
    n = plan.config.parallel.ranks
    return "the only one" if n == 1 else f"the fullest of {n}"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if abs(size) >= GIB / 1000 else "0"


def _count(n: float) -> str:
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:.0f}"


def _size(n: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return f"{n / 2**10:.3g} KiB"
