"""Configs of published models have as many parameters as is printed, or it is said by how many they have not."""

from pathlib import Path

import pytest

from nlm.build import load_config
from nlm.plan.plan import parameters_by_role

PAPERS = Path(__file__).parents[2] / "configs" / "papers"

PRINTED = [
    ("normformer-125m", [], "124.5 M"),
    ("normformer-355m", [], None),  # not found
    ("normformer-1.3b", ["model.scheme.name=pre_ln"], "1313.5 M"),  # of the baseline; NormFormer's was not found
    ("normformer-2.7b", [], "2649.5 M"),
    ("ngpt-0.5b", ["model.scheme.name=pre_ln", "model.norm=rmsnorm"], "468.2 M"),
    ("ngpt-1b", ["model.scheme.name=pre_ln", "model.norm=rmsnorm"], "1025.7 M"),
    ("deepnet-100", [], None),  # not printed
    ("deepnet-1000", [], "3.8 B"),
    ("deepnet-102-languages", [], "3.2 B"),
    ("qknorm-en-vi", [], None),  # not printed
    ("qknorm-gl-en", [], None),  # likewise
]
"""Of a model or its baseline, which tells whether its sizes are the paper's."""

OFF = [("ngpt-0.5b", "468.4 M", 0.1), ("ngpt-1b", "1026.1 M", 0.1), ("deepnet-200", "863 M", 1)]
"""What does not come out, by how many in the last unit at most."""

BLOCKS = [("peri_ln-400m", "0.4 B"), ("peri_ln-1.5b", "1.5 B"), ("peri_ln-3.2b", "3.2 B")]
"""Sizes of ours, which are to be those of the paper's names: there is no more to compare with."""


def counted(name: str, *overrides: str) -> dict[str, int]:
    """What `nlm plan` counts, by role."""
    return parameters_by_role(load_config(PAPERS / f"{name}.toml", overrides))


def rounded(parameters: int, printed: str) -> str:
    """As printed: to as many digits, in its unit."""
    number, unit = printed.split()
    digits = len(number.partition(".")[2])
    return f"{parameters / {'M': 1e6, 'B': 1e9}[unit]:.{digits}f} {unit}"


def test_every_config_is_in_one_of_the_tables() -> None:
    rows = [*PRINTED, *OFF, *BLOCKS]
    assert {row[0] for row in rows} == {path.stem for path in PAPERS.glob("*.toml")}


@pytest.mark.parametrize(("name", "overrides", "printed"), PRINTED)
def test_what_is_printed_comes_out(name: str, overrides: list[str], printed: str | None) -> None:
    parameters = sum(counted(name, *overrides).values())
    assert printed is None or rounded(parameters, printed) == printed


@pytest.mark.parametrize(("name", "printed", "by"), OFF)
def test_what_does_not_come_out_is_near(name: str, printed: str, by: float) -> None:
    near(sum(counted(name).values()), printed, by)


def near(parameters: int, printed: str, by: float) -> None:
    found = rounded(parameters, printed)
    assert found != printed, "it does: move it to the other table"
    assert abs(float(found.split()[0]) - float(printed.split()[0])) == pytest.approx(by)


@pytest.mark.parametrize(("name", "size"), BLOCKS)
def test_the_blocks_are_of_the_size(name: str, size: str) -> None:
    roles = counted(name)
    assert rounded(sum(roles.values()) - roles["embed"] - roles["head"], size) == size
