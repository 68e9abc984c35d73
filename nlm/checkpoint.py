"""Checkpoints: complete or not there at all.

A checkpoint is a folder `checkpoints/step-00000100/` with

    config.toml             the resolved config
    model.safetensors       every parameter under its canonical name
    optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq, NAME.step of every parameter
    state.safetensors       step [] (which is also the position in the data) and the RNG states

It is written beside its final name, flushed to the disk and renamed. Reading it executes no code.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nlm.build import build_model, load_config
from nlm.config import Config, ConfigError
from nlm.model import Transformer, weights

PARTIAL = ".partial-"


def save_checkpoint(run: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, config: Config) -> Path:
    """Writes `run/checkpoints/step-…`, then removes all but the newest checkpoint.keep_last."""
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    (partial / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    save_file(_parameters(model), partial / "model.safetensors")
    save_file(_optimizer_state(model, optimizer), partial / "optimizer.safetensors")
    save_file({"step": torch.tensor(step), **_rng_state()}, partial / "state.safetensors")
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    partial.rename(final)
    _fsync(folder)
    for old in checkpoints(run)[: -config.checkpoint.keep_last]:
        shutil.rmtree(old.rename(folder / f"{PARTIAL}{old.name}"))  # nor is one half removed ever taken for whole
    return final


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def saved_step(path: Path) -> int:
    """The last step that went into a checkpoint."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: str | Path) -> tuple[Transformer, Config]:
    """The model of a checkpoint and its config. Errors: ValueError when it is missing or damaged."""
    path = Path(path)
    config = checkpoint_config(path)
    model = build_model(config)
    _restore_parameters(path, model)
    return model, config


def checkpoint_config(path: Path) -> Config:
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint; give a folder like RUN/checkpoints/step-00000100")
    return load_config(path / "config.toml")


def resume(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    """Puts everything back in place and returns the last finished step."""
    _restore_parameters(path, model)
    state = _read(path / "optimizer.safetensors")
    parameters = {name: parameter for name, parameter, _ in weights(model)}
    for key, tensor in state.items():
        name, _, field = key.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][field] = tensor.to(parameter.device)
    extra = _read(path / "state.safetensors")
    torch.set_rng_state(extra["rng_cpu"])
    if torch.cuda.is_available() and "rng_cuda" in extra:
        torch.cuda.set_rng_state(extra["rng_cuda"])
    return int(extra["step"])


def refuse_changed_model(path: Path, config: Config) -> None:
    """Errors: ConfigError naming every key that would make another model, or other data, of the checkpoint's run."""
    saved, now = checkpoint_config(path).model_dump(), config.model_dump()
    kept = [f"model.{key}" for key in saved["model"] | now["model"]]
    kept += ["train.seq_len", "train.batch_tokens", "train.seed", "data.train"]
    problems = []
    for key in kept:
        section, _, name = key.partition(".")
        was, is_now = saved[section].get(name), now[section].get(name)
        if was != is_now:
            problems.append(
                f"{key}: the run to resume has {was!r}, the config {is_now!r}; "
                f"set it back, or start a new run with another log.dir"
            )
    if problems:
        raise ConfigError(problems)


def _parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter, _ in weights(model)}


def _optimizer_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": tensor
        for name, parameter, _ in weights(model)
        for field, tensor in optimizer.state[parameter].items()
    }


def _rng_state() -> dict[str, Tensor]:
    cuda = {"rng_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"rng_cpu": torch.get_rng_state(), **cuda}


@torch.no_grad()
def _restore_parameters(path: Path, model: Transformer) -> None:
    saved = _read(path / "model.safetensors")
    parameters = _parameters(model)
    if saved.keys() != parameters.keys():
        differ = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(f"{path}: not a checkpoint of this model: {len(differ)} names differ, first {differ[0]}")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); resume from an older checkpoint") from None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
