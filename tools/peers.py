"""nlm beside other libraries: `python tools/peers.py` measures all of it and writes it into docs/performance.md.

Every library is installed into an environment of its own, which goes in the end. It and nlm, each eager, compiled and
at its leanest, then take turns at steps of training of the same shape (tools/peer_step.py), and so does the floor:
their matrix products and attention alone. Tables have the medians. By depth:
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RECORDS = ROOT / "docs" / "performance.json"
SHAPES: dict[int, dict[str, Any]] = {
    24: {"dim": 256, "n_heads": 4, "ffn_dim": 688, "vocab_size": 8192, "rows": 4, "seq_len": 256},
    200: {"dim": 128, "n_heads": 4, "ffn_dim": 344, "vocab_size": 4096, "rows": 4, "seq_len": 256},
    1000: {"dim": 64, "n_heads": 2, "ffn_dim": 172, "vocab_size": 512, "rows": 2, "seq_len": 256},
}
PRE_LN = {"scheme": {"name": "pre_ln"}}
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """What pip installs, and the keys of nlm's [model] that make it the same model."""

    requirements: tuple[str, ...]
    model: dict[str, Any]
    ways: tuple[str, ...] = ("eager", "compiled")


OURS = ("nlm", "floor")
SPEED_GOALS = {24: 1.3, 200: 1.5, 1000: 1.5}
MEMORY_GOAL = 0.8
Record = dict[str, Any]
"""What was found of a contender in a race; RECORDS has them all."""
PEERS = {
    "transformers": Peer(("transformers",), PRE_LN, ("eager", "compiled", "checkpointed")),
    "litgpt": Peer(("litgpt",), PRE_LN),
    "olmo_core": Peer(("ai2-olmo-core",), PRE_LN),
    "torchtitan": Peer(("torchtitan", "triton"), PRE_LN),
    "torchscale": Peer(
        ("torchscale",),
        {
            "scheme": {"name": "deepnorm"},
            "norm": "layernorm",
            "activation": "relu",
            "bias": True,
            "position": "learned",
        },
    ),
    "ngpt_pytorch": Peer(("nGPT-pytorch",), {"scheme": {"name": "ngpt"}}),
    "megatron_core": Peer(("megatron-core==0.16.1",), PRE_LN, ("eager",)),
}


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """-> its Python. Errors: subprocess.CalledProcessError, after what pip says."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n")
    for wanted in ([TORCH], ["--constraint", constraint, "numpy", "setuptools<81", *requirements]):
        subprocess.run([*pip, *wanted], check=True)
    return folder / "bin" / "python"


class Runner:
    """A process that takes steps when told to."""

    def __init__(self, python: str | Path, name: str, shape: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, "-W", "ignore", ROOT / "tools" / "peer_step.py", name, json.dumps(shape)],
            env=os.environ
            | {"PYTHONPATH": str(ROOT) if name in OURS else "", "OMP_NUM_THREADS": str(shape["threads"])},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def take(self, steps: int) -> dict[str, float]:
        """Errors: RuntimeError with the end of what the process said."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        if self.process.poll() is None:
            print(steps, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))  # type: ignore[no-any-return]
        raise RuntimeError(self.process.stderr.read()[-600:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def race(
    runners: dict[tuple[str, str], Runner], rounds: int, steps: int
) -> Iterator[tuple[tuple[str, str], dict[str, float] | str]]:
    """Medians of each that runs, after a turn that warms up; what the others said."""
    turns: dict[tuple[str, str], list[dict[str, float]]] = {name: [] for name in runners}
    failed: dict[tuple[str, str], str] = {}
    try:
        for turn in range(rounds + 1):
            for name, runner in runners.items():
                if name in failed:
                    continue
                try:
                    turns[name].append(runner.take(steps if turn else 1))
                except RuntimeError as error:
                    failed[name] = str(error)
    finally:
        for runner in runners.values():
            runner.close()
    for name in runners:
        if name in failed:
            yield name, failed[name]
        else:
            taken = turns[name]
            medians = {key: statistics.median(turn[key] for turn in taken[1:]) for key in ("cpu_s", "wall_s")}
            yield name, medians | {key: taken[-1][key] for key in ("peak_gib", "parameters")}


def measured(peer: str, python: Path, depth: int, precision: str, options: argparse.Namespace) -> Iterator[Record]:
    shape = SHAPES[depth] | {"n_layers": depth, "precision": precision, "threads": options.threads}
    shape["model"] = PEERS[peer].model
    contenders = [(peer, how) for how in PEERS[peer].ways]
    contenders += [("nlm", how) for how in ("eager", "compiled", "compiled, sqrt")] + [("floor", "")]
    runners = {
        (name, how): Runner(sys.executable if name in OURS else python, name, shape | {"how": how})
        for name, how in contenders
    }
    tokens = shape["rows"] * shape["seq_len"]
    for (name, how), found in race(runners, options.rounds, max(1, 48 // depth)):
        record: Record = {"peer": peer, "layers": depth, "precision": precision, "name": name, "how": how}
        if isinstance(found, str):
            yield record | {"failed": " ".join(found.split())[-160:]}
        else:
            yield record | found | {"tokens_s": tokens / found["wall_s"]}


def table(records: Sequence[Record]) -> Iterator[str]:
    yield "| layers | precision | | parameters | tokens/s | CPU s a step | peak GiB |"
    yield "|---|---|---|---|---|---|---|"
    for r in records:
        head = f"| {r['layers']} | {r['precision']} | {', '.join(filter(None, (r['name'], r['how'])))} |"
        if "failed" in r:
            yield f"{head} failed: {r['failed']} | | | |"
        else:
            yield f"{head} {r['parameters']:,} | {r['tokens_s']:,.0f} | {r['cpu_s']:.2f} | {r['peak_gib']:.2f} |"


def goals(records: Sequence[Record]) -> Iterator[str]:
    """Each peer at its fastest and at its leanest against nlm at its own, in the race that both were in."""
    yield "| layers | precision | peer | nlm's speed / its | goal | the floor's / its | nlm's memory / its | goal |"
    yield "|---|---|---|---|---|---|---|---|"
    for depth, precision, peer in sorted(set(map(race_of, records))):
        ran = [r for r in records if race_of(r) == (depth, precision, peer)]

        def of(name: str, key: str, best: Callable[..., float], ran: Sequence[Record] = ran) -> float:
            return best((r[key] for r in ran if r["name"] == name and key in r), default=float("nan"))

        speed = of("nlm", "tokens_s", max) / of(peer, "tokens_s", max)
        bound = of("floor", "tokens_s", max) / of(peer, "tokens_s", max)
        memory = of("nlm", "peak_gib", min) / of(peer, "peak_gib", min)
        least = SPEED_GOALS[depth]
        yield (
            f"| {depth} | {precision} | {peer} | {speed:.2f} | {least}: {_mark(speed >= least)} | {bound:.2f} "
            f"| {memory:.2f} | {MEMORY_GOAL}: {_mark(memory <= MEMORY_GOAL)} |"
        )


def _mark(met: bool) -> str:
    return "met" if met else "**missed**"


def write_table(name: str, lines: Iterable[str]) -> None:
    """Into docs/performance.md, in the place of the table of that name."""
    text, marked = PAGE.read_text(encoding="utf-8"), "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])
    assert f"<!-- {name} -->" in text, f"{PAGE} has no place for the table {name}"
    text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: marked, text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


def race_of(record: Record) -> tuple[int, str, str]:
    return record["layers"], record["precision"], record["peer"]


def keep(records: Sequence[Record]) -> None:
    """In the place of what there was of the same race; the tables are made anew."""
    races = set(map(race_of, records))
    old: list[Record] = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else []
    found = [r for r in old if race_of(r) not in races] + list(records)
    order = list(PEERS)
    found.sort(key=lambda r: (r["layers"], r["precision"], order.index(r["peer"])))
    RECORDS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_table("peers", table(found))
    write_table("goals", goals(found))


def main() -> None:
    shapes = "\n".join(f"  {depth}: {shape}" for depth, shape in SHAPES.items())
    parser = argparse.ArgumentParser(description=__doc__ + shapes, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--depths", nargs="+", type=int, choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--environments", type=Path, metavar="DIR", help="keep them there; default: a folder that goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for peer in options.peers:
            folder = (options.environments or Path(scratch)) / peer
            python = folder / "bin" / "python"
            if not python.exists():
                environment(folder, PEERS[peer].requirements)
            for depth, precision in product(options.depths, options.precisions):
                records = list(measured(peer, python, depth, precision, options))
                keep(records)
                print(*list(table(records))[2:], sep="\n", flush=True)


if __name__ == "__main__":
    main()
