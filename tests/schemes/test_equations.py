"""nlm's logits against an independent transcription of the papers' equations."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from transcription import Transcription

from nlm import NORMS, SCHEMES, SCORES, build_model
from nlm.config import Config

MakeConfig = Callable[..., Config]


def difference(config: Config) -> float:
    """Largest difference in logits, relative to their spread, of a model whose parameters have all been moved."""
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * (parameter.abs().mean() + 0.1) * torch.randn(parameter.shape, generator=generator)
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    tokens = torch.randint(config.model.vocab_size, (2, config.train.seq_len), generator=generator)
    ours = model(tokens).detach().numpy()
    theirs = Transcription(parameters, config.model).logits(tokens.numpy())
    return float(np.abs(ours - theirs).max() / theirs.std())


@pytest.mark.parametrize(("scheme", "norm", "score"), list(product(SCHEMES, NORMS, SCORES)))
def test_every_scheme_with_every_norm_and_score(scheme: str, norm: str, score: str, make_config: MakeConfig) -> None:
    attention = {"score": score} | ({"g0": 3.0} if score == "qknorm" else {})
    model = {"scheme": {"name": scheme}, "norm": norm, "attention": attention, "activation": "swiglu", "n_kv_heads": 2}
    assert difference(make_config(model)) < 1e-6


@pytest.mark.parametrize(
    "model",
    [
        *({"activation": name} for name in ("gelu", "relu", "relu2", "silu", "geglu")),
        *({"position": name} for name in ("rope_interleaved", "learned", "sinusoidal", "none")),
        *({"n_kv_heads": n} for n in (1, 4)),
        *({"bias": True, "norm": name} for name in NORMS),
        {"tied": True},
        {"head_dim": 6, "n_heads": 3},
        {"rope_base": 100.0},
        {"norm_eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["pre_ln", "deepnorm", "ngpt"])
def test_every_key_of_the_model(scheme: str, model: dict[str, Any], make_config: MakeConfig) -> None:
    assert difference(make_config({"scheme": {"name": scheme}} | model)) < 1e-6
