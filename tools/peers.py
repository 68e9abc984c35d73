"""nlm beside other libraries: `python tools/peers.py` measures all of it and writes it into docs/performance.md.

Every library is installed into an environment of its own, which goes in the end. It and nlm then take turns at steps
of training of the same shape (tools/peer_step.py), each eager and compiled; a table has the medians. By depth:
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
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


PEERS = {
    "transformers": Peer(("transformers",), PRE_LN),
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
}


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """-> its Python. Errors: subprocess.CalledProcessError with what pip said."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n")
    for wanted in ([TORCH], ["--constraint", constraint, "numpy", "setuptools<81", *requirements]):
        subprocess.run([*pip, *wanted], check=True, text=True, stderr=subprocess.PIPE)
    return folder / "bin" / "python"


class Runner:
    """A process that takes steps when told to."""

    def __init__(self, python: str | Path, name: str, shape: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, "-W", "ignore", ROOT / "tools" / "peer_step.py", name, json.dumps(shape)],
            env=os.environ
            | {"PYTHONPATH": str(ROOT) if name == "nlm" else "", "OMP_NUM_THREADS": str(shape["threads"])},
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


def race(runners: dict[str, Runner], rounds: int, steps: int) -> Iterator[tuple[str, dict[str, float] | str]]:
    """Medians of each that runs, after a turn that warms up; what the others said."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    failed: dict[str, str] = {}
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


def rows(peer: str, python: Path, depth: int, precision: str, options: argparse.Namespace) -> Iterator[str]:
    shape = SHAPES[depth] | {"n_layers": depth, "precision": precision, "threads": options.threads}
    shape["model"] = PEERS[peer].model
    compiled = ["", "blocks", *(["whole"] if depth <= 24 else [])]
    runners = {f"{peer} {how}".strip(): Runner(python, peer, shape | {"compile": how}) for how in compiled}
    runners |= {f"nlm {how}".strip(): Runner(sys.executable, "nlm", shape | {"compile": how}) for how in ("", "blocks")}
    tokens = shape["rows"] * shape["seq_len"]
    found = dict(race(runners, options.rounds, max(1, 100 // depth)))
    best = min(
        (of["wall_s"] for name, of in found.items() if name.startswith(peer) and isinstance(of, dict)), default=0
    )
    leanest = min(
        (of["peak_gib"] for name, of in found.items() if name.startswith(peer) and isinstance(of, dict)), default=0
    )
    for name, of in found.items():
        head = f"| {depth} | {precision} | {name} |"
        if isinstance(of, str):
            yield f"{head} failed: {' '.join(of.split())[-160:]} | | | | |"
            continue
        ratios = (
            f"{best / of['wall_s']:.2f} | {of['peak_gib']:.2f} | {of['peak_gib'] / leanest:.2f}" if best else "| | "
        )
        yield f"{head} {of['parameters']:,} | {tokens / of['wall_s']:,.0f} | {ratios} |"


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
    lines = [
        "| layers | precision | | parameters | tokens/s | of the peer's best | peak GiB | of its least |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for peer in options.peers:
            folder = (options.environments or Path(scratch)) / peer
            python = folder / "bin" / "python"
            if not python.exists():
                try:
                    environment(folder, PEERS[peer].requirements)
                except subprocess.CalledProcessError as error:
                    lines.append(
                        f"| | | {peer} | not installed: {' '.join(str(error.stderr).split())[-160:]} | | | | |"
                    )
                    print(lines[-1], flush=True)
                    continue
            for depth in options.depths:
                for precision in options.precisions:
                    for line in rows(peer, python, depth, precision, options):
                        lines.append(line)
                        print(line, flush=True)
    write_table("peers", lines)


def write_table(name: str, lines: Sequence[str]) -> None:
    """Into docs/performance.md, in the place of the table of that name."""
    text, marked = PAGE.read_text(encoding="utf-8"), "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])
    assert f"<!-- {name} -->" in text, f"{PAGE} has no place for the table {name}"
    text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: marked, text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
