"""A part of the parity matrix: every layout, every scheme, every norm and score, and what meets in odd places.

`tools/parity.py` proves the rest, with the same code.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
from parity import (
    DEEP_ROWS,
    ENCODER_ROWS,
    LAYOUTS,
    MIXED_ROWS,
    OPTIMIZER_ROWS,
    PAIR_ROWS,
    SCHEME_ROWS,
    SHAPES_ROWS,
    VARIANT_ROWS,
    Ranks,
    Reference,
    Row,
    cell,
    write_tokens,
)

from nlm import NORMS, SCHEMES, SCORES, WEIGHT_NORMS
from nlm.build import parse_config
from nlm.compare import differences

CORE = [SCHEME_ROWS[name] for name in ("pre_ln", "post_ln", "deepnorm", "sub_ln", "peri_ln", "normformer", "ngpt")]
"""These take turns over the layouts."""


def chosen() -> Iterator[tuple[Row, str]]:
    for i, layout in enumerate(LAYOUTS):
        yield CORE[i % len(CORE)], layout
    for row in MIXED_ROWS.values():  # which have every scheme, norm and score
        yield row, "fsdp2xtp2xpp2"
    for row, layout in zip(ENCODER_ROWS.values(), ("fsdp2xtp2", "tp2+sp", "hsdp2x2"), strict=True):
        yield row, layout
    for layout in ("fsdp2", "zero1"):  # it projects what it has updated, which every engine does in its own way
        yield SCHEME_ROWS["ngpt"], layout
    for name, layout in (
        ("bias", "tp2+sp"),
        ("tied", "pp2-1f1b"),
        ("tied", "pp2-zbv"),
        ("learned positions", "tp2+sp"),
        ("recompute", "pp2-zbv"),
        ("recompute", "fsdp2"),
        ("segments across units", "fsdp2xtp2xpp2"),
        ("loss of 24 rows, tied", "fsdp2xtp2xpp2"),
        ("sqrt", "pp2-zbv"),
        ("nested", "fsdp2"),
        ("nested", "zero3"),
        ("compile", "tp2+sp"),
        ("compile", "fsdp2"),
        ("document mask", "fsdp2xtp2xpp2"),
        ("document mask", "pp2-zbv"),
        ("document mask", "zero1"),
        ("sparse softmax", "tp2+sp"),
        ("continual backprop", "fsdp2xtp2xpp2"),
        ("continual backprop", "zero1"),
        ("LSUV", "tp2xpp2"),
        ("statistics on request", "fsdp2xtp2xpp2"),
        ("statistics on request", "zero1"),
    ):
        yield VARIANT_ROWS[name], layout
    for row, layout in zip(OPTIMIZER_ROWS.values(), cycle(("fsdp2", "tp2+sp", "fsdp2xtp2")), strict=False):
        yield row, layout
    yield OPTIMIZER_ROWS["adamp"], "zero1"
    for row, layouts in zip(PAIR_ROWS.values(), PAIR_LAYOUTS, strict=True):
        yield from ((row, layout) for layout in layouts)
    for row, layouts in zip(SHAPES_ROWS.values(), SHAPES_LAYOUTS, strict=True):
        yield from ((row, layout) for layout in layouts)
    yield DEEP_ROWS["200 layers"], "pp4-zbv"


PAIR_LAYOUTS = (
    ("pp2-1f1b", "fsdp2xtp2", "zero1"),
    ("tp2+sp", "pp2-1f1b"),
    ("fsdp2xtp2xpp2",),
    ("fsdp2xtp2xpp2", "pp2-interleaved"),
)
"""Of each of PAIR_ROWS."""
SHAPES_LAYOUTS = (
    ("pp2-1f1b", "pp2-interleaved", "pp2-zbv", "pp2-dualpipev"),
    ("ddp2",),
    ("fsdp2xtp2xpp2", "ddp2xpp2-zbv"),
)
"""Of each of SHAPES_ROWS."""
CELLS = sorted(
    {
        (row.name, layout): (replace(row, precision="fp32" if layout.startswith("zero") else "fp64"), layout)
        for row, layout in chosen()
    }.items()
)


class Prover:
    """Runs cells, each model in one process once only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks = folder, Ranks()
        self.references: dict[tuple[str, str], Reference] = {}
        write_tokens(folder)

    def close(self) -> None:
        self.ranks.close()

    def reference(self, row: Row) -> Reference:
        key = (row.name, row.precision)
        if key not in self.references:
            self.references[key] = Reference(row, self.folder, self.ranks)
        return self.references[key]

    def prove(self, row: Row, layout: str) -> None:
        found = cell(row, layout, self.folder, self.reference(row), self.ranks)
        assert found.good and not found.text.startswith("refused"), found.text


