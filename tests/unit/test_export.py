"""Models that go out to transformers, megatron-core and plain torch, and come back: by what those libraries compute."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from safetensors.torch import load_file, save_file

from nlm import NORMS, SCHEMES, SCORES, WEIGHT_NORMS, build_model, load_checkpoint
from nlm.checkpoint import save_checkpoint
from nlm.cli import main
from nlm.config import Config
from nlm.data.tokenize import tokenize
from nlm.data.tokenizer import load_tokenizer, tokenizer_spec
from nlm.export import huggingface, megatron
from nlm.export.architectures import HUGGING_FACE, MEGATRON, Architecture, architecture_of
from nlm.export.tokenizer import write_tokenizer
from nlm.export.verbs import export, import_folder
from nlm.model import Transformer

MakeConfig = Callable[..., Config]

RMS: dict[str, Any] = {"norm": "rmsnorm", "tied": False}
NATIVE: dict[str, dict[str, Any]] = {
    "llama": RMS | {"activation": "swiglu", "n_kv_heads": 2},
    "llama-bias": RMS | {"activation": "geglu", "bias": True, "head_dim": 6, "tied": True, "rope_base": 5e4},
    "arcee": RMS | {"activation": "relu2", "bias": True},
    "qwen3": RMS | {"activation": "swiglu", "n_kv_heads": 2, "attention": {"score": "rms_qknorm_head"}},
    "olmo2": RMS
    | {"activation": "swiglu", "n_kv_heads": 1, "attention": {"score": "rms_qknorm_full"}, "scheme": {"name": "olmo2"}},
    "glm4": RMS | {"activation": "swiglu", "position": "rope_interleaved", "scheme": {"name": "sandwich_ln"}},
    "glm4-peri": RMS
    | {
        "activation": "geglu",
        "position": "rope_interleaved",
        "n_kv_heads": 2,
        "head_dim": 12,
        "scheme": {"name": "peri_ln", "embed_norm": False},
    },
    "starcoder2": {"bias": True, "activation": "gelu", "n_kv_heads": 2, "norm_eps": 1e-4},
    "starcoder2-tied": {"bias": True, "activation": "silu", "tied": True},
    "gpt2": {"bias": True, "activation": "gelu", "position": "learned"},
    "gpt2-tied": {"bias": True, "activation": "relu", "position": "learned", "tied": True},
}
BY_HAND: dict[str, dict[str, Any]] = {
    **{f"scheme-{name}": {"scheme": {"name": name}} for name in SCHEMES},
    **{f"norm-{name}": {"norm": {"name": name}} for name in NORMS if name != "batchnorm"},
    **{f"score-{name}": {"attention": {"score": name}, "n_kv_heads": 2} for name in SCORES},
    **{f"weights-{name}": {"weight_norm": name} for name in WEIGHT_NORMS},
    **{f"position-{p}": {"position": p} for p in ("rope_interleaved", "learned", "sinusoidal", "none")},
    **{f"activation-{a}": {"activation": a, "bias": True} for a in ("relu", "relu2", "swiglu", "geglu")},
    "caps": {"logits_cap": 3.0, "attention": {"score": "softcap", "cap": 2.0}, "stochastic_depth": 0.2},
    "tied": {"tied": True, "norm": {"name": "rmsnorm", "one_plus": True}},
    "head-bias": {"head_bias": True, "init": "gpt2"},
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers keeps the code that it loads."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


def moved(config: Config) -> Transformer:
    """A model none of whose parameters is where it starts: gains of 1 and biases of 0 hide that they are left out."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(config: Config, rows: int = 2) -> torch.Tensor:
    shape = (rows, config.train.seq_len)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(2))


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def off(model: Transformer, theirs: Any, config: Config) -> float:
    x = tokens(config)
    return float((theirs(x).logits - model(x)).abs().max())


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_what_transformers_has_too_goes_there_and_comes_back(
    name: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(NATIVE[name])
    model = moved(config)
    huggingface.write(model, config, None, tmp_path)
    theirs = loaded(tmp_path)
    assert theirs.config.model_type == name.partition("-")[0]
    assert off(model, theirs, config) < 1e-5
    x = tokens(config)[:1, :4]
    assert torch.equal(theirs.generate(x, max_new_tokens=4, do_sample=False), generated(model, x, 4))

    again, its_config = huggingface.read(tmp_path, [])
    assert architecture_of(its_config, again.scheme, HUGGING_FACE) == architecture_of(config, model.scheme, HUGGING_FACE)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())

    theirs.save_pretrained(saved := tmp_path / "saved", max_shard_size="20KB")  # as transformers writes it
    assert len([*saved.glob("*.safetensors")]) > 1
    again, _ = huggingface.read(saved, [])
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def generated(model: Transformer, x: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        x = torch.cat([x, model(x)[:, -1:].argmax(-1)], 1)
    return x


@pytest.mark.parametrize("name", BY_HAND)
def test_every_other_model_takes_its_code_along(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(BY_HAND[name])
    model = moved(config)
    if native := architecture_of(config, model.scheme, HUGGING_FACE):
        pytest.fail(f"{name} is {native.name}")
    huggingface.write(model, config, None, folder := tmp_path / name)
    theirs = loaded(folder, trust_remote_code=True)
    assert off(model, theirs, config) == 0
