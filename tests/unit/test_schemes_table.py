"""docs/schemes.md is what the tool makes of what was measured, and has an answer in every cell."""

import json
from pathlib import Path

import pytest
import schemes_table
from schemes_table import DOCS, LAYOUTS, PARTS, REGISTRIES, cell, document

FOUND = json.loads((DOCS / "schemes.json").read_text(encoding="utf-8"))
CLAIMS = json.loads((DOCS / "claims.json").read_text(encoding="utf-8"))


def test_the_document_is_of_what_there_is() -> None:
    text = "\n".join(document(FOUND, CLAIMS)).rstrip() + "\n"
    assert (DOCS / "schemes.md").read_text(encoding="utf-8") == text
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == {entry for entries in REGISTRIES.values() for entry in entries}
    assert not [entry for entry, row in rows.items() if "not measured" in row or "| |" in row or "failed" in row]


@pytest.mark.parametrize(
    ("part", "limit"), [("equation", 1e-9), *((layout, 1e-7) for layout in LAYOUTS), ("resume", 0)]
)
def test_numbers_are_within_their_limits(part: str, limit: float) -> None:
    names, _ = PARTS[part]
    assert set(FOUND[part]) >= set(names)
    assert all(float(FOUND[part][name]) <= limit for name in names if not FOUND[part][name].startswith("refused"))


def test_a_cell_has_the_worst_of_its_models() -> None:
    names = schemes_table.models_of("norms", "batchnorm")
    assert names == ["encoder-sub_ln-batchnorm-softmax"]
    softmax = schemes_table.models_of("scores", "softmax")
    found = {"TP": dict.fromkeys(softmax, "1e-15") | {softmax[1]: "3e-9", softmax[2]: "refused: why"}}
    assert cell(found, "TP", "scores", "softmax") == "3e-9"
    assert cell({"TP": {softmax[2]: "refused: why"}}, "TP", "scores", "softmax") == "refused: why"
    assert (
        cell(found | {"TP": found["TP"] | {softmax[0]: "a rank died"}}, "TP", "scores", "softmax") == "**a rank died**"
    )
    assert cell({}, "TP", "scores", "softmax") == "not measured"


@pytest.mark.parametrize("part", ["equation", "start", "1,000 layers", "bf16", "resume"])
def test_what_is_measured_anew_is_what_stands_there(part: str, tmp_path: Path) -> None:
    """Of the first model, to the digits that are shown; rounding of other machines may move the last."""
    schemes_table.write_tokens(tmp_path)
    names, measure = PARTS[part]
    name = next(iter(names))
    there, here = FOUND[part][name], measure(name, tmp_path)
    if part in {"start", "1,000 layers"}:
        words = zip(there.split(), here.split(), strict=True)
        numbers = [(a, b) for a, b in words if a != b]
        assert all(float(a) == pytest.approx(float(b), rel=0.02) for a, b in numbers)
    elif part == "bf16":  # how its roundings add up in 8 steps differs between processors: within one of them
        assert float(here) <= 2**-8
    else:
        assert float(here) <= 10 * float(there) + 1e-12
