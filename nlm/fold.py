"""Folding: what is linear in the norms of the stream goes into the linear layers that read them.

W (γ n(x) + b) + c = (W diag γ) n(x) + (c + W b). Where n takes out the mean, W diag γ may do that in its place.
"""

from typing import NamedTuple

import torch

from nlm.anatomy import READS, Site
from nlm.build import build_model, parse_config
from nlm.config import Config, ConfigError
from nlm.model import Linear, Transformer, held


class Reading(NamedTuple):
    """A norm of the stream, and the linear layers that read it and nothing else, by name; where they are."""

    site: Site
    norm: str
    linears: tuple[str, ...]


def readings(model: Transformer) -> list[Reading]:
    """Of all norms of the stream, in their order; the last is the head's, even where that is the embedding's table.

    Errors: ConfigError for a scheme that has other norms, or puts them elsewhere.
    """
    if model.encoder is not None:
        raise ConfigError(
            [
                "model.architecture: expected 'decoder' or 'encoder'; of an encoder_decoder, keys and values are "
                "not of what the norm before them gives"
            ]
        )
    if not model.scheme.folds:
        raise ConfigError(
            [
                "model.scheme.name: expected a scheme whose norms are read by linear layers alone, f(norm(x)) and the "
                f"head, got {model.config.scheme.name!r}, in which they are not linear even if nothing is divided; "
                "`nlm remove-norms` and `nlm fold-norms` are for Pre-LN and its kin"
            ]
        )
    found = []
    for layer, block in model.blocks.items():
        for name in block.names:  # type: ignore[union-attr]
            sublayer = getattr(block, name)
            linears = tuple(
                f"blocks.{layer}.{name}.{child}"
                for child, linear in sublayer.named_children()
                if isinstance(linear, Linear) and linear.roles["weight"] in READS
            )
            found.append(Reading(sublayer.site, f"blocks.{layer}.{name}_residual.norm", linears))
    return [*found, Reading(model.design.site(0, "stack"), "final", ("head",))]


@torch.no_grad()
def folded(model: Transformer, config: Config) -> tuple[Transformer, Config]:
    """A model of the same logits whose norms have neither gain nor bias or, of frozen norms, that has none; its config.

    Linear layers get biases where the norms had some, a tied head becomes a matrix of its own, and weight norms their
    result. The tensors are new, in the precision of the model's; the products are taken in float64.

    Errors: ConfigError for a scheme or norm that does not fold.
    """
    fields = dict(config.model.norm.fields)
    one_plus = fields.pop("one_plus", False)
    match config.model.norm.name:
        case "layernorm" | "rmsnorm" as name if fields.get("gain", True):
            norm = fields | {"name": name, "gain": False}
        case "frozen_layernorm" | "frozen_rmsnorm" as name:
            norm = {"name": "none"}
        case name:
            raise ConfigError(
                [
                    "model.norm: expected layernorm, rmsnorm, frozen_layernorm or frozen_rmsnorm with a gain to fold, "
                    f"got {name!r}" + (", whose gain is folded already" if "gain" in fields else "")
                ]
            )
    tensors = {h.name: h.tensor for h in held(model)}
    for prefix, module in model.named_modules():
        if (weight_norm := getattr(module, "weight_norm", None)) is not None:
            tensors[f"{prefix}.weight"] = weight_norm(module.weight)
    if config.model.tied:
        tensors["head.weight"] = tensors["embed.weight"]
    for reading in readings(model):
        gain = tensors[f"{reading.norm}.weight"].double() + one_plus
        bias = tensors.get(f"{reading.norm}.bias")
        for linear in reading.linears:
            matrix = tensors[f"{linear}.weight"].double()
            if bias is not None:
                own = tensors.get(f"{linear}.bias")
                tensors[f"{linear}.bias"] = matrix @ bias.double() + (0 if own is None else own)
            matrix = matrix * gain
            centred = name.endswith("layernorm")
            tensors[f"{linear}.weight"] = matrix - matrix.mean(1, keepdim=True) if centred else matrix

    table = config.model_dump(exclude_none=True)
    table["model"] |= {"norm": norm, "tied": False, "head_bias": "head.bias" in tensors}
    table["model"].pop("weight_norm", None)
    config = parse_config(table)
    result = build_model(config).to(tensors["embed.weight"].dtype)
    for h in held(result):
        h.tensor.copy_(tensors[h.name])
    return result, config


@torch.no_grad()
def difference(model: Transformer, other: Transformer, seq_len: int) -> float:
    """Of the logits for `seq_len` random tokens, the largest, relative to their standard deviation."""
    tokens = torch.randint(model.config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    return float((other(tokens) - logits).abs().max() / logits.std())
