"""The mean of checkpoints' weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nlm import build_model, load_checkpoint
from nlm.checkpoint import checkpoints, save_checkpoint, verify
from nlm.cli import main
from nlm.config import Config
from nlm.train import train

RunConfig = Callable[..., Config]


def test_the_mean_of_the_last_checkpoints(run_config: RunConfig, tmp_path: Path) -> None:
    run = train(run_config("run", {"tied": True}, checkpoint={"every": 2, "keep_last": 4}, optim={"lr": 0.1}))
    last, out = checkpoints(run)[1:], tmp_path / "mean"
    assert len(last) == 3
    assert main(["average", *map(str, last), "--out", str(out)]) == 0
    verify(out)
    mean, config = load_checkpoint(out)
    assert config == load_checkpoint(last[-1])[1]
    each = [load_checkpoint(checkpoint)[0].state_dict() for checkpoint in last]
    assert any((each[0][name] != each[2][name]).any() for name in each[0])
    for name, tensor in mean.state_dict().items():
        expected = torch.stack([state[name].double() for state in each]).mean(0)
        assert torch.equal(tensor, expected.float()), name


def test_checkpoints_of_other_models_have_no_mean(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, own in {"wide": {"dim": 64}, "narrow": {}}.items():
        config = run_config(name, own)
        save_checkpoint(tmp_path / f"{name}-model", build_model(config), config)
    given = [str(tmp_path / f"{name}-model") for name in ("wide", "narrow")]
    assert main(["average", *given, "--out", str(tmp_path / "out")]) == 2
    assert "expected the [model] of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
