"""Checkpoints: what they hold, and that a damaged or foreign one is refused by name."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from nlm import load_checkpoint
from nlm.build import build_engine
from nlm.checkpoint import checkpoints, refuse_changed_model, resume, save_checkpoint
from nlm.config import Config, ConfigError
from nlm.data import ShardWriter, TokenShard
from nlm.data.corpus import Corpus
from nlm.mesh import Mesh
from nlm.parallel.engine import Engine
from nlm.train import train

RunConfig = Callable[..., Config]


def stepped(config: Config) -> Engine:
    """A model one step away from its start."""
    engine = build_engine(config, Mesh())
    engine.models[0](torch.arange(24).view(2, 12)).sum().backward()
    engine.update(1e-3)
    return engine


@pytest.fixture
def saved(run_config: RunConfig) -> Path:
    return checkpoints(train(run_config("run")))[-1]


def test_the_model_of_a_checkpoint_is_the_trained_one(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config("model", {"tied": True, "scheme": {"name": "normformer"}})
    engine, tokens = stepped(config), torch.arange(24).view(2, 12)
    save_checkpoint(tmp_path, 5, engine, Corpus(config))
    loaded, its_config = load_checkpoint(checkpoints(tmp_path)[-1])
    assert its_config == config
    assert torch.equal(loaded(tokens), engine.models[0](tokens))


def test_resuming_restores_optimizer_and_random_state(run_config: RunConfig, saved: Path) -> None:
    config = run_config("run")
    torch.manual_seed(1)
    engine = build_engine(config, Mesh())
    assert resume(saved, engine, Corpus(engine.config)) == 8
    state = engine.optimizer.state[engine.pieces.tensors[0]]
    assert float(state["step"]) == 8 and state["exp_avg_sq"].abs().sum() > 0
    after = torch.get_rng_state()
    torch.manual_seed(config.train.seed)
    assert torch.equal(after, torch.get_rng_state()), "nothing in a run of this model draws random numbers"


def test_at_no_moment_is_there_half_a_checkpoint(run_config: RunConfig, tmp_path: Path) -> None:
    """Whatever stands under a checkpoint's name, while one is written and an older one removed, is complete."""
    config = run_config("atomic", {"n_layers": 30}, checkpoint={"keep_last": 1})
    engine = stepped(config)
    save_checkpoint(tmp_path, 1, engine, corpus := Corpus(config))
    files = {path.name for path in checkpoints(tmp_path)[-1].iterdir()}

    writer = Thread(target=lambda: [save_checkpoint(tmp_path, s, engine, corpus) for s in range(2, 40)])
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


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.safetensors", "data.json"])
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


def test_other_data_is_refused_unless_it_is_wanted(run_config: RunConfig, shard: str, tmp_path: Path) -> None:
    copy = str(tmp_path / "data")
    tokens = np.array(TokenShard(shard).tokens)

    def write(tokens: np.ndarray) -> None:
        with ShardWriter(copy, 257) as writer:
            writer.add_document(tokens)

    write(tokens)
    run = train(run_config("changed", data={"train": copy}))
    tokens[3] += 1
    write(tokens)
    longer = {"data": {"train": copy}, "train": {"steps": 9}}
    with pytest.raises(ConfigError, match=r"data\.train: .*data, sampled: the run to resume read '.*', now it is"):
        train(run_config("changed", **longer))
    longer["data"]["allow_changed"] = True
    train(run_config("changed", **longer))
    assert [path.name[-1] for path in checkpoints(run)] == ["8", "9"]
