"""Checkpoints: complete or not there at all.

A checkpoint is a folder `checkpoints/step-00000100/` with

    config.toml             the resolved config
    data.json               what the data was, and where streams stand
    model.safetensors       every parameter under its canonical name
    optimizer.safetensors   NAME.exp_avg and NAME.exp_avg_sq of every parameter
    state.safetensors       step [] (which is also the position in the data) and the RNG states

It is written beside its final name, flushed to the disk and renamed. Reading it executes no code.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nlm.build import build_model, load_config
from nlm.config import Config, ConfigError
from nlm.data.corpus import Corpus
from nlm.model import Held, Transformer, held
from nlm.parallel.engine import Engine

PARTIAL = ".partial-"


def save_checkpoint(run: Path, step: int, engine: Engine, corpus: Corpus) -> None:
    """Writes `run/checkpoints/step-…`, then removes all but the newest checkpoint.keep_last.

    All ranks give what they hold; the one that speaks writes it, the same whatever the layout.
    """
    model, optimizer = engine.pieces.gather(engine.pieces.tensors), _optimizer_state(engine)
    if not engine.mesh.speaks:
        return
    config, folder = engine.config, run / "checkpoints"
    final = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    (partial / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    data = {"fingerprint": corpus.fingerprint, "state": corpus.state()}
    (partial / "data.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    save_file(model, partial / "model.safetensors")
    save_file(optimizer, partial / "optimizer.safetensors")
    save_file({"step": torch.tensor(step), **_rng_state()}, partial / "state.safetensors")
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    partial.rename(final)
    _fsync(folder)
    for old in checkpoints(run)[: -config.checkpoint.keep_last]:
        shutil.rmtree(old.rename(folder / f"{PARTIAL}{old.name}"))  # nor is one half removed ever taken for whole


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def saved_step(path: Path) -> int:
    """The last step that went into a checkpoint."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: str | Path) -> tuple[Transformer, Config]:
    """The whole model of a checkpoint and its config. Errors: ValueError when it is missing or damaged."""
    path = Path(path)
    config = checkpoint_config(path)
    model = build_model(config)
    _restore_parameters(path, list(held(model)))
    return model, config


def checkpoint_config(path: Path) -> Config:
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint; give a folder like RUN/checkpoints/step-00000100")
    return load_config(path / "config.toml")


def resume(path: Path, engine: Engine, corpus: Corpus) -> int:
    """Puts everything back in place, in any layout, and returns the last finished step."""
    _restore_parameters(path, engine.pieces.held)
    corpus.load_state(_data(path)["state"])
    engine.start_after(saved_step(path))
    with _open(path / "optimizer.safetensors") as saved:
        for field, tensors in engine.moments().items():
            for h, tensor in zip(engine.pieces.held, tensors, strict=True):
                tensor.copy_(_part(saved, f"{h.name}.{field}", h))
    with _open(path / "state.safetensors") as extra:
        torch.set_rng_state(extra.get_tensor("rng_cpu"))
        if torch.cuda.is_available() and "rng_cuda" in extra.keys():  # noqa: SIM118, it is no mapping
            torch.cuda.set_rng_state(extra.get_tensor("rng_cuda"))
        return int(extra.get_tensor("step"))


def refuse_changed_model(path: Path, config: Config) -> None:
    """Errors: ConfigError naming every key that would make another model, or other data, of the checkpoint's run."""
    saved, now = checkpoint_config(path).model_dump(), config.model_dump()
    kept = [f"model.{key}" for key in saved["model"] | now["model"]]
    kept += ["train.seq_len", "train.batch_tokens", "train.seed", "data.train", "data.document_mask"]
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


def refuse_changed_data(path: Path, corpus: Corpus, config: Config) -> None:
    """Errors: ConfigError naming every source that is not what it was, unless data.allow_changed."""
    saved, now = _data(path)["fingerprint"], corpus.fingerprint
    if saved == now or config.data.allow_changed:
        return
    raise ConfigError(
        f"data.train: {where}: the run to resume read {was!r}, now it is {is_now!r}; bring the data back, "
        "or set data.allow_changed = true to go on with other data"
        for where, was, is_now in differences(saved, now)
    )


def differences(saved: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of JSON differ: the way there, and what either has."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in saved | now:
            yield from differences(saved.get(key), now.get(key), (*path, key))
    elif saved != now:
        yield ", ".join(path), saved, now


def _data(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "data.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}/data.json: missing or damaged ({error}); resume from an older checkpoint") from None


def _optimizer_state(engine: Engine) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": tensor
        for field, tensors in engine.moments().items()
        for name, tensor in engine.pieces.gather(tensors).items()
    }


def _rng_state() -> dict[str, Tensor]:
    cuda = {"rng_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"rng_cpu": torch.get_rng_state(), **cuda}


@torch.no_grad()
def _restore_parameters(path: Path, pieces: Sequence[Held]) -> None:
    with _open(path / "model.safetensors") as saved:
        if missing := sorted({h.name for h in pieces} - set(saved.keys())):
            raise ValueError(
                f"{path}: not a checkpoint of this model: it lacks {len(missing)} names, first {missing[0]}"
            )
        for h in pieces:
            h.tensor.copy_(_part(saved, h.name, h))


def _part(saved: Any, key: str, h: Held) -> Tensor:
    """What a rank holds of a tensor in the file, on the rank's device; no more than that is read."""
    tensor: Tensor = saved.get_slice(key)[h.slices]
    return tensor.to(h.tensor.device, h.tensor.dtype)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); resume from an older checkpoint") from None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
