"""nlm's logits against an independent transcription of the papers' equations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from entries import COMBINATIONS
from transcription import Transcription

from nlm import NORMS, SCORES, WEIGHT_NORMS
from nlm.build import design
from nlm.config import Config
from nlm.init import init
from nlm.norms.batch import BatchStatistics
from nlm.weight_norms import Singular

MakeConfig = Callable[..., Config]
LIMIT = 1e-9


def difference(config: Config) -> float:
    """Largest difference in logits, relative to their spread, of a model whose parameters have all been moved."""
    model = init(design(config).double().to_empty(device="cpu"), config.train.seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * (parameter.abs().mean() + 0.1) * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(norm := getattr(module, "weight_norm", None), Singular):
                left, _, right = torch.linalg.svd(module.weight)
                norm.u.copy_(left[:, 0])
                norm.v.copy_(right[0])
            if isinstance(module, BatchStatistics):  # as after some steps
                for name in module.state:
                    getattr(module, name).uniform_(0.5, 2.0, generator=generator)
    model.eval()
    parameters = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(config.model.vocab_size, (2, config.train.seq_len), generator=generator)
    ours = model(tokens).detach().numpy()
    theirs = Transcription(parameters, config.model, seq_len=config.train.seq_len).logits(tokens.numpy())
    return float(np.abs(ours - theirs).max() / theirs.std())


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