@pytest.fixture(scope="module")
def prover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prover]:
    with closing(Prover(tmp_path_factory.mktemp("parity"))) as prover:
        yield prover


@pytest.mark.parametrize(
    ("row", "layout"), [entry for _, entry in CELLS], ids=[f"{name}-{layout}" for (name, layout), _ in CELLS]
)
def test_the_layout_changes_nothing(row: Row, layout: str, prover: Prover) -> None:
    prover.prove(row, layout)


def test_a_stream_reaches_every_rank(prover: Prover) -> None:
    text = {"files": [str(prover.folder / "play.jsonl")], "tokenizer": "byte", "weight": 1.0, "workers": 0}
    shards = {"path": str(prover.folder / "tokens"), "weight": 1.0}
    data = {"train": [text, shards], "document_mask": True}
    row = replace(CORE[0], name="stream", data=data, precision="fp64")
    for layout in ("hsdp2x2", "tp2xpp2"):
        prover.prove(row, layout)


def test_validation_of_pairs_in_a_pipeline(prover: Prover) -> None:
    row, losses = replace(next(iter(SHAPES_ROWS.values())), name="validated", precision="fp64"), []
    for layout in (None, "tp2xpp2"):
        table = row.config(prover.folder, layout).model_dump(exclude_none=True)
        table["data"]["validation"] = table["data"]["train"]["path"]
        table["evaluate"] |= {"every": 2, "batches": 4}
        prover.ranks.train(parse_config(table))
        lines = map(json.loads, (Path(table["log"]["dir"]) / "metrics.jsonl").read_text().splitlines())
        losses.append([line["validation_loss"] for line in lines if "validation_loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(set(losses[0])) == 3


@pytest.mark.parametrize("layout", ["tp2+sp", "fsdp2", "zero3"])
def test_float8_in_another_layout(layout: str, prover: Prover) -> None:
    """What layouts differ by in bfloat16 float8 makes more of, but not so much as it differs from bfloat16 itself."""
    row = replace(CORE[0], precision="fp8", model=CORE[0].model | {"head_dim": 16, "ffn_dim": 64})
    one, *others = (row, None), (row, layout), (replace(row, precision="bf16"), None)
    configs = [of.config(prover.folder, where) for of, where in (one, *others)]
    for config in configs:
        prover.ranks.train(config)
    run, *found = (Path(config.log.dir) for config in configs)
    divided, rounded = (differences(other, run) for other in found)
    assert 0 < divided["loss"].size < 3e-3
    assert divided["parameters"].size < rounded["parameters"].size


@pytest.mark.parametrize("name", ["adafactor", "muon", "ranger21"])
def test_another_layout_goes_on(name: str, prover: Prover) -> None:
    """With optimizer state that every rank has, that some pieces have, and that does not begin at zero."""
    row, run = replace(OPTIMIZER_ROWS[name], precision="fp64"), prover.folder / name
    for layout, last in ((None, 3), ("fsdp2xtp2", None)):
        table = row.config(prover.folder, layout).model_dump(exclude_none=True)
        table["log"]["dir"] = str(run)
        table["train"] |= {"stop_after": last} if last else {}
        prover.ranks.train(parse_config(table))
    found = differences(run, prover.reference(row).run)
    assert max(difference.size for difference in found.values()) < 1e-6
    assert max(found[kind].size for kind in ("loss", "parameters", "optimizer")) < 1e-9


def test_everything_is_in_it() -> None:
    assert {layout for (_, layout), _ in CELLS} == set(LAYOUTS)
    assert {name for (name, _), _ in CELLS} >= {*MIXED_ROWS, *ENCODER_ROWS, *OPTIMIZER_ROWS}
    models = [row.model for row in (*MIXED_ROWS.values(), *ENCODER_ROWS.values())]
    assert {model["scheme"]["name"] for model in models} == set(SCHEMES)
    assert {model["norm"]["name"] for model in models} == set(NORMS)
    assert {model["attention"]["score"] for model in models} == set(SCORES)
    assert {model.get("weight_norm") for model in models} == {None, *WEIGHT_NORMS}
