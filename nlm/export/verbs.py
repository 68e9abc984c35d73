"""`nlm export` and `nlm import`."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save_file

from nlm.checkpoint import load_checkpoint, save_checkpoint
from nlm.config import Config
from nlm.data.lookup import find_tokenizer
from nlm.export import huggingface, megatron
from nlm.model import Transformer


def export(checkpoint: str | Path, out: str | Path, format: str = "huggingface", tokenizer: str | None = None) -> str:
    """Writes the model of a checkpoint into the folder `out`, which is there whole or not at all -> how to load it.

    `tokenizer` is that of a Hugging Face folder, "none" for none, by default the training data's.

    Errors: ValueError for what the format cannot have, and a folder that is there already.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: expected a folder that is not there yet; remove it, or write elsewhere")
    model, config = load_checkpoint(checkpoint)
    write: dict[str, Callable[[Path], str]] = {
        "huggingface": lambda folder: _huggingface(model, config, tokenizer, folder),
        "megatron": lambda folder: megatron.write(model, config, folder),
        "torch": lambda folder: _torch(model, config, folder),
    }
    if format not in write:
        raise ValueError(f"--format: expected one of {', '.join(write)}, got {format!r}")
    partial = out.parent / f".partial-{out.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        said = write[format](partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return said


def import_folder(folder: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> None:
    """A Hugging Face folder as a checkpoint of a model alone. Errors: ValueError, as of `huggingface.read`."""
    save_checkpoint(out, *huggingface.read(Path(folder), list(overrides)))


def _huggingface(model: Transformer, config: Config, tokenizer: str | None, folder: Path) -> str:
    spec = find_tokenizer(config.data) if tokenizer is None else None if tokenizer == "none" else tokenizer
    return huggingface.write(model, config, spec, folder)


def _torch(model: Transformer, config: Config, folder: Path) -> str:
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / huggingface.WEIGHTS)
    return "safetensors.torch.load_file"
