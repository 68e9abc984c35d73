"""What the statistics of 1,000 layers cost: `python tools/statistics_cost.py` measures it and writes it into
docs/statistics.md.

Recorded steps and others take turns (tools/bench.py), eager and compiled; a table has the share of a step's CPU time
that recording, judging and storing adds when every step is recorded, and a tenth of it, for every 10th.
"""

import argparse
import re
from pathlib import Path

from bench import BENCHES, race

PAGE = Path(__file__).parent.parent / "docs" / "statistics.md"
NARROW, WIDE = "D=64, 1,024 tokens", "D=128, 2,048 tokens, recomputed"
ROWS = {
    "statistics": f"{NARROW}, eager",
    "statistics-compiled": f"{NARROW}, compiled",
    "statistics-wide": f"{WIDE}, eager",
    "statistics-wide-compiled": f"{WIDE}, compiled",
}
TARGETS = {"every step": 0.05, "every 10th step": 0.01}


def row(bench: str, rounds: int) -> str:
    steps, contenders = BENCHES[bench]
    none, every = (record["cpu_s"] for record in race(steps, contenders, rounds, threads=1))
    costs = (every / none - 1, (every / none - 1) / 10)
    cells = [
        f"{cost:.2%}" + ("" if cost < target else " **missed**")
        for cost, target in zip(costs, TARGETS.values(), strict=True)
    ]
    return f"| {ROWS[bench]} | {none:.2f} s | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    head = " | ".join(f"{name}, target {target:.0%}" for name, target in TARGETS.items())
    lines = [f"| 1,000 layers | CPU time of a step | {head} |", "|---|---|---|---|"]
    for bench in ROWS:
        lines.append(row(bench, rounds))
        print(lines[-1], flush=True)
    marked = "<!-- cost -->\n" + "\n".join(lines) + "\n<!-- end -->"
    text = re.sub(r"<!-- cost -->.*?<!-- end -->", lambda _: marked, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
