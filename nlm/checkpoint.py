"""Checkpoints: complete or not there at all, and written while training goes on.

A checkpoint is a folder `checkpoints/step-00000100/` with

    config.toml            the resolved config
    data.json              what the data was, and where streams stand
    state.safetensors      the random number generators, and by what the next steps are judged (see guard)
    tensors/               every parameter under its canonical name, its optimizer state as NAME.exp_avg … (see storage)
    checksums.json         SHA-256 of all of these

It is written beside its final name, flushed to the disk and renamed. Reading it executes no code.
"""

import hashlib
import json
import os
import shutil
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nlm.build import build_model, load_config
from nlm.config import Config, ConfigError
from nlm.data.corpus import Corpus
from nlm.data.pairs import PairCorpus
from nlm.guard import Guard
from nlm.model import Held, Transformer, held
from nlm.parallel.engine import Engine
from nlm.storage import Rectangle, read, write

T = TypeVar("T")
PARTIAL = ".partial-"
SUMS = "checksums.json"
TENSORS = "tensors"


class Checkpointer:
    """Writes the checkpoints of a run, one at a time, in a thread and process group of its own.

    A checkpoint that cannot be written is reported; the run goes on, and the older ones stay.
    """

    def __init__(self, run: Path, engine: Engine, corpus: Corpus | PairCorpus, guard: Guard) -> None:
        self.engine, self.corpus, self.guard = engine, corpus, guard
        self.folder = run / "checkpoints"
        self._group = dist.new_group(backend="gloo") if engine.mesh.device_mesh is not None else None
        self._thread = ThreadPoolExecutor(1)
        self._writing: tuple[int, float, Future[float]] | None = None
        self._failed: str | None = None
        self._copies: dict[str, Tensor] = {}

    def save(self, step: int) -> str | None:
        """Copies everything and begins to write it, when the checkpoint before is done -> what `finish` says of that.

        All ranks call it, after the same step.
        """
        said, began = self.finish(), time.perf_counter()
        rectangles = [self._copied(rectangle) for rectangle in _rectangles(self.engine)]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # Only the rank that speaks has read the streams; another would open them to say where it stands.
        files = self._files() if self.engine.mesh.speaks else {}
        writing = self._thread.submit(self._write, step, rectangles, files)
        self._writing = step, time.perf_counter() - began, writing
        return said

    def finish(self) -> str | None:
        """Waits for the checkpoint that is being written -> how that went, or None where there is none."""
        if self._writing is None:
            return None
        (step, paused, future), self._writing = self._writing, None
        if (error := future.exception()) is None:
            self._failed = None
            return f"checkpoint of step {step}: training paused {paused:.2f} s, written in {future.result():.1f} s"
        self._failed = f"the checkpoint of step {step} could not be written and is left out: {error}"
        return self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Errors: OSError when the last checkpoint of a run without error could not be written."""
        self.finish()
        self._thread.shutdown()
        if self._failed and kind is None:
            raise OSError(self._failed)

    def _copied(self, rectangle: Rectangle) -> Rectangle:
        """In CPU memory, the same at every save."""
        source = rectangle.tensor
        if rectangle.key not in self._copies:
            pinned = source.device.type == "cuda"
            self._copies[rectangle.key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
        copy = self._copies[rectangle.key].copy_(source, non_blocking=True)
        return replace(rectangle, tensor=copy)

    def _files(self) -> dict[str, bytes]:
        data = {"fingerprint": self.corpus.fingerprint, "state": self.corpus.state()}
        return {
            "config.toml": self.engine.config.to_toml().encode(),
            "data.json": json.dumps(data, indent=1).encode(),
            "state.safetensors": save(_rng_state() | self.guard.state()),
        }

    def _write(self, step: int, rectangles: list[Rectangle], files: dict[str, bytes]) -> float:
        """-> seconds."""
        began = time.perf_counter()
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f"{PARTIAL}{final.name}"
        speaks, rank = self.engine.mesh.speaks, 0 if self._group is None else self._group.rank()
        try:
            self._together(lambda: _begin(partial, files) if speaks else None)
            write(partial / TENSORS, rectangles, self._group)
            mine = f"shard-{rank + 1:05d}-*"
            sums = self._together(
                lambda: {f"{TENSORS}/{path.name}": _sha256(path) for path in (partial / TENSORS).glob(mine)}
            )
            sums.append({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
            self._together(lambda: self._publish(partial, final, dict(ChainMap(*sums))) if speaks else None)
            return time.perf_counter() - began
        except BaseException:
            if speaks:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, partial: Path, final: Path, sums: dict[str, str]) -> None:
        _publish(partial, final, sums)
        self._retire()

    def _retire(self) -> None:
        """Removes all but the newest keep_last, and every keep_every-th."""
        keep = self.engine.config.checkpoint
        for old in checkpoints(self.folder.parent)[: -keep.keep_last]:
            if not keep.keep_every or saved_step(old) % keep.keep_every:
                # Nor is one half removed ever taken for whole.
                shutil.rmtree(old.rename(self.folder / f"{PARTIAL}{old.name}"))

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What every rank makes of it. Errors, on all ranks: that of the lowest on which there is one."""
        if self._group is None:
            return [work()]
        try:
            mine: T | OSError = work()
        except OSError as error:
            mine = error
        results: list[Any] = [None] * self._group.size()
        dist.all_gather_object(results, mine, group=self._group)
        for result in results:
            if isinstance(result, OSError):
                raise result
        return results


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def saved_step(path: Path) -> int:
    """The last step that went into a checkpoint."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> None:
    """Reads all of a checkpoint. Errors: ValueError naming every file that is missing or not what was written."""
    checkpoint_config(path)
    sums = _json(path / SUMS)
    bad = [name for name, expected in sums.items() if not (path / name).is_file() or _sha256(path / name) != expected]
    if bad:
        raise ValueError(f"{path}: missing or damaged: {', '.join(bad)}; use an older checkpoint")


def load_checkpoint(path: str | Path) -> tuple[Transformer, Config]:
    """The whole model of a checkpoint and its config. Errors: ValueError when it is missing or damaged."""
    path = Path(path)
    config = checkpoint_config(path)
    model = build_model(config)
    read_model(path, model)
    return model.eval(), config


def read_model(path: Path, model: Transformer) -> None:
    """Fills what this rank holds of a model, in any layout. Errors: ValueError when it is missing or damaged."""
    _read(path, _tensors(model))


def save_checkpoint(path: str | Path, model: Transformer, config: Config) -> None:
    """A whole model alone, for `load_checkpoint`: no run goes on from it. Errors: ValueError where something is."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: expected a folder that is not there yet; remove it, or write elsewhere")
    partial = path.parent / f"{PARTIAL}{path.name}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / TENSORS).mkdir(parents=True)
    _store(partial / "config.toml", config.to_toml().encode())
    write(partial / TENSORS, _tensors(model), None)
    files = [partial / "config.toml", *(partial / TENSORS).iterdir()]
    _publish(partial, path, {str(file.relative_to(partial)): _sha256(file) for file in files})


