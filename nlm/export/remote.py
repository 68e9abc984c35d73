"""A model as Hugging Face remote code: the code that bundle.py copies, and the weights under their own names."""

from typing import Any

from nlm.build import token_scale
from nlm.config import Config, ModelConfig
from nlm.export import bundle
from nlm.norms import NORMS
from nlm.schemes import SCHEMES
from nlm.scores import SCORES
from nlm.weight_norms import WEIGHT_NORMS

ENTRY = "modeling_nlm"
CLASS = "NLMForCausalLM"
PREFIX = "model."
"""Before each parameter's name."""


def code(model: ModelConfig) -> dict[str, str]:
    """File names -> texts."""
    parts: dict[str, Any] = {
        "scheme": SCHEMES[model.scheme.name],
        "norm": NORMS[model.norm.name],
        "score": SCORES[model.attention.score],
        "weight_norm": model.weight_norm and WEIGHT_NORMS[model.weight_norm.name],
        "slots": token_scale if NORMS[model.norm.name].token_scale else None,
    }
    imports = "".join(f"from {part.__module__} import {part.__name__}\n" for part in parts.values() if part)
    chosen = "".join(f"    {key} = {part.__name__ if part else None}\n" for key, part in parts.items())
    return bundle.bundle(
        ENTRY,
        '"""A model that nlm trained, with the parts that its config names; its code is beside this file."""\n'
        f"from nlm.export.modeling import NLMBase, NLMConfig\n{imports}\n\n"
        f"class {CLASS}(NLMBase):\n    config_class = NLMConfig\n{chosen}",
    )


def hf_config(config: Config) -> dict[str, Any]:
    """Of what config.json says of the architecture."""
    return {
        "model_type": "nlm",
        "architectures": [CLASS],
        "auto_map": {"AutoConfig": f"{ENTRY}.NLMConfig", "AutoModelForCausalLM": f"{ENTRY}.{CLASS}"},
        "model": config.model.model_dump(exclude_none=True),
        "seq_len": config.train.seq_len,
    }
