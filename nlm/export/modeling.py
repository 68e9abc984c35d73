"""A Transformer as transformers wants it. This file goes out with every export that has no equal there.

It imports what a model needs, nothing that trains. It is imported by no other module of nlm: `bundle` writes the class
that names a model's own parts, and copies from nlm what the two refer to.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nlm.anatomy import IGNORED, Role, Site
from nlm.config import ModelConfig
from nlm.model import Transformer
from nlm.schemes.base import Scheme, Slots
from nlm.scores import Score


class NLMConfig(PreTrainedConfig):
    """`model` is nlm's table of that name, `seq_len` the context length of training."""

    model_type = "nlm"

    model: dict[str, Any] | None = None
    seq_len: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        table = self.model or {}
        self.vocab_size = table.get("vocab_size")
        self.hidden_size = table.get("dim")
        self.num_hidden_layers = table.get("n_layers")
        self.num_attention_heads = table.get("n_heads")
        self.max_position_embeddings = self.seq_len
        super().__post_init__(**kwargs)


class NLMBase(PreTrainedModel, GenerationMixin):
    """input_ids [B S] -> logits [B S V]. No key is cached: each new token takes a forward over all before it."""

    config_class = NLMConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    scheme: ClassVar[type[Scheme]]
    norm: ClassVar[Callable[..., nn.Module]]
    score: ClassVar[Callable[..., Score]]
    weight_norm: ClassVar[Callable[..., Any] | None]
    slots: ClassVar[Callable[[Site], Slots] | None]

    def __init__(self, config: NLMConfig) -> None:
        super().__init__(config)
        kind, table = type(self), ModelConfig.model_validate(config.model)
        weight_norms = {}
        if kind.weight_norm is not None and table.weight_norm is not None:
            made = partial(kind.weight_norm, **table.weight_norm.fields)
            weight_norms = {Role(role): made for role in table.weight_norm.roles}
        self.model = Transformer(
            table,
            config.seq_len,
            kind.scheme(**table.scheme.fields),
            partial(kind.norm, **table.norm.fields),
            partial(kind.score, **table.attention.fields),
            weight_norms,
            kind.slots,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Constants and tables, which no file has. Errors: ValueError for a parameter that came from no file either."""
        initial: Mapping[str, Any] = getattr(module, "initial", {})
        for name in module._non_persistent_buffers_set:
            value = initial[name]() if callable(initial[name]) else torch.as_tensor(initial[name])
            module.get_buffer(name).copy_(value)
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                raise ValueError(f"{type(module).__name__}.{name}: not in the file of weights; export the model again")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **ignored: Any,
    ) -> CausalLMOutput:
        """`attention_mask` [B S] is 0 for padding; `labels` [B S] are the tokens themselves, IGNORED for none.

        Errors: ValueError for padding on the left of a model whose positions are counted from there, and for what
        would change the result but is not there: inputs_embeds, past_key_values.
        """
        for name in ("inputs_embeds", "past_key_values"):
            if ignored.get(name) is not None:
                raise ValueError(f"{name}: this model takes input_ids alone; call generate(…, use_cache=False)")
        segments = None
        if attention_mask is not None and not attention_mask.bool().all():
            if self.model.position is not None and not attention_mask[:, 0].all():
                raise ValueError("attention_mask: positions are absolute here; pad on the right (padding_side='right')")
            segments = attention_mask.long()
        logits = self.model(input_ids, segments=segments)
        loss = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            loss = self.model.cross_entropy(logits, targets) / (targets != IGNORED).sum()
        return CausalLMOutput(loss=loss, logits=logits)
