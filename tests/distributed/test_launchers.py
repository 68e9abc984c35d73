"""`nlm train` as people start it on several ranks: one speaks, the numbers are those of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import free_port
from ranks import torchrun

from nlm.config import Config
from nlm.train import train

RunConfig = Callable[..., Config]
DEEPSPEED = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators=2"]


def deepspeed(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """As `torchrun`, of two ranks."""
    return subprocess.run(
        [*DEEPSPEED, f"--master_port={free_port()}", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def one(run_config: RunConfig) -> Config:
    config = run_config("one", data={"validation": run_config("unused").data.train}, evaluate={"batches": 3})
    train(config)
    return config


@pytest.mark.parametrize(
    ("launcher", "layout"),
    [
        ("torchrun", ["parallel.tp=2", "train.preflight=true"]),
        ("torchrun", ["parallel.pp=2", "parallel.microbatches=2"]),
        ("deepspeed", ["parallel.dp_replicate=2"]),
        ("deepspeed", ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.dp_shard=2"]),
    ],
    ids=["torchrun-tp", "torchrun-pp", "deepspeed-ddp", "deepspeed-zero3"],
)
def test_a_run(launcher: str, layout: list[str], one: Config, tmp_path: Path) -> None:
    path, run = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(one.to_toml())
    train_there = ("train", path, f"log.dir={run}", *layout)
    if launcher == "torchrun":
        done = torchrun(2, "-m", "nlm", *train_there)
    else:
        done = deepspeed("--module", "nlm", *train_there)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("parameters in 3 layers on cpu x") == 1, done.stdout
    assert done.stdout.count("step 8/8") == 1, done.stdout
    assert done.stdout.count("preflight: 2 ranks on 1 host") == ("train.preflight=true" in layout), done.stdout
    reference = Path(one.log.dir)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    last, expected = (json.loads((r / "metrics.jsonl").read_text().splitlines()[-1]) for r in (run, reference))
    assert last["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("layout", [["dp_shard=2"], ["pp=2", "microbatches=2"]], ids=str)
def test_nan_on_one_rank_ends_all(layout: list[str], one: Config, tmp_path: Path) -> None:
    path, run = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(one.to_toml())
    script = tmp_path / "poisoned.py"
    script.write_text(POISON)
    overrides = [f"log.dir={run}", *(f"parallel.{part}" for part in layout)]
    done = torchrun(2, script, "train", path, *overrides)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("nlm: step 1: loss") == 1 and "gradient norm nan" in done.stdout, done.stdout
    assert not list(run.glob("checkpoints/step-*")), "a checkpoint of nothing but NaN"


POISON = """
import os, sys
import nlm.train
from nlm.build import build_engine
from nlm.cli import main

def poisoned(config, mesh):
    engine = build_engine(config, mesh)
    if os.environ["RANK"] == "1":
        engine.pieces.tensors[3].view(-1)[0] = float("nan")
    return engine

nlm.train.build_engine = poisoned
sys.exit(main(sys.argv[1:]))
"""


def test_gloo_has_one_thread_a_group(one: Config, tmp_path: Path) -> None:
    """Of two, as torch has them, both write the same name at times, and free it."""
    path, script = tmp_path / "config.toml", tmp_path / "counted.py"
    path.write_text(one.to_toml())
    script.write_text(COUNTED)
    done = torchrun(2, script, "train", path, f"log.dir={tmp_path / 'run'}", "parallel.tp=2")
    assert done.returncode == 0, done.stdout
    said = "".join(file.read_text() for file in (tmp_path / "run" / "ranks").iterdir())
    assert said.count("one thread a group") == 2, said


COUNTED = """
import sys
from pathlib import Path
import nlm.train
from nlm.cli import main
from torch.distributed import distributed_c10d
from nlm.stop import StopRequest

class Counted(StopRequest):
    def __exit__(self, *error):
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        threads, groups = names.count("pt_gloo_runloop"), len(distributed_c10d._world.pg_map)
        print("one thread a group" if threads == groups > 1 else f"{threads} of {groups} groups", flush=True)
        super().__exit__(*error)

nlm.train.StopRequest = Counted
sys.exit(main(sys.argv[1:]))
"""
