"""nlm's logits against an independent transcription of the papers' equations."""

from collections.abc import Callable
from typing import Any

import pytest
from entries import COMBINATIONS
from transcription import difference

from nlm import NORMS, SCORES, WEIGHT_NORMS
from nlm.config import Config

MakeConfig = Callable[..., Config]
LIMIT = 1e-9


@pytest.mark.parametrize("model", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_combination(model: dict[str, Any], make_config: MakeConfig) -> None:
    assert difference(make_config(model | {"activation": "swiglu", "n_kv_heads": 2, "n_layers": 5})) < LIMIT


@pytest.mark.parametrize(
    "model",
    [
        *({"activation": name} for name in ("gelu", "relu", "relu2", "silu", "geglu")),
        *({"position": name} for name in ("rope_interleaved", "learned", "sinusoidal", "none")),
        *({"n_kv_heads": n} for n in (1, 4)),
        *({"bias": True, "norm": name} for name in NORMS if name != "batchnorm"),
        {"architecture": "encoder", "bias": True, "norm": "batchnorm"},
        {"logits_cap": 2.0},
        {"weight_norm": {"name": "weight_norm", "roles": ["q", "down"]}},
        {"tied": True},
        {"head_bias": True},
        {"head_dim": 6, "n_heads": 3},
        {"rope_base": 100.0},
        {"norm_eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["pre_ln", "deepnorm", "ngpt", "without_tears"])
def test_every_key_of_the_model(scheme: str, model: dict[str, Any], make_config: MakeConfig) -> None:
    assert difference(make_config({"scheme": {"name": scheme}} | model)) < LIMIT


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_encoders(score: str, make_config: MakeConfig) -> None:
    assert difference(make_config({"architecture": "encoder", "attention": {"score": score}})) < LIMIT


@pytest.mark.parametrize("weight_norm", WEIGHT_NORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_weight_norms_of_embedding_and_head(weight_norm: str, tied: bool, make_config: MakeConfig) -> None:
    choice = {"name": weight_norm, "roles": ["embed", "o"] if tied else ["embed", "o", "head"]}
    assert difference(make_config({"weight_norm": choice, "tied": tied})) < LIMIT


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu2", "silu", "geglu"])
@pytest.mark.parametrize("scheme", ["fixup", "nf", "brainformer"])
def test_what_depends_on_the_activation(scheme: str, activation: str, make_config: MakeConfig) -> None:
    assert difference(make_config({"scheme": {"name": scheme}, "activation": activation})) < LIMIT