def checkpoint_config(path: Path) -> Config:
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint; give a folder like RUN/checkpoints/step-00000100")
    return load_config(path / "config.toml")


def resume(path: Path, engine: Engine, corpus: Corpus | PairCorpus, guard: Guard) -> int:
    """Puts everything back in place, in any layout, and returns the last finished step."""
    try:
        state = load_file(path / "state.safetensors")
        guard.load_state(state)
        torch.set_rng_state(state["rng_cpu"])
        if torch.cuda.is_available() and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"])
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(path / "state.safetensors", error) from error
    pieces = engine.pieces.held
    _read(path, [_rectangle(h.name, h, h.tensor) for h in pieces])
    engine.start_after(guard.updates)
    own = map(_state, pieces, engine.optimizer.state)
    _read(path, [*chain.from_iterable(own), *_shared(engine)])
    engine.goes_on()
    corpus.load_state(_json(path / "data.json")["state"])
    return saved_step(path)


def start_from(path: Path, engine: Engine) -> None:
    """Puts the weights of a checkpoint, which may have nothing else, into a run that begins, in any layout."""
    pieces = engine.pieces.held
    buffers = (_whole(name, tensor) for name, tensor in engine.model_state.items())
    _read(path, [*(_rectangle(h.name, h, h.tensor) for h in pieces), *buffers])
    engine.start_after(0)
    engine.goes_on()


