"""The models in which depth was measured, and a text for them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from measures import SEQ_LEN
from torch import Tensor

from nlm import SCHEMES, build_model
from nlm.config import Config
from nlm.data import TokenShard
from nlm.model import Transformer

MakeConfig = Callable[..., Config]


@pytest.fixture
def build(make_config: MakeConfig) -> Callable[..., Transformer]:
    """The set-up in which depth was measured: D=64, 4 heads, GELU with F=4D, learned positions, byte vocabulary."""

    def make(scheme: str, n_layers: int, **keys: Any) -> Transformer:
        """`keys` of the scheme, or of [model]."""
        own = {field.name for field in fields(SCHEMES[scheme])}
        table: dict[str, Any] = {
            "vocab_size": 257,
            "dim": 64,
            "ffn_dim": 256,
            "position": "learned",
            "n_layers": n_layers,
            "scheme": {"name": scheme} | {key: value for key, value in keys.items() if key in own},
        }
        model = table | {key: value for key, value in keys.items() if key not in own}
        return build_model(make_config(model, train={"seq_len": SEQ_LEN, "batch_tokens": SEQ_LEN}))

    return make


@pytest.fixture(scope="module")
def text(shard: str) -> Tensor:
    """[2 S+1] bytes of a play."""
    return torch.from_numpy(np.asarray(TokenShard(shard).tokens[: 2 * (SEQ_LEN + 1)], np.int64)).view(2, -1)
