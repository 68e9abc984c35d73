"""A model in the layout of megatron-core's GPTModel, whole: what its state dict is on one rank."""

import json
from pathlib import Path

from safetensors.torch import save_file

from nlm.config import Config, ConfigError
from nlm.export.architectures import MEGATRON, architecture_of, nested
from nlm.model import Transformer


def write(model: Transformer, config: Config, folder: Path) -> str:
    """-> by what it is loaded. Errors: ConfigError for a model that GPTModel cannot be."""
    architecture = architecture_of(config, model.scheme, MEGATRON)
    if architecture is None:
        raise ConfigError(
            [
                "--format megatron: GPTModel is Pre-LN with layernorm (and bias) or rmsnorm, softmax attention or "
                "rms_qknorm_head, gelu, relu, silu, swiglu or geglu, rope, learned or no positions, and no more than "
                "that; this model is another, export it as huggingface or torch"
            ]
        )
    table = nested(architecture.table(config) or {})
    (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    tensors = architecture.export_tensors(model.state_dict(), config.model)
    save_file(tensors, folder / "model.safetensors")
    return f"megatron.core {architecture.model_class}"
