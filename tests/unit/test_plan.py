"""What a plan says is what torch measures, and planning itself takes next to nothing."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plan_errors import DOCS, ROWS, SOURCES, TWO_STACKS, Row, document, measured_bytes, measured_flops, planned

from nlm.build import design, load_config
from nlm.cli import main
from nlm.config import Config, ParallelConfig
from nlm.mesh import AXES
from nlm.model import Part, weights
from nlm.plan.estimate import kernels_s
from nlm.plan.flops import _flops, flops_per_token
from nlm.plan.gpus import GPUS, Machine, machine, peak_flops
from nlm.plan.layers import Layers
from nlm.plan.layouts import FREE_SHARE, Tracer, best_first
from nlm.plan.memory import rank_memory, stages_on
from nlm.plan.plan import parameters_by_role, plan
from nlm.plan.report import advice, text
from nlm.plan.schedule import makespan, orders
from nlm.plan.segment import KINDS, Segment, joined
from nlm.plan.shapes import shapes
from nlm.plan.trace import trace

MakeConfig = Callable[..., Config]
FOUND = json.loads((DOCS / "plan.json").read_text(encoding="utf-8"))
SMALL = {"dim": 64, "n_layers": 6}


@pytest.mark.parametrize(
    "row",
    [
        Row("microbatches", SMALL | {"tied": True, "activation": "swiglu"}, parallel={"microbatches": 2}),
        Row("recompute, bf16", SMALL, {"precision": "bf16"}, {"recompute": "block", "microbatches": 2}),
        Row("fp8, as emulated", SMALL, {"precision": "fp8"}),
        Row("another", SMALL | {"scheme": {"name": "brainformer"}, "attention": {"score": "softcap"}}),
        Row("two stacks, sqrt", SMALL | TWO_STACKS, SOURCES | {"precision": "bf16"}, {"recompute": "sqrt"}),
        Row("two stacks in two ranks", SMALL | TWO_STACKS, SOURCES, {"pp": 2, "microbatches": 2}),
        # Where the ranks gather in the middle of a layer, gloo keeps buffers for a while: see docs/plan.md.
        Row("two ranks", SMALL, parallel={"pp": 2, "microbatches": 4}),
    ],
    ids=lambda row: row.text,
)
def test_memory_and_flops_are_as_planned(row: Row) -> None:
    memory, flops = planned(row.config)
    assert memory == pytest.approx(measured_bytes(row.config), rel=0.1)
    assert flops == pytest.approx(measured_flops(row.config), rel=0.01)


def test_the_document_has_what_was_measured() -> None:
    text = (DOCS / "plan.md").read_text(encoding="utf-8")
    assert document(text, FOUND) == text and set(FOUND) == set(ROWS) and len(FOUND) >= 8
    for name, of in FOUND.items():
        assert of["planned_mib"] == pytest.approx(of["measured_mib"], rel=0.1), name
        assert of["planned_flops"] == pytest.approx(of["measured_flops"], rel=0.01), name


@pytest.mark.parametrize("name", ["plain", "swiglu", "fsdp block", "zbv", "two stacks", "two stacks pp"])
def test_what_is_planned_anew_is_what_stands_there(name: str) -> None:
    memory, flops = planned(ROWS[name].config)
    assert memory / 2**20 == pytest.approx(FOUND[name]["planned_mib"], rel=0.01)
    assert flops == pytest.approx(FOUND[name]["planned_flops"])


def test_flops_of_softmax_attention_are_the_usual_ones(make_config: MakeConfig) -> None:
    """6 a matrix element, but for the embedding's, and 12 · D · S a layer, at any depth."""
    config = make_config({"n_layers": 1000})
    model = config.model
    elements = 1000 * (4 * model.dim**2 + 2 * model.dim * model.ffn_dim) + model.vocab_size * model.dim
    assert flops_per_token(config) == 6 * elements + 12 * model.dim * config.train.seq_len * 1000


