"""A model as a folder that transformers loads offline, and such a folder as a model. transformers is not needed."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nlm.build import build_model, parse_config
from nlm.config import Config, ConfigError, Table, overridden
from nlm.export import remote
from nlm.export.architectures import HUGGING_FACE, architecture_of, dotted, nested
from nlm.export.tokenizer import write_tokenizer
from nlm.model import Transformer

FILE_BYTES = 5 * 10**9
WEIGHTS = "model.safetensors"
FORMER = {"rope_theta": "rope_parameters.rope_theta", "partial_rotary_factor": "rope_parameters.partial_rotary_factor"}
"""Keys of transformers 4, as 5 calls them."""
UNTRAINED = {"steps": 1, "lr": 1e-4, "data": "none"}
"""What a config must say of training, where nobody has said it."""


def write(model: Transformer, config: Config, tokenizer: str | None, folder: Path) -> str:
    """-> by which class transformers will load it. Errors: ValueError for an encoder, and as of `write_tokenizer`."""
    if (kind := config.model.architecture) != "decoder":
        raise ConfigError([f"model.architecture: expected 'decoder', got {kind!r}; use --format torch"])
    native = architecture_of(config, model.scheme, HUGGING_FACE)
    tensors = model.state_dict()
    if native is not None:
        about = {"architectures": [native.model_class], "model_type": native.name, **nested(native.table(config) or {})}
        tensors = native.export_tensors(tensors, config.model)
    else:
        about = remote.hf_config(config)
        tensors = {f"{remote.PREFIX}{name}": tensor for name, tensor in tensors.items()}
        for name, text in remote.code(config.model).items():
            (folder / name).write_text(text, encoding="utf-8")
    eod = None if tokenizer is None else write_tokenizer(tokenizer, folder)
    ends = {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": None}
    _json(folder / "config.json", about | ends | {"dtype": "float32"})
    # Of remote code nothing is cached between tokens.
    _json(folder / "generation_config.json", ends | {"use_cache": native is not None})
    save_torch_state_dict(tensors, folder, max_shard_size=FILE_BYTES)
    return native.model_class if native is not None else f"{remote.CLASS}, trust_remote_code=True"


def read(folder: Path, overrides: list[str]) -> tuple[Transformer, Config]:
    """The model of a folder, its config with the overrides.

    Errors: ValueError naming every key and tensor that nlm has nothing for.
    """
    table = _read_json(folder / "config.json")
    kinds = {architecture.name: architecture for architecture in HUGGING_FACE}
    if (kind := table.get("model_type")) not in kinds:
        raise ValueError(f"{folder}: expected a model of {', '.join(kinds)}, got model_type {kind!r}")
    architecture = kinds[kind]
    flat = {FORMER.get(key, key): value for key, value in dotted(table)}
    if set(flat.pop("layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ConfigError(["layer_types: expected full attention in all layers, nlm has no other"])
    try:
        model, seq_len = architecture.model(flat)
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json: {problem}" for problem in error.problems) from None
    usual: Table = {
        "model": model | {"scheme": architecture.scheme},
        "train": {"steps": UNTRAINED["steps"], "batch_tokens": seq_len, "seq_len": seq_len},
        "optim": {"lr": UNTRAINED["lr"]},
        "data": {"train": UNTRAINED["data"]},
        "log": {"dir": f"runs/{folder.name}"},
    }
    config = parse_config(overridden(usual, overrides))
    result = build_model(config)
    tensors = _tensors(folder)
    with torch.no_grad():
        architecture.import_tensors(tensors, result.state_dict(), config.model)
    return result.eval(), config


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Of one file, or of those that an index names."""
    index = folder / f"{WEIGHTS}.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / file}: expected a file of safetensors; {error}") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a file of JSON, as transformers writes it; {error}") from error


def _json(path: Path, table: Table) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
