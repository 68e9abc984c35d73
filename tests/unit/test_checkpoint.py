"""Checkpoints: what they hold, and that a damaged or foreign one is refused by name."""

import errno
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

from nlm import load_checkpoint
from nlm.build import build_engine
from nlm.checkpoint import Checkpointer, checkpoints, refuse_changed_model, resume, verify
from nlm.config import Config, ConfigError
from nlm.data import ShardWriter, TokenShard
from nlm.data.corpus import Corpus
from nlm.guard import Guard
from nlm.mesh import Mesh
from nlm.parallel.engine import Engine
from nlm.storage import read_all, write
from nlm.train import train

RunConfig = Callable[..., Config]


def guard(config: Config) -> Guard:
    return Guard(config.faults, torch.device("cpu"))


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
    with Checkpointer(tmp_path, engine, Corpus(config), guard(config)) as checkpointer:
        checkpointer.save(5)
    loaded, its_config = load_checkpoint(checkpoints(tmp_path)[-1])
    assert its_config == config
    assert torch.equal(loaded(tokens), engine.models[0](tokens))


def test_resuming_restores_optimizer_and_random_state(run_config: RunConfig, saved: Path) -> None:
    config = run_config("run")
    torch.manual_seed(1)
    engine = build_engine(config, Mesh())
    assert resume(saved, engine, Corpus(config), guard(config)) == 8
    state = engine.optimizer.adamw.state[engine.pieces.tensors[0]]
    assert float(state["step"]) == 8 and state["exp_avg_sq"].abs().sum() > 0
    after = torch.get_rng_state()
    torch.manual_seed(config.train.seed)
    assert torch.equal(after, torch.get_rng_state()), "nothing in a run of this model draws random numbers"


def files_of(checkpoint: Path) -> set[str]:
    return {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")}


def test_at_no_moment_is_there_half_a_checkpoint(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config("atomic", checkpoint={"keep_last": 1})
    with Checkpointer(tmp_path, stepped(config), Corpus(config), guard(config)) as checkpointer:
        checkpointer.save(1)
        assert re.fullmatch(
            r"checkpoint of step 1: training paused \d\.\d\d s, written in \d\.\d s", checkpointer.finish() or ""
        )
        files = files_of(checkpoints(tmp_path)[-1])
        assert {"config.toml", "data.json", "state.safetensors", "checksums.json"} < files
        looks = 0
        for step in range(2, 40):
            checkpointer.save(step)
            while not checkpointer._writing[-1].done():
                for path in checkpoints(tmp_path):
                    with suppress(FileNotFoundError):  # renamed since it was listed
                        found = files_of(path)
                        assert found == files or not path.exists(), f"{path.name} has only {found}"
                        looks += 1
    assert looks > 100 and len(checkpoints(tmp_path)) == 1


def test_what_is_written_is_what_was_there_when_it_began(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though training has gone on meanwhile."""
    config = run_config("meanwhile")
    engine = stepped(config)
    before = {h.name: h.tensor.clone() for h in engine.pieces.held}
    go_on = Event()
    monkeypatch.setattr("nlm.checkpoint.write", lambda *args: go_on.wait() and write(*args))
    with Checkpointer(tmp_path, engine, Corpus(config), guard(config)) as checkpointer:
        checkpointer.save(1)
        for tensor in engine.pieces.tensors:
            tensor.zero_()
        assert not checkpoints(tmp_path)
        go_on.set()
    found = read_all(checkpoints(tmp_path)[-1] / "tensors")
    assert len(found) == 3 * len(before)
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor)


def test_the_newest_and_every_so_many_are_kept(run_config: RunConfig) -> None:
    run = train(run_config("kept", checkpoint={"every": 1, "keep_last": 2, "keep_every": 3}))
    assert [path.name[-1] for path in checkpoints(run)] == ["3", "6", "7", "8"]


FILES = ["state.safetensors", "data.json", "tensors/shard-00001-model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(file: str, damage: str, saved: Path, run_config: RunConfig) -> None:
    verify(saved)
    path = saved / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    config = run_config("run", train={"steps": 9})
    with pytest.raises(ValueError, match=r"missing or damaged .* resume from an older checkpoint"):
        train(config)
    with pytest.raises(ValueError, match=f"missing or damaged: {file}; use an older checkpoint"):
        verify(saved)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", ["pickle", "a header without end"])
def test_a_hostile_checkpoint_is_refused_and_none_of_it_executed(
    file: str, content: str, saved: Path, run_config: RunConfig, tmp_path: Path
) -> None:
    if content == "pickle":
        torch.save({"rng_cpu": Bomb(tmp_path / "executed")}, saved / file)
    else:
        (saved / file).write_bytes((2**60).to_bytes(8, "little") + b'{"a": {"dtype": "F32"')
    with pytest.raises(ValueError, match=r"missing or damaged .* resume from an older checkpoint"):
        train(run_config("run", train={"steps": 9}))
    with pytest.raises(ValueError, match=f"missing or damaged: {file}"):
        verify(saved)
    assert not (tmp_path / "executed").exists()


def test_one_changed_bit_is_found(saved: Path) -> None:
    path = saved / FILES[-1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"missing or damaged: {FILES[-1]}"):
        verify(saved)


def test_a_disk_that_is_full_costs_one_checkpoint_and_not_the_run(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path, *args: object) -> None:
        if folder.parent.name.endswith("4"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, *args)

    monkeypatch.setattr("nlm.checkpoint.write", full)
    run = train(run_config("full", checkpoint={"every": 2, "keep_last": 9}))
    assert [path.name[-1] for path in checkpoints(run)] == ["2", "6", "8"]
    assert (
        "the checkpoint of step 4 could not be written and is left out: [Errno 28] No space" in capsys.readouterr().out
    )
    assert not list((run / "checkpoints").glob(".partial*"))


def test_a_run_whose_last_checkpoint_fails_is_no_success(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nlm.checkpoint.write", full)
    with pytest.raises(OSError, match="the checkpoint of step 8 could not be written"):
        train(run_config("full"))


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
