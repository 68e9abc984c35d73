"""A checkpoint evaluated by several ranks that hold parts of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import torchrun

from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.config import Config
from nlm.train import train


def numbers(value: Any) -> list[float]:
    match value:
        case dict():
            return [number for inner in value.values() for number in numbers(inner)]
        case list():
            return [number for inner in value for number in numbers(inner)]
        case int() | float():
            return [value]
    return []


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (
            {"scheme": {"name": "normformer"}, "weight_norm": "spectral"},
            "parallel.tp=2 parallel.sequence_parallel=true",
        ),
        ({"norm": {"name": "powernorm", "published": False}, "tied": True}, "parallel.dp_shard=2"),
        ({"architecture": "encoder", "vocab_size": 259}, "parallel.tp=2 parallel.sequence_parallel=true"),
    ],
    ids=["tp", "fsdp", "encoder"],
)
def test_ranks_say_what_one_process_does(
    model: dict[str, Any], layout: str, run_config: Callable[..., Config], shard: str, tmp_path: Path
) -> None:
    """Also where buffers are divided, or state goes from step to step; with the vocabulary in unequal parts."""
    run = train(run_config("run", model, data={"train": shard, "validation": shard}))
    checkpoint, alone, together = checkpoints(run)[-1], tmp_path / "alone.json", tmp_path / "together.json"
    encoder = model.get("architecture") == "encoder"
    how = ["--tokens", "301", "--window", "31", *([] if encoder else ["--stride", "7"]), "--json"]
    assert main(["evaluate", str(checkpoint), *how, str(alone)]) == 0
    done = torchrun(2, "-m", "nlm", "evaluate", str(checkpoint), *layout.split(), *how, together)
    assert done.returncode == 0, done.stdout
    ours, theirs = json.loads(alone.read_text()), json.loads(together.read_text())
    assert numbers(theirs) == pytest.approx(numbers(ours), rel=1e-4) and len(numbers(ours)) > (15 if encoder else 60)
    assert theirs[0]["text"][shard]["of_tokens" if encoder else "tokens"] == 301
