"""A published claim: whose it is, what is measured for it, and the verdict that follows from the numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from statistics import mean, stdev
from time import process_time
from typing import Any


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    NOT_HERE = "not at this scale"
    CONTRADICTED = "contradicted"


CERTAIN = 2.0
"""By how many standard deviations over seeds a mean is to be beyond a limit. Of three normal numbers around the limit
itself the mean is that far on a given side once in 27 times."""


@dataclass(frozen=True)
class Check:
    """A quantity, once a seed, and the limit `above` or `below` which the claim has it.

    Reproduced where the mean is on that side by more than CERTAIN times the spread (the standard deviation over seeds),
    contradicted where it is as far on the other side of `against`, by default the limit itself; neither between.
    `note` says what the quantity was made of.
    """

    quantity: str
    values: Sequence[float]
    above: float | None = None
    below: float | None = None
    against: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise ValueError(f"{self.quantity}: expected one of above and below; give the side that the claim is on")
        if not self.values or not all(map(isfinite, self.values)):
            raise ValueError(f"{self.quantity}: expected finite numbers, got {self.values}; bound what may diverge")

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        return stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def verdict(self) -> Verdict:
        limit, sign = (self.below, -1) if self.above is None else (self.above, 1)
        assert limit is not None, "checked above"
        against = limit if self.against is None else self.against
        doubt = CERTAIN * self.spread
        if sign * (self.mean - limit) > doubt:
            return Verdict.REPRODUCED
        return Verdict.CONTRADICTED if sign * (self.mean - against) < -doubt else Verdict.NOT_HERE

    @property
    def expected(self) -> str:
        return f"{self.quantity} " + (f"> {self.above:.3g}" if self.below is None else f"< {self.below:.3g}")

    @property
    def measured(self) -> str:
        return shown(self.values) + (f" ({self.note})" if self.note else "")


def shown(values: Sequence[float]) -> str:
    """Mean, and the spread where there are several."""
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of all checks of a claim: one that is contradicted contradicts it, and it is reproduced only as a whole."""
    if Verdict.CONTRADICTED in verdicts:
        return Verdict.CONTRADICTED
    return Verdict.NOT_HERE if Verdict.NOT_HERE in verdicts else Verdict.REPRODUCED


@dataclass(frozen=True)
class Claim:
    """`entries`: the names in each registry whose claim it is. `statement` is in our words, `source` its paper."""

    entries: dict[str, tuple[str, ...]]
    source: str
    statement: str
    measure: Callable[[], list[Check]]

    def row(self, script: str) -> dict[str, Any]:
        """Measures -> everything about it: JSON."""
        began = process_time()
        checks = self.measure()
        return {
            "script": script,
            "entries": self.entries,
            "claim": self.statement,
            "source": self.source,
            "expected": "; ".join(check.expected for check in checks),
            "measured": "; ".join(check.measured for check in checks),
            "verdict": together([check.verdict for check in checks]),
            "cpu_s": round(process_time() - began, 1),
        }

    def show(self, script: str) -> dict[str, Any]:
        """As `row`, and prints it."""
        row = self.row(script)
        for key in ("script", "claim", "source", "expected", "measured", "verdict", "cpu_s"):
            print(f"{key:9} {row[key]}", flush=True)
        return row
