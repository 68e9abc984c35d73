"""The lines of a run, and what it computes a second."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nlm.config import Config, ConfigError
from nlm.metrics import Efficiency, Log
from nlm.plan.flops import flops_per_token
from nlm.plan.gpus import GPUS
from nlm.train import train

RunConfig = Callable[..., Config]
SCALARS = {"loss": 2.0, "grad_norm": 0.1, "lr": 1e-3, "tokens_s": 2e6, "peak_memory_gib": 1.5}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_mfu_is_a_share_of_a_known_peak(make_config: Callable[..., Config]) -> None:
    config = make_config(train={"precision": "bf16"}, parallel={"dp_replicate": 2})
    gpu = GPUS["H100"]
    seen = Efficiency(config, gpu.device_name).of(1e6)
    assert seen["tflops_per_rank"] == pytest.approx(1e6 * flops_per_token(config) / 2 / 1e12)
    assert seen["mfu"] == pytest.approx(seen["tflops_per_rank"] * 1e12 / gpu.peak_flops["bf16"])
    assert "mfu" not in Efficiency(config, "a processor nobody knows").of(1e6)
    given = config.model_copy(update={"log": config.log.model_copy(update={"peak_tflops": 4.0})})
    assert Efficiency(given, gpu.device_name).of(1e6)["mfu"] == pytest.approx(seen["tflops_per_rank"] / 4)


def test_a_line_says_how_fast_and_which_layer_is_worst(
    run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(Path(run_config("run").log.dir), run_config("run"), 0) as log:
        log.write(1, SCALARS, None, {"batch": 1}, "layer 731: grad_norm/q 8.1σ")
        log.write(2, SCALARS, None, {"batch": 2})
    first, second = capsys.readouterr().out.splitlines()
    assert "layer 731: grad_norm/q 8.1σ" in first and "layer" not in second
    assert re.search(r"2,000,000 tokens/s  \d\S* TFLOP/s a rank  1.5 GiB", second) and "MFU" not in second
    with_worst, without = records(Path(run_config("run").log.dir))
    assert with_worst["worst_layer"] == "layer 731: grad_norm/q 8.1σ" and "worst_layer" not in without


def test_a_run_says_its_share_of_the_peak_it_was_told(
    run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(run_config("run", train={"steps": 2}, log={"peak_tflops": 0.5}))
    assert re.search(r"MFU \d+\.\d%", capsys.readouterr().out)
    for record in records(run):
        assert record["mfu"] == pytest.approx(record["tflops_per_rank"] / 0.5)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_named_before_anything_is_made(
    name: str, run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nlm.sinks.find_spec", lambda _: None)
    config = run_config("run", log={name: {"tracking_uri": "file:x"} if name == "mlflow" else {}})
    with pytest.raises(ConfigError, match=rf"log\.{name}: .* pip install 'nlm\[{name}\]'"):
        train(config)
    assert not Path(config.log.dir).exists()