def refuse_other_model(path: Path, config: Config) -> None:
    """Errors: ConfigError naming every key that makes another model than the checkpoint's of what is to start from."""
    saved, now = checkpoint_config(path), config
    was, is_now = (c.model.model_dump() | {"seq_len": c.train.seq_len} for c in (saved, now))
    left_open = {"init", "stochastic_depth"} | ({"seq_len"} if now.model.position != "learned" else set())
    problems = [
        f"{'train' if key == 'seq_len' else 'model'}.{key}: train.start has {was[key]!r}, the config {is_now[key]!r}; "
        "set it to that, or start from another checkpoint"
        for key in was
        if was[key] != is_now[key] and key not in left_open
    ]
    if problems:
        raise ConfigError(problems)


def refuse_changed_model(path: Path, config: Config) -> None:
    """Errors: ConfigError naming every key that would make another model, or other data, of the checkpoint's run."""
    saved, now = checkpoint_config(path).model_dump(), config.model_dump()
    kept = [f"model.{key}" for key in saved["model"] | now["model"]]
    kept += ["optim.name", "optim.continual_backprop"]
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


def refuse_changed_data(path: Path, corpus: Corpus | PairCorpus, config: Config) -> None:
    """Errors: ConfigError naming every source that is not what it was, unless data.allow_changed."""
    saved, now = _json(path / "data.json")["fingerprint"], corpus.fingerprint
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


def _tensors(model: Transformer) -> list[Rectangle]:
    """What this rank holds of a model's parameters and buffers, without optimizer state."""
    parameters = {h.name: h for h in held(model)}
    tensors = [_rectangle(name, h, h.tensor) for name, h in parameters.items()]
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            owner, _, buffer = name.rpartition(".")
            (span,) = model.get_submodule(owner).spans[buffer]  # type: ignore[index, misc]
            tensors.append(Rectangle(name, (span.full,), (span.start,), tensor))
    return tensors


def _rectangles(engine: Engine) -> Iterator[Rectangle]:
    """What this rank stands for, of the parameters and of their optimizer state."""
    for i in engine.pieces.counted:
        h = engine.pieces.held[i]
        yield _rectangle(h.name, h, h.tensor)
        yield from _state(h, engine.optimizer.state[i])
    if engine.mesh.speaks:
        yield from _shared(engine)


def _state(h: Held, state: Mapping[str, Tensor]) -> Iterator[Rectangle]:
    return (_rectangle(f"{h.name}.{field}", h, tensor) for field, tensor in state.items())


def _shared(engine: Engine) -> Iterator[Rectangle]:
    """The state that every rank has as a whole."""
    return (_whole(name, tensor) for name, tensor in engine.shared.items())


def _whole(name: str, tensor: Tensor) -> Rectangle:
    return Rectangle(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def _rectangle(name: str, h: Held, tensor: Tensor) -> Rectangle:
    return Rectangle(name, h.weight.shape, tuple(span.start for span in h.spans), tensor)


def _read(path: Path, rectangles: list[Rectangle]) -> None:
    try:
        read(path / TENSORS, rectangles)
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: missing or damaged ({error}); resume from an older checkpoint")


def _rng_state() -> dict[str, Tensor]:
    cuda = {"rng_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"rng_cpu": torch.get_rng_state(), **cuda}


def _begin(partial: Path, files: dict[str, bytes]) -> None:
    for leftover in partial.parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)
    (partial / TENSORS).mkdir(parents=True)
    for name, content in files.items():
        _store(partial / name, content)


def _publish(partial: Path, final: Path, sums: dict[str, str]) -> None:
    """Under its own name, now that all of it is there."""
    _store(partial / SUMS, json.dumps(sums, indent=1, sort_keys=True).encode())
    _sync(partial / TENSORS)
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)


def _store(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
