"""Preflight on GPUs: what only they have is measured, and a healthy one passes. Run by `pytest tests/gpu`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nlm.config import Config
from nlm.preflight import preflight
from nlm.preflight.check import Found, Place
from nlm.preflight.health import measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_a_healthy_gpu_passes(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    preflight(make_config(train={"precision": "bf16"}, log={"dir": str(tmp_path)}))
    shown = capsys.readouterr().out
    assert torch.cuda.get_device_name() in shown and "nccl" in shown and "free, GiB" in shown, shown
    assert "!" not in shown, shown


def test_what_the_driver_knows(make_config: Callable[..., Config]) -> None:
    found: Found = {}
    store = torch.distributed.HashStore()
    measure(Place(make_config(), torch.device("cuda", 0), store, 0, 1, 0, "here"), found)
    print(json.dumps(found))
    assert {"driver", "temperature_c", "clocks", "other_processes", "free_memory"} <= set(found), found


def test_several_gpus_talk(make_config: Callable[..., Config], tmp_path: Path) -> None:
    if (n := torch.cuda.device_count()) < 2:
        pytest.skip("needs two GPUs")
    path = tmp_path / "config.toml"
    config = make_config(
        parallel={"dp_replicate": n}, train={"batch_tokens": 12 * n, "precision": "bf16"}, log={"dir": str(tmp_path)}
    )
    path.write_text(config.to_toml())
    script = Path(__file__).parents[2] / "launch" / "preflight.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", script, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0 and f"preflight: {n} ranks" in done.stdout, done.stdout + done.stderr
    assert "dp_replicate, GB/s" in done.stdout and "to next, GB/s" in done.stdout, done.stdout
