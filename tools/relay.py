"""One run handed from layout to layout: `python tools/relay.py` for every layout of the parity matrix.

A run on a mixture of token shards and streamed text stops after every step and goes on in another layout, from its
checkpoint: in all of them, one process included, in an order drawn anew each round. In the end it is compared to the
same run of one process that never stopped: every step must have read the same batch, and its loss, like the parameters
and optimizer state at the end, be within LIMIT. Exit code 1 if not.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from parity import EPS, LAYOUTS, MODEL, Ranks, write_tokens

from nlm.build import parse_config
from nlm.compare import Difference, differences
from nlm.config import Config

LIMIT = 1e-5
"""Relative, in float32. DeepSpeed keeps no other."""


def relay(order: Sequence[str | None], folder: Path, ranks: Ranks) -> dict[str, Difference]:
    """One step in each layout of `order` (None: one process) -> how far from as many steps in one process."""
    write_tokens(folder)
    straight, handed = folder / "straight", folder / "handed"
    ranks.train(config(folder, straight, len(order), None))
    for step, layout in enumerate(order, 1):
        ranks.train(config(folder, handed, len(order), layout, stop_after=step))
    return differences(handed, straight)


def config(folder: Path, run: Path, steps: int, layout: str | None, **train: int) -> Config:
    text = {"files": [str(folder / "play.jsonl")], "tokenizer": "byte", "weight": 1.0, "workers": 0, "shuffle": 7}
    return parse_config(
        {
            "model": MODEL | {"scheme": {"name": "deepnorm"}},
            "train": {"steps": steps, "batch_tokens": 512, "seq_len": 16, **train},
            "optim": {"lr": 1e-3, "eps": EPS, "clip": 0.5},
            "parallel": {"microbatches": 8} | (LAYOUTS[layout] if layout else {}),
            "data": {"train": [text, {"path": str(folder / "tokens"), "weight": 1.0}], "document_mask": True},
            "log": {"dir": str(run), "every": 1, "tensorboard": False},
        }
    )


def shuffled(rounds: int, seed: int = 0) -> list[str | None]:
    """Every layout once a round."""
    draw = random.Random(seed)
    return [layout for _ in range(rounds) for layout in draw.sample([None, *LAYOUTS], k=len(LAYOUTS) + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    order = shuffled(parser.parse_args().rounds)
    with tempfile.TemporaryDirectory() as folder, closing(Ranks()) as ranks:
        found = relay(order, Path(folder), ranks)
    print(" -> ".join(layout or "one process" for layout in order))
    for kind, difference in found.items():
        if not kind.startswith("layers/"):
            print(f"{kind}: {difference.size:.1e}" + (f", first in {difference.first}" if difference.first else ""))
    return 1 if any(found[kind].size > LIMIT for kind in ("batch_digest", "loss", "parameters", "optimizer")) else 0


if __name__ == "__main__":
    sys.exit(main())
