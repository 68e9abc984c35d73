"""Checkpoints, one after another, into a model that only evaluates, in a layout of its own."""

from collections.abc import Iterable
from pathlib import Path

from nlm.build import build_inference, parse_config
from nlm.checkpoint import checkpoint_config, checkpoints, read_model
from nlm.config import Config, ConfigError, read_table
from nlm.mesh import Mesh
from nlm.parallel.engine import Inference

LAYOUT = {
    *("dp_replicate", "dp_shard", "tp", "sequence_parallel", "blocks_per_unit", "reshard"),
    *("compile", "kernels", "loss_rows"),
}
"""What of [parallel] says how a model is evaluated."""


def chosen(paths: Iterable[Path]) -> list[Path]:
    """Checkpoints, those of a run oldest first. Errors: ValueError for a path that is none, and has none."""
    found: list[Path] = []
    for path in paths:
        if (path / "config.toml").exists() and not (path / "tensors").exists():
            if not checkpoints(path):
                raise ValueError(f"{path}: a run without a checkpoint; wait for one, or train on to its end")
            found += checkpoints(path)
        else:
            checkpoint_config(path)
            found.append(path)
    return found


def evaluation_config(checkpoint: Path, overrides: Iterable[str] = (), rows: int | None = None) -> Config:
    """A checkpoint's config in one process and float32, unless `overrides` say otherwise. A rank takes `rows` at a
    time, by default those of a microbatch of the training.

    Errors: ConfigError for a config that does not fit, and for overrides of what is not for evaluation.
    """
    before, overrides = checkpoint_config(checkpoint), list(overrides)
    asked = read_table(path := checkpoint / "config.toml", ["train.precision=fp32", *overrides])
    keys = [override.partition("=")[0] for override in overrides]
    allowed = {"train.precision", *(f"parallel.{key}" for key in LAYOUT)}
    if strange := [key for key in keys if key not in allowed]:
        raise ConfigError(f"{key}: not for evaluation; expected one of {', '.join(sorted(allowed))}" for key in strange)
    table = read_table(path) | {
        "parallel": {key: asked["parallel"][key] for key in LAYOUT if f"parallel.{key}" in keys}
    }
    if rows is None:
        rows = max(1, before.batch_rows // before.parallel.data_ranks // before.parallel.microbatches)
    elif rows < 1:
        raise ConfigError([f"--rows: expected at least 1, got {rows}"])
    ranks = [table["parallel"].get(key, 1) for key in ("dp_replicate", "dp_shard")]
    n_ranks = ranks[0] * ranks[1] if all(isinstance(size, int) and size > 0 for size in ranks) else 1
    batch_tokens = rows * n_ranks * before.train.seq_len
    table["train"] |= {"precision": asked["train"]["precision"], "batch_tokens": batch_tokens}
    table.pop("statistics", None)  # of the batches of training
    return parse_config(table)


class Loader:
    """The model of the last checkpoint, into which the next is read where it is the same."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._inference: Inference | None = None

    def load(self, checkpoint: Path, config: Config) -> Inference:
        """Errors: ValueError when it is missing or damaged."""
        last = self._inference
        if last is None or (last.config.model, last.config.train) != (config.model, config.train):
            self._inference = last = None  # before there is another
            last = build_inference(config, self.mesh)
        last.config = config
        read_model(checkpoint, last.models[0])
        self._inference = last
        return last
