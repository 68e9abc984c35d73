"""Claims of the papers: the rule of the verdict, some scripts for real, and that docs/claims.* are what it says."""

import json
from importlib import import_module
from math import inf, nan
from pathlib import Path

import pytest

from nlm import SCHEMES
from tools.reproduce import setting
from tools.reproduce.__main__ import DOCS, REGISTRIES, SCRIPTS, page, store
from tools.reproduce.claim import Check, Verdict, together
from tools.reproduce.setting import as_good, less


@pytest.mark.parametrize(
    ("values", "limits", "expected"),
    [
        ([2.0], {"above": 1.0}, Verdict.REPRODUCED),
        ([0.5], {"above": 1.0}, Verdict.CONTRADICTED),
        ([0.5], {"below": 1.0}, Verdict.REPRODUCED),
        ([2.0], {"below": 1.0}, Verdict.CONTRADICTED),
        ([1.0, 2.0, 3.0], {"above": 0.1}, Verdict.NOT_HERE),  # 1.9 above it, with a spread of 1
        ([1.0, 2.0, 3.0], {"above": -0.1}, Verdict.REPRODUCED),
        ([1.0, 2.0, 3.0], {"above": 3.9}, Verdict.NOT_HERE),
        ([1.0, 2.0, 3.0], {"above": 4.1}, Verdict.CONTRADICTED),
        ([1.0, 2.0, 3.0], {"above": 4.1, "against": 3.9}, Verdict.NOT_HERE),
        ([1.0, 2.0, 3.0], {"below": 4.1}, Verdict.REPRODUCED),
        ([1.0, 2.0, 3.0], {"below": -0.1}, Verdict.CONTRADICTED),
        ([0.07], {"below": 0.05, "against": 0.1}, Verdict.NOT_HERE),
        ([0.12], {"below": 0.05, "against": 0.1}, Verdict.CONTRADICTED),
    ],
)
def test_the_verdict_follows_from_the_numbers(values: list[float], limits: dict[str, float], expected: Verdict) -> None:
    assert Check("it", values, **limits).verdict == expected


def test_a_claim_is_as_good_as_its_worst_check() -> None:
    good, open_, bad = Verdict.REPRODUCED, Verdict.NOT_HERE, Verdict.CONTRADICTED
    assert together([good, good]) == good
    assert together([good, open_]) == open_
    assert together([good, open_, bad]) == bad


def test_arms_are_compared_at_the_same_seed() -> None:
    """Seeds that differ by 1 do not hide a difference of 0.2 that every one of them has."""
    small, large = [1.0, 2.0, 3.0], [1.2, 2.2, 3.21]
    assert less("loss", "a", small, "b", large).verdict == Verdict.REPRODUCED
    assert less("loss", "a", large, "b", small).verdict == Verdict.CONTRADICTED
    assert as_good("a", small, "b", large).verdict == Verdict.REPRODUCED
    assert as_good("a", large, "b", small).verdict == Verdict.CONTRADICTED


@pytest.mark.parametrize(
    ("values", "limits", "problem"),
    [
        ([1.0, nan], {"above": 0.0}, "finite"),
        ([inf], {"above": 0.0}, "finite"),
        ([], {"above": 0.0}, "finite"),
        ([1.0], {}, "one of above and below"),
        ([1.0], {"above": 0.0, "below": 1.0}, "one of above and below"),
    ],
)
def test_what_has_no_verdict_is_refused(values: list[float], limits: dict[str, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Check("it", values, **limits)


def test_scripts_run_and_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three for real, one of which contradicts its paper; one that ran again is there once."""
    monkeypatch.setattr(setting, "DATA", tmp_path / "data")
    setting.plays.cache_clear()
    expected = {
        "sa_softmax_gradient": "contradicted",
        "sandwich_ln_scale": "reproduced",
        "weight_norm_orthogonal": "reproduced",
    }
    for script in [*expected, "sa_softmax_gradient"]:
        store(import_module(f"tools.reproduce.{script}").CLAIM.row(script), tmp_path)
    setting.plays.cache_clear()
    rows = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert {row["script"]: row["verdict"] for row in rows} == expected
    assert len(rows) == 3
    written = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "3 claims: 1 contradicted, 2 reproduced" in written
    assert all(row["claim"] in written for row in rows)


def test_the_documented_claims_are_of_what_there_is() -> None:
    """All scripts have run, every scheme has a claim, and the table is that of the rows."""
    rows = json.loads((DOCS / "claims.json").read_text(encoding="utf-8"))
    assert {row["script"] for row in rows} == set(SCRIPTS)
    for row in rows:
        assert row["entry"] in REGISTRIES[row["registry"]], row
    assert {row["entry"] for row in rows if row["registry"] == "schemes"} == set(SCHEMES)
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == page(rows)