def test_in_float8_are_the_blocks_matrices() -> None:
    """Of the rest the head is all products and attention's scores are 4 · D · S a token; both run at half the peak."""
    config = Row("fp8", SMALL, {"precision": "fp8"}).config
    (shape,) = shapes(config)
    passed, tokens = trace(config, shape, "none").first.forward, 8 * config.train.seq_len
    assert passed["head"].slow_flops == passed["head"].flops > 0
    assert passed[0].slow_flops == 4 * 64 * config.train.seq_len * tokens
    assert passed[0].flops - passed[0].slow_flops == 2 * 12 * 64**2 * tokens
    on, block = Machine("one", peak_flops=1.0, memory_gib=1, efficiency=1, host_s=0), passed[0]
    assert kernels_s(on, block, 1) == block.flops + block.slow_flops
    assert trace(Row("bf16", SMALL, {"precision": "bf16"}).config, shape, "none").first.forward[0].slow_flops == 0


@pytest.mark.parametrize("scheme", ["brainformer", "ngpt"])
def test_layers_of_a_kind_are_alike(scheme: str, make_config: MakeConfig) -> None:
    """The sums over kinds are those over the layers themselves, of a depth that is no multiple of a period."""
    config = make_config({"scheme": {"name": scheme}, "n_layers": 11})
    shapes = [Counter((w.role, w.shape) for _, _, w in weights(block)) for block in design(config).blocks.values()]
    layers = Layers(config)
    assert [shapes[layers.like(layer)] for layer in range(11)] == shapes
    whole = _flops(config, Part(range(11), first=True, last=True), 4)
    assert flops_per_token(config) * 4 * config.train.seq_len == whole
    by_role: Counter[str] = Counter()
    for _, parameter, weight in weights(design(config)):
        by_role[weight.role] += parameter.numel()
    assert parameters_by_role(config) == by_role


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_a_schedule_does_everything_once(schedule: str) -> None:
    """Forward and backward, or the halves of it, of each microbatch in each stage; and no rank waits for ever."""
    parallel = ParallelConfig(pp=2, schedule=schedule, microbatches=4)
    order, n = orders(parallel), parallel.n_stages
    done = Counter((kind, stage, m) for actions in order for kind, stage, m in actions)
    assert set(done.values()) == {1}
    for stage in range(n):
        for m in range(4):
            assert done["F", stage, m] == 1
            assert done["B", stage, m] + done["I", stage, m] == 1 and done["I", stage, m] == done["W", stage, m]
    seconds = {(kind, stage): {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}[kind] for kind in "FBIW" for stage in range(n)}
    idle = 1 - 3 * 4 * n / 2 / makespan(order, seconds, n - 1)
    expected = {"1f1b": 1 / 5, "interleaved": 1 / 9}.get(schedule)
    assert idle == pytest.approx(expected) if expected else idle < 1 / 9


def test_segments_add_up() -> None:
    """Whether put together one by one or taken together, also where what they leave is less than nothing."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        net, above = generator.normal(size=(2, len(KINDS)))
        segment = Segment(net, net + abs(above))
        one_by_one, together = joined([segment] * 5), segment * 5
        assert one_by_one.net == pytest.approx(together.net)
        highest = max(0.0, *(i * net.sum() + segment.peak.sum() for i in range(5)))
        assert one_by_one.peak.sum() == pytest.approx(highest) == together.peak.sum()


def test_peaks_are_known_or_asked_for() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert {peak_flops(gpu.device_name, "fp32") for gpu in GPUS.values()} == {67e12, 51e12, 60e12, 19.5e12, 75e12}
    both = [gpu.peak_flops for gpu in GPUS.values() if "fp8" in gpu.peak_flops]
    assert len(both) == 6 and all(peak["fp8"] == pytest.approx(2 * peak["bf16"], rel=1e-3) for peak in both)
    with pytest.raises(ValueError, match=r"--peak-tflops, --memory-gib: of 'RTX 9999' in bf16 this is not known"):
        machine("RTX 9999", "bf16", 8, {})
    with pytest.raises(ValueError, match=r"--peak-tflops: of 'H100' in fp64 this is not known"):
        machine("H100", "fp64", None, {})
    given = machine("RTX 9999", "bf16", 8, {"peak_flops": 1e14, "memory_gib": 24})
    assert given is not None and given.memory_bandwidth is None


def test_what_is_recommended_fits_and_can_be_typed(tmp_path: Path) -> None:
    model = {"dim": 256, "n_layers": 24, "n_heads": 2}
    config = Row("deep", model, {"batch_tokens": 1024, "seq_len": 256}, {"recompute": "block"}).config
    on = machine("H100", "fp32", 2, {})
    assert on is not None
    found = plan(config, on, 2)
    best, fitting = found.layouts[0], [layout for layout in found.layouts if layout.fits(on)]
    assert best.config.parallel.ranks == 2 and best.gib < 79 * (1 - FREE_SHARE)
    assert best.estimate.step_s == min(layout.estimate.step_s for layout in fitting)
    assert {"dp_replicate", "dp_shard", "tp", "pp"} == {
        axis for layout in found.layouts for axis in AXES if getattr(layout.config.parallel, axis) == 2
    }
    assert advice(found).partition("\n")[0] == " ".join(["Recommended:", *best.overrides(config)])
    (path := tmp_path / "config.toml").write_text(config.to_toml())
    for layout in found.layouts:
        assert load_config(path, layout.overrides(config)).parallel == layout.config.parallel
    assert "recompute" in text(found) and "MFU" in text(found)

    small = replace(on, memory_gib=0.1)
    none = replace(found, machine=small, layouts=best_first(found.layouts, small))
    assert none.layouts[0].gib == min(layout.gib for layout in found.layouts)
    assert advice(none).startswith("None fits. The nearest: ") and "more GPUs" in advice(none)


def test_planning_allocates_nothing() -> None:
    """A model of 805 billion parameters, a matrix of which has a GiB, in a process that never has that much."""
    model = ["model.dim=8192", "model.n_heads=64", "model.ffn_dim=32768"]
    code = f"""
