"""Checkpoints: what they hold, and that a damaged or foreign one is refused by name."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import torch

from nlm import build_model, load_checkpoint
from nlm.checkpoint import checkpoints, refuse_changed_model, resume, save_checkpoint
from nlm.config import Config, ConfigError
from nlm.optim import adamw
from nlm.train import train

RunConfig = Callable[..., Config]


@pytest.fixture
def saved(run_config: RunConfig) -> Path:
    return checkpoints(train(run_config("run")))[-1]


def test_the_model_of_a_checkpoint_is_the_trained_one(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config("model", {"tied": True, "scheme": {"name": "normformer"}})
    model = build_model(config, seed=3)
    optimizer = adamw(model, config.optim)
    tokens = torch.arange(24).view(2, 12)
    model(tokens).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 5, model, optimizer, config)
    loaded, its_config = load_checkpoint(path)
    assert its_config == config
    assert torch.equal(loaded(tokens), model(tokens))


def test_resuming_restores_optimizer_and_random_state(run_config: RunConfig, saved: Path) -> None:
    config = run_config("run")
    torch.manual_seed(1)
    model = build_model(config)
    optimizer = adamw(model, config.optim)
    assert resume(saved, model, optimizer) == 8
    state = optimizer.state[next(model.parameters())]
    assert float(state["step"]) == 8 and state["exp_avg_sq"].abs().sum() > 0
    after = torch.get_rng_state()
    torch.manual_seed(config.train.seed)
    assert torch.equal(after, torch.get_rng_state()), "nothing in a run of this model draws random numbers"


def test_at_no_moment_is_there_half_a_checkpoint(run_config: RunConfig, tmp_path: Path) -> None:
    """Whatever stands under a checkpoint's name, while one is written and an older one removed, is complete."""
    config = run_config("atomic", {"n_layers": 30}, checkpoint={"keep_last": 1})
    model = build_model(config)
    optimizer = adamw(model, config.optim)
    model(torch.arange(24).view(2, 12)).sum().backward()
    optimizer.step()
    files = {path.name for path in save_checkpoint(tmp_path, 1, model, optimizer, config).iterdir()}

    writer = Thread(target=lambda: [save_checkpoint(tmp_path, s, model, optimizer, config) for s in range(2, 40)])
    writer.start()
    looks = 0
    while writer.is_alive():
        for path in checkpoints(tmp_path):
            with suppress(FileNotFoundError):  # renamed since it was listed
                found = set(os.listdir(path))
                assert found == files or not path.exists(), f"{path.name} has only {found}"
                looks += 1
    assert looks > 100 and len(checkpoints(tmp_path)) == 1


def test_only_the_newest_are_kept(run_config: RunConfig) -> None:
    run = train(run_config("kept", checkpoint={"every": 2, "keep_last": 3}))
    assert [path.name[-1] for path in checkpoints(run)] == ["4", "6", "8"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(file: str, damage: str, saved: Path, run_config: RunConfig) -> None:
    path = saved / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    config = run_config("run", train={"steps": 9})
    with pytest.raises(ValueError, match=f"{file}: missing or damaged .* resume from an older checkpoint"):
        train(config)


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-00000001")


def test_a_config_of_another_model_is_refused_with_every_key(run_config: RunConfig, saved: Path) -> None:
    other = run_config("run", {"n_layers": 4, "scheme": {"name": "deepnorm"}}, train={"seed": 9})
    with pytest.raises(ConfigError) as error:
        refuse_changed_model(saved, other)
    keys = [problem.partition(":")[0] for problem in error.value.problems]
    assert keys == ["model.n_layers", "model.scheme", "train.seed"]
    refuse_changed_model(saved, run_config("run", optim={"lr": 1e-4}, train={"steps": 99}))
