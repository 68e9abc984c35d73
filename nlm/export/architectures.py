"""Which models of nlm are models that others have too, and how the two are called: one table for both directions.

A row says what a model's config must be there and what here, and where each tensor lies. A model of nlm is one of
theirs if its config, written their way and read back, is what it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlm.config import Config, ConfigError, ModelConfig, Table, dotted
from nlm.schemes import SCHEMES
from nlm.schemes.base import NormPlace, Scheme

TRAINING = {"scheme", "init", "stochastic_depth"}
"""Keys of [model] that change no logit; of the scheme, where its norms stand is compared."""


@dataclass(frozen=True)
class Values:
    """Their values of one of our keys, by ours."""

    key: str
    theirs: Mapping[Any, Any]


@dataclass(frozen=True)
class Is:
    """A key of theirs that can have this value only."""

    value: Any


@dataclass(frozen=True)
class Joined:
    """Several of our matrices in one of theirs, one below the other. `by_head`: not all of a matrix, but what of each
    belongs to the first key-value head, then to the second, and so on."""

    parts: tuple[str, ...]
    by_head: bool = False

    def join(self, tensors: Sequence[Tensor], n_kv_heads: int) -> Tensor:
        groups = n_kv_heads if self.by_head else 1
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], 1).flatten(0, 1)

    def divide(self, whole: Tensor, rows: Sequence[int], n_kv_heads: int) -> list[Tensor]:
        groups = n_kv_heads if self.by_head else 1
        parts = whole.unflatten(0, (groups, -1)).split([n // groups for n in rows], 1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """`fields`: their keys, dotted, and what of [model] each is, or `seq_len`; `ours`: what else our config must be.

    `modules` are their modules and which of ours each is, `{l}` the layer; those in `transposed` have matrices
    [in, out]. `absent` says what a key means that a config of theirs leaves out, `only` what others must be where they
    are there, and `idle` names those that change no logit.
    """

    model_class: str
    norms: NormPlace
    fields: Mapping[str, str | Values | Is]
    ours: Table
    modules: Mapping[str, str | Joined]
    transposed: frozenset[str] = frozenset()
    absent: Table = field(default_factory=dict)
    only: Table = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """As transformers calls the type of the model."""
        return self.model_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel").lower()

    def table(self, config: Config) -> Table | None:
        """Their config, its keys dotted, of one of ours; None where it has no such values."""
        have = dict(config.model) | {"seq_len": config.train.seq_len}
        table: Table = {}
        for key, is_ours in self.fields.items():
            if isinstance(is_ours, Is):
                table[key] = is_ours.value
            elif isinstance(is_ours, Values):
                if have[is_ours.key] not in is_ours.theirs:
                    return None
                table[key] = is_ours.theirs[have[is_ours.key]]
            else:
                table[key] = have[is_ours]
        return table

    def model(self, table: Mapping[str, Any]) -> tuple[Table, int]:
        """Our [model], its scheme left out, and seq_len, of their config with dotted keys.

        Errors: ConfigError naming every key that is missing, unknown, or makes another model.
        """
        ours, problems = dict(self.ours), []
        for key, expected in self.only.items():
            if key in table and table[key] != expected:
                problems.append(f"{key}: expected {expected!r}, got {table[key]!r}, for which nlm has nothing")
        problems += [
            f"{key}: not known of {self.name!r}, and it might change the model; got {table[key]!r}"
            for key in table.keys() - self.fields.keys() - self.only.keys() - self.idle
        ]
        for key, is_ours in self.fields.items():
            if key not in table and key not in self.absent:
                problems.append(f"{key}: missing")
                continue
            value = table.get(key, self.absent.get(key))
            if isinstance(is_ours, Is):
                if value != is_ours.value:
                    problems.append(f"{key}: expected {is_ours.value!r}, got {value!r}, for which nlm has nothing")
                continue
            if value is None and self.absent.get(key, 0) is None:  # what they derive is derived here, in the same way
                continue
            name = is_ours.key if isinstance(is_ours, Values) else is_ours
            if isinstance(is_ours, Values):
                mine = [ours_ for ours_, theirs in is_ours.theirs.items() if theirs == value]
                if not mine:
                    problems.append(f"{key}: expected one of {[*is_ours.theirs.values()]}, got {value!r}")
                    continue
                (value,) = mine
            if value is None or ours.setdefault(name, value) != value:
                expected = "a value" if value is None else f"{ours[name]!r}, as others say of model.{name}"
                problems.append(f"{key}: expected {expected}, got {value!r}")
        if problems:
            raise ConfigError(problems)
        return ours, ours.pop("seq_len")

    def is_that_of(self, config: Config, scheme: Scheme) -> bool:
        """Whether it is the same function of the same weights."""
        table = self.table(config)
        if scheme.norm_place != self.norms or table is None or config.model.dim % config.model.n_heads:
            return False
        try:
            again, _ = self.model(table)
        except ConfigError:
            return False
        read = ModelConfig.model_validate(again | {"scheme": self.scheme})
        return read.model_dump(exclude=TRAINING) == config.model.model_dump(exclude=TRAINING)

    @property
    def scheme(self) -> Table:
        """The first of our schemes whose norms stand there."""
        return {"name": next(name for name, scheme in SCHEMES.items() if scheme().norm_place == self.norms)}

    def tensors(self, ours: Mapping[str, Tensor], n_layers: int) -> Iterator[tuple[str, Joined, bool]]:
        """Their names, and for each which of ours it is, and whether it is transposed."""
        for theirs, module in self.modules.items():
            joined = Joined((module,)) if isinstance(module, str) else module
            for layer in range(n_layers if "{l}" in theirs else 1):
                for suffix in ("weight", "bias"):
                    parts = tuple(f"{part.format(l=layer)}.{suffix}" for part in joined.parts)
                    if parts[0] in ours:
                        turned = theirs in self.transposed and suffix == "weight"
                        yield f"{theirs.format(l=layer)}.{suffix}", Joined(parts, joined.by_head), turned

    def export_tensors(self, ours: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
        theirs, seen = {}, set[str]()
        for name, joined, turned in self.tensors(ours, model.n_layers):
            whole = joined.join([ours[part] for part in joined.parts], model.n_kv_heads)
            theirs[name] = (whole.T if turned else whole).contiguous()
            seen |= set(joined.parts)
        assert seen == set(ours), f"{self.name} has no place for {set(ours) - seen}"
        return theirs

    def import_tensors(self, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], model: ModelConfig) -> None:
        """Fills ours. Errors: ValueError naming every tensor that is missing, left over, or of another shape."""
        problems, left = [], set(theirs)
        for name, joined, turned in self.tensors(ours, model.n_layers):
            parts = [ours[part] for part in joined.parts]
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            if name not in theirs:
                problems.append(f"{name}: missing")
                continue
            left.remove(name)
            whole = theirs[name].T if turned else theirs[name]
            if whole.shape != shape:
                problems.append(f"{name}: expected {shape}, got {tuple(whole.shape)}")
                continue
            rows = [len(part) for part in parts]
            for part, value in zip(parts, joined.divide(whole, rows, model.n_kv_heads), strict=True):
                part.copy_(value)
        problems += [f"{name}: the model has no place for it" for name in sorted(left)]
        if problems:
            raise ValueError("\n".join(problems))


GATED = {"swiglu": "silu", "geglu": "gelu"}
PLAIN = {"gelu": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu"}
RMSNORM = {"name": "rmsnorm"}
LAYERNORM = {"name": "layernorm"}

_SIZES: dict[str, str | Values | Is] = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "seq_len",
    "tie_word_embeddings": "tied",
    "rope_parameters.rope_theta": "rope_base",
    "rope_parameters.rope_type": Is("default"),
}
_ABSENT = {
    "tie_word_embeddings": False,
    "rope_parameters.rope_theta": 10_000.0,
    "rope_parameters.rope_type": "default",
    "attention_bias": False,
}
_ONLY = {"rope_scaling": None, "rope_parameters.partial_rotary_factor": 1.0}
IDLE = frozenset(
    {"_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype"}
    | {"initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    | {"attention_dropout", "pretraining_tp"}
)
"""What changes no logit in any of them."""
_ATTENTION: dict[str, str | Joined] = {
    "model.layers.{l}.self_attn.q_proj": "blocks.{l}.attn.wq",
    "model.layers.{l}.self_attn.k_proj": "blocks.{l}.attn.wk",
    "model.layers.{l}.self_attn.v_proj": "blocks.{l}.attn.wv",
    "model.layers.{l}.self_attn.o_proj": "blocks.{l}.attn.wo",
}
_ENDS: dict[str, str | Joined] = {"model.embed_tokens": "embed", "model.norm": "final", "lm_head": "head"}
_BEFORE: dict[str, str | Joined] = {
    "model.layers.{l}.input_layernorm": "blocks.{l}.attn_residual.norm",
    "model.layers.{l}.post_attention_layernorm": "blocks.{l}.ffn_residual.norm",
}
_PLAIN_FFN: dict[str, str | Joined] = {
    "model.layers.{l}.mlp.up_proj": "blocks.{l}.ffn.w_up",
    "model.layers.{l}.mlp.down_proj": "blocks.{l}.ffn.w_down",
}
_GATED_FFN = _PLAIN_FFN | {"model.layers.{l}.mlp.gate_proj": "blocks.{l}.ffn.w_gate"}
_HEAD_NORMS: dict[str, str | Joined] = {
    "model.layers.{l}.self_attn.q_norm": "blocks.{l}.attn.score.q_norm",
    "model.layers.{l}.self_attn.k_norm": "blocks.{l}.attn.score.k_norm",
}
_RMS = {"rms_norm_eps": "norm_eps"}
_QKV = ("blocks.{l}.attn.wq", "blocks.{l}.attn.wk", "blocks.{l}.attn.wv")


def _llama(model_class: str, activations: Mapping[str, str], ffn: Mapping[str, str | Joined]) -> Architecture:
    return Architecture(
        model_class=model_class,
        norms="before",
        fields=_SIZES
        | _RMS
        | {
            "head_dim": "head_dim",
            "attention_bias": "bias",
            "mlp_bias": "bias",
            "hidden_act": Values("activation", activations),
        },
        ours={"norm": RMSNORM, "position": "rope"},
        modules={**_ENDS, **_BEFORE, **_ATTENTION, **ffn},
        absent=_ABSENT | {"head_dim": None, "num_key_value_heads": None, "mlp_bias": False},
        only=_ONLY,
        idle=IDLE,
    )


HUGGING_FACE = (
    _llama("LlamaForCausalLM", GATED, _GATED_FFN),
    _llama("ArceeForCausalLM", PLAIN, _PLAIN_FFN),
    Architecture(
        model_class="Qwen3ForCausalLM",
        norms="before",
        fields=_SIZES
        | _RMS
        | {"head_dim": "head_dim", "attention_bias": Is(False), "hidden_act": Values("activation", GATED)},
        ours={"norm": RMSNORM, "position": "rope", "attention": {"score": "rms_qknorm_head"}},
        modules=_ENDS | _BEFORE | _ATTENTION | _HEAD_NORMS | _GATED_FFN,
        absent=_ABSENT,
        only=_ONLY | {"use_sliding_window": False},
        idle=IDLE | {"sliding_window", "max_window_layers"},
    ),
    Architecture(
        model_class="Olmo2ForCausalLM",
        norms="after",
        fields=_SIZES | _RMS | {"attention_bias": Is(False), "hidden_act": Values("activation", GATED)},
        ours={"norm": RMSNORM, "position": "rope", "attention": {"score": "rms_qknorm_full"}},
        modules=_ENDS
        | _ATTENTION
        | _HEAD_NORMS
        | _GATED_FFN
        | {
            "model.layers.{l}.post_attention_layernorm": "blocks.{l}.attn_residual.norm",
            "model.layers.{l}.post_feedforward_layernorm": "blocks.{l}.ffn_residual.norm",
        },
        absent=_ABSENT | {"num_key_value_heads": None},
        only=_ONLY,
        idle=IDLE,
    ),
    Architecture(
        model_class="Glm4ForCausalLM",
        norms="around",
        fields=_SIZES
        | _RMS
        | {
            "head_dim": "head_dim",
            "attention_bias": Is(False),
            "hidden_act": Values("activation", GATED),
            "rope_parameters.partial_rotary_factor": Is(1.0),
        },
        ours={"norm": RMSNORM, "position": "rope_interleaved"},
        modules=_ENDS
        | _ATTENTION
        | {
            "model.layers.{l}.input_layernorm": "blocks.{l}.attn_residual.norm_in",
            "model.layers.{l}.post_self_attn_layernorm": "blocks.{l}.attn_residual.norm_out",
            "model.layers.{l}.post_attention_layernorm": "blocks.{l}.ffn_residual.norm_in",
            "model.layers.{l}.post_mlp_layernorm": "blocks.{l}.ffn_residual.norm_out",
            "model.layers.{l}.mlp.gate_up_proj": Joined(("blocks.{l}.ffn.w_gate", "blocks.{l}.ffn.w_up")),
            "model.layers.{l}.mlp.down_proj": "blocks.{l}.ffn.w_down",
        },
        absent={key: value for key, value in _ABSENT.items() if key != "attention_bias"},
        only={"rope_scaling": None},
        idle=IDLE,
    ),
    Architecture(
        model_class="Starcoder2ForCausalLM",
        norms="before",
        fields=_SIZES | {"norm_epsilon": "norm_eps", "use_bias": "bias", "hidden_act": Values("activation", PLAIN)},
        ours={"norm": LAYERNORM, "position": "rope", "bias": True},
        modules=_ENDS
        | _BEFORE
        | _ATTENTION
        | {
            "model.layers.{l}.mlp.c_fc": "blocks.{l}.ffn.w_up",
            "model.layers.{l}.mlp.c_proj": "blocks.{l}.ffn.w_down",
        },
        absent=_ABSENT | {"tie_word_embeddings": True, "use_bias": True, "norm_epsilon": 1e-5},
        only=_ONLY | {"sliding_window": None},
        idle=IDLE | {"residual_dropout", "embedding_dropout"},
    ),
    Architecture(
        model_class="GPT2LMHeadModel",
        norms="before",
        fields={
            "vocab_size": "vocab_size",
            "n_positions": "seq_len",
            "n_embd": "dim",
            "n_inner": "ffn_dim",
            "n_layer": "n_layers",
            "n_head": "n_heads",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tied",
            "activation_function": Values("activation", PLAIN),
        },
        ours={"norm": LAYERNORM, "position": "learned", "bias": True},
        modules={
            "transformer.wte": "embed",
            "transformer.wpe": "position",
            "transformer.h.{l}.ln_1": "blocks.{l}.attn_residual.norm",
            "transformer.h.{l}.ln_2": "blocks.{l}.ffn_residual.norm",
            "transformer.h.{l}.attn.c_attn": Joined(_QKV),
            "transformer.h.{l}.attn.c_proj": "blocks.{l}.attn.wo",
            "transformer.h.{l}.mlp.c_fc": "blocks.{l}.ffn.w_up",
            "transformer.h.{l}.mlp.c_proj": "blocks.{l}.ffn.w_down",
            "transformer.ln_f": "final",
            "lm_head": "head",
        },
        transposed=frozenset(
            f"transformer.h.{{l}}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
        absent={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
        },
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        idle=IDLE
        | {"attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_ctx", "task_specific_params"}
        | {f"summary_{what}" for what in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")},
    ),
)


def _megatron(norm: str, gated: bool, head_norms: bool) -> Architecture:
    """GPTModel of local layers: `transformer` is its TransformerConfig, `layers` is what get_gpt_layer_local_spec takes
    and `gpt` the rest; an activation_func is that of torch.nn.functional of this name."""
    layer, ours = "decoder.layers.{l}", "blocks.{l}"
    norms: dict[str, str | Joined] = {
        f"{layer}.self_attention.{i}_layernorm": f"{ours}.attn.score.{i}_norm" for i in ("qk" if head_norms else "")
    }
    first = f"{ours}.ffn.w_up"
    return Architecture(
        model_class="GPTModel",
        norms="before",
        fields={
            "transformer.hidden_size": "dim",
            "transformer.ffn_hidden_size": "ffn_dim",
            "transformer.num_layers": "n_layers",
            "transformer.num_attention_heads": "n_heads",
            "transformer.num_query_groups": "n_kv_heads",
            "transformer.kv_channels": "head_dim",
            "transformer.layernorm_epsilon": "norm_eps",
            "transformer.add_bias_linear": "bias",
            "transformer.gated_linear_unit": Is(gated),
            "transformer.activation_func": Values(
                "activation", GATED if gated else {a: a for a in ("gelu", "relu", "silu")}
            ),
            "transformer.normalization": Is(norm),
            "transformer.qk_layernorm": Is(head_norms),
            "layers.normalization": Is(norm),
            "layers.qk_layernorm": Is(head_norms),
            "gpt.vocab_size": "vocab_size",
            "gpt.max_sequence_length": "seq_len",
            "gpt.share_embeddings_and_output_weights": "tied",
            "gpt.rotary_base": "rope_base",
            "gpt.position_embedding_type": Values(
                "position", {"rope": "rope", "learned": "learned_absolute", "none": "none"}
            ),
        },
        ours={"norm": {"name": norm.lower()}}
        | ({"attention": {"score": "rms_qknorm_head"}} if head_norms else {})
        | ({"bias": True} if norm == "LayerNorm" else {}),  # theirs always has one
        modules=norms
        | {
            "embedding.word_embeddings": "embed",
            "embedding.position_embeddings": "position",
            f"{layer}.input_layernorm": f"{ours}.attn_residual.norm",
            f"{layer}.self_attention.linear_qkv": Joined(_QKV, by_head=True),
            f"{layer}.self_attention.linear_proj": f"{ours}.attn.wo",
            f"{layer}.pre_mlp_layernorm": f"{ours}.ffn_residual.norm",
            f"{layer}.mlp.linear_fc1": Joined((f"{ours}.ffn.w_gate", first)) if gated else first,
            f"{layer}.mlp.linear_fc2": f"{ours}.ffn.w_down",
            "decoder.final_layernorm": "final",
            "output_layer": "head",
        },
    )


MEGATRON = (
    *(_megatron(norm, gated, head_norms=False) for norm in ("LayerNorm", "RMSNorm") for gated in (False, True)),
    *(_megatron("RMSNorm", gated, head_norms=True) for gated in (False, True)),
)


def architecture_of(config: Config, scheme: Scheme, among: Sequence[Architecture]) -> Architecture | None:
    """The one that is the model of the config; None where there is none."""
    return next((architecture for architecture in among if architecture.is_that_of(config, scheme)), None)


def nested(table: Mapping[str, Any]) -> Table:
    """The inverse of `dotted`."""
    result: Table = {}
    for key, value in table.items():
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return result


__all__ = ["HUGGING_FACE", "MEGATRON", "Architecture", "architecture_of", "dotted", "nested"]
