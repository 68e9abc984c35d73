"""A loss that is infinite on one rank only: all ranks leave the step out, and are as one process that leaves it out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import torchrun

from nlm.checkpoint import checkpoints
from nlm.config import Config
from nlm.storage import read_all

BAD = 3
SCRIPT = f"""
import os, sys
import nlm.data.rank
from nlm.cli import main
from nlm.model import Transformer

rows, forward = nlm.data.rank.RankData.rows, Transformer.forward
batch = 0
last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

def rows_of(self, number):
    global batch
    batch = number
    return rows(self, number)

def infinite(self, *given, **named):
    out = forward(self, *given, **named)
    return out * float("inf") if batch == {BAD} and last and out.dim() == 0 else out

nlm.data.rank.RankData.rows, Transformer.forward = rows_of, infinite
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def trained(
    make_config: Callable[..., Config], shard: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A run of six steps of which the third is bad."""

    def train(ranks: int, **parallel: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        config = make_config(
            {"scheme": {"name": "ngpt"}, "n_layers": 4, "vocab_size": 257},
            train={"steps": 6, "batch_tokens": 128, "seq_len": 32},
            data={"train": shard},
            parallel={"microbatches": 2} | parallel,
            log={"dir": str(folder / "run"), "every": 1, "tensorboard": False},
        )
        script, path = folder / "script.py", folder / "config.toml"
        script.write_text(SCRIPT)
        path.write_text(config.to_toml())
        done = torchrun(ranks, script, "train", path)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count(f"step {BAD} left out: loss ") == 1, done.stdout
        return Path(config.log.dir)

    return train


@pytest.fixture(scope="module")
def reference(trained: Callable[..., Path]) -> Path:
    return trained(1)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2},
        {"tp": 2},
        {"pp": 2},
        {"engine": "deepspeed", "zero": 0, "dp_replicate": 2},
        *({"engine": "deepspeed", "zero": stage, "dp_shard": 2} for stage in (1, 3)),
        {"engine": "deepspeed", "zero": 3, "dp_shard": 2, "offload": True},
    ],
    ids=str,
)
def test_all_ranks_leave_it_out(layout: dict[str, Any], trained: Callable[..., Path], reference: Path) -> None:
    run = trained(2, **layout)
    (fault,) = map(json.loads, (run / "faults.jsonl").read_text().splitlines())
    assert fault["step"] == BAD and fault["left_out"]
    ours, theirs = (read_all(checkpoints(r)[-1] / "tensors") for r in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.isfinite().all(), name
        assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    losses = [
        [json.loads(line)["loss"] for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, reference)
    ]
    good = [step for step in range(6) if step != BAD - 1]
    assert [losses[0][step] for step in good] == pytest.approx([losses[1][step] for step in good], rel=1e-5)