import re, sys
from pathlib import Path
from nlm.cli import main
main(["plan", "configs/quickstart.toml", *{model}, "--json", "-"])
print(*re.findall(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text()), file=sys.stderr)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DOCS.parent)
    said = json.loads(done.stdout)
    assert sum(said["parameters"].values()) > 8e11
    assert said["memory_bytes"]["none"]["weights"] > 3e12
    assert int(done.stderr.split()[-1]) * 1024 < 2**30


def test_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = str(DOCS.parent / "configs" / "quickstart.toml")
    assert main(["plan", quickstart, "model.n_layers=8"]) == 0
    shown = capsys.readouterr().out
    assert "8 layers" in shown and "FLOPs a token" in shown and "step on" not in shown
    assert main(["plan", quickstart, "--gpu", "abacus"]) == 2
    assert "--peak-tflops, --memory-gib" in capsys.readouterr().err
    assert main(["plan", quickstart, "--gpu", "H100", "--gpus", "0"]) == 2
    assert main(["plan", quickstart, "parallel.tp=3"]) == 2


def test_a_layer_is_planned_as_it_is_traced(make_config: MakeConfig) -> None:
    """Of two stacks: what stands for each layer is built alike, the ends for themselves; and the depth of both counts.

    From 9 and 7 layers to 18 and 14, what is planned grows by what those layers are that are neither first nor last.
    """
    two, train = {"architecture": "encoder_decoder"}, {"source_len": 8, "batch_tokens": 12 * 32}
    few, more = (make_config(two | {"n_encoder_layers": 9 * n, "n_layers": 7 * n}, train=train) for n in (1, 2))
    layers = Layers(few)
    shapes_of = [Counter((w.role, w.shape) for _, _, w in weights(block)) for block in design(few).layers.values()]
    assert list(layers.traced) == [7, 8, 9, 10, 11]
    assert [layers.like(layer) for layer in range(16)] == [8] * 7 + [7, 8, 9] + [10] * 5 + [11]
    assert [shapes_of[layers.like(layer)] for layer in range(16)] == shapes_of
    costs, deeper = (Tracer(config).costs(config)[0] for config in (few, more))
    rises = costs.trace.first.forward
    grown = rank_memory(more, deeper) - rank_memory(few, costs)
    assert grown[KINDS.index("activations")] == pytest.approx(9 * rises[8].net + 7 * rises[10].net)


def test_a_stage_that_has_the_head_and_no_layers(make_config: MakeConfig) -> None:
    config = make_config({"n_layers": 2, "vocab_size": 4000}, parallel={"pp": 2, "dp_shard": 2, "microbatches": 2})
    costs = Tracer(config).costs(config)[0]
    (stage,) = stages_on(config, costs, rank=1).values()
    assert len(stage.part.layers) == 0 and stage.part.last
    assert rank_memory(config, costs, 1).sum() > rank_memory(config, costs, 0).sum()
