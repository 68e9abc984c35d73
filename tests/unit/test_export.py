"""Models that go out to transformers, megatron-core and plain torch, and come back: by what those libraries compute."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from safetensors.torch import load_file, save_file

from nlm import NORMS, SCHEMES, SCORES, WEIGHT_NORMS, build_model, load_checkpoint
from nlm.checkpoint import checkpoints, save_checkpoint
from nlm.cli import main
from nlm.config import Config
from nlm.data.lookup import find_tokenizer
from nlm.data.tokenize import tokenize
from nlm.data.tokenizer import load_tokenizer
from nlm.export import huggingface, megatron
from nlm.export.architectures import HUGGING_FACE, MEGATRON, Architecture, architecture_of
from nlm.export.tokenizer import write_tokenizer
from nlm.export.verbs import export, import_folder
from nlm.model import Transformer
from nlm.train import train

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
    # With all that Llama has, and GLM-4, but for the scheme.
    **{f"scheme-{name}": NATIVE["llama"] | {"scheme": {"name": name}} for name in SCHEMES if name != "pre_ln"},
    "scheme-pre_ln": NATIVE["llama"] | {"head_bias": True},
    "scheme-peri-embed": NATIVE["glm4-peri"] | {"scheme": {"name": "peri_ln"}},
    **{f"norm-{name}": {"norm": {"name": name}, "head_bias": True} for name in NORMS if name != "batchnorm"},
    **{f"score-{name}": {"attention": {"score": name}, "n_kv_heads": 2} for name in SCORES},
    **{f"weights-{name}": {"weight_norm": name} for name in WEIGHT_NORMS},
    **{f"position-{p}": {"position": p} for p in ("rope_interleaved", "learned", "sinusoidal", "none")},
    **{
        f"activation-{a}": {"activation": a, "bias": True, "position": "none"}
        for a in ("relu", "relu2", "swiglu", "geglu")
    },
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


@pytest.fixture(scope="module")
def gpt_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Callable[..., torch.Tensor]]]:
    """What makes megatron-core's GPTModel of an export, on CPU, one rank under gloo: tokens [B S] -> logits [B S V]."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig

    def make(folder: Path) -> Callable[..., torch.Tensor]:
        table = json.loads((folder / "config.json").read_text())
        activation = getattr(torch.nn.functional, table["transformer"].pop("activation_func"))
        config = TransformerConfig(
            **table["transformer"],
            activation_func=activation,
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        model = GPTModel(config, get_gpt_layer_local_spec(**table["layers"]), **table["gpt"]).eval()
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not unexpected and all("_extra_state" in name for name in missing), (missing, unexpected)

        def logits(x: torch.Tensor) -> torch.Tensor:
            n = x.shape[1]
            unseen = ~torch.ones(1, 1, n, n, dtype=torch.bool).tril()
            return model(x, torch.arange(n).expand_as(x), unseen)

        return logits

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(CudaRNGStatesTracker, "fork", lambda *_: nullcontext())  # for a dropout that is none
        parallel_state.initialize_model_parallel()
        yield make
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def moved(config: Config) -> Transformer:
    """A model none of whose parameters is where it starts: gains of 1 and biases of 0 hide that they are left out."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer *= 1 + torch.rand(buffer.shape, generator=generator)
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
    assert architecture_of(its_config, again.scheme, HUGGING_FACE) == architecture_of(
        config, model.scheme, HUGGING_FACE
    )
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
    (folder := tmp_path / name).mkdir()
    huggingface.write(model, config, None, folder)
    assert off(model, loaded(folder, trust_remote_code=True), config) < 1e-5


@pytest.fixture
def by_hand(make_config: MakeConfig, tmp_path: Path) -> Callable[..., tuple[Transformer, Any, Config]]:
    """A model that has no equal, and the same as transformers has it."""

    def make(**keys: Any) -> tuple[Transformer, Any, Config]:
        config = make_config({"scheme": {"name": "deepnorm"}} | keys)
        model = moved(config)
        (folder := tmp_path / "deep").mkdir()
        huggingface.write(model, config, None, folder)
        return model, loaded(folder, trust_remote_code=True), config

    return make


@torch.no_grad()
def test_generation_loss_and_padding_of_remote_code(by_hand: Callable[..., tuple[Transformer, Any, Config]]) -> None:
    model, theirs, config = by_hand()
    x = tokens(config)
    short, long = x[:1, :3], x[1:, :6]
    expected = [generated(model, short, 5)[0, 3:], generated(model, long, 5)[0, 6:]]
    for prompt, result in zip((short, long), expected, strict=True):
        assert torch.equal(theirs.generate(prompt, max_new_tokens=5, do_sample=False)[0, -5:], result)
    padded = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    both = theirs.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, -5:]
    assert torch.equal(both, torch.stack(expected))

    labels = x.clone()
    labels[0, :4] = -100
    logits, targets = model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    assert torch.allclose(theirs(x, labels=labels).loss, loss)
    with pytest.raises(ValueError, match="use_cache=False"):
        theirs.generate(short, max_new_tokens=2, use_cache=True)


def test_absolute_positions_are_not_padded_on_the_left(
    by_hand: Callable[..., tuple[Transformer, Any, Config]],
) -> None:
    model, theirs, config = by_hand(position="learned")
    x = tokens(config)
    mask = torch.ones_like(x)
    mask[0, -3:] = 0
    assert torch.allclose(theirs(x, attention_mask=mask).logits[0, :-3], model(x)[0, :-3], atol=1e-5)
    with pytest.raises(ValueError, match="pad on the right"):
        theirs(x, attention_mask=mask.flip(1))


def test_remote_code_needs_no_nlm_and_brings_no_other_scheme(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"scheme": {"name": "ngpt"}})
    model = moved(config)
    (folder := tmp_path / "alone").mkdir()
    huggingface.write(model, config, None, folder)
    assert {path.name for path in folder.glob("nlm_schemes_*")} == {
        f"nlm_schemes_{name}.py" for name in ("base", "module", "ngpt")
    }
    x = tokens(config)
    save_file({"x": x, "logits": model(x).detach()}, tmp_path / "expected.safetensors")
    script = (
        "import sys; sys.modules['nlm'] = None\n"  # whoever imports it fails
        "import torch; from safetensors.torch import load_file; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "expected = load_file(sys.argv[2])\n"
        "assert torch.allclose(model(expected['x']).logits, expected['logits'], atol=1e-5)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "expected.safetensors")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_weight_that_is_missing_is_not_made_up(
    by_hand: Callable[..., tuple[Transformer, Any, Config]], tmp_path: Path
) -> None:
    by_hand()
    file = tmp_path / "deep" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "blocks.1.attn.wq" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="not in the file of weights"):
        loaded(tmp_path / "deep", trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "factor"),
        (
            "llama",
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
            "rope_scaling.type",
        ),
        ("llama", {"attention_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu_new"}, "hidden_act"),
        ("llama", {"something_new": 1}, "something_new"),
        ("llama", {"model_type": "mamba"}, "model_type"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("glm4", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("starcoder2", {"sliding_window": 8}, "sliding_window"),
        ("starcoder2", {"use_bias": False}, "use_bias"),
        ("gpt2", {"activation_function": "gelu_new"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight"),
        ("llama", {"intermediate_size": 40}, "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(NATIVE[name])
    huggingface.write(build_model(config), config, None, tmp_path)
    table = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=named):
        huggingface.read(tmp_path, [])


def test_older_and_shorter_configs_mean_what_transformers_takes_them_for(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(NATIVE["llama"] | {"n_kv_heads": 4, "rope_base": 5e3})
    model = moved(config)
    huggingface.write(model, config, None, tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    for key in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        del table[key]
    (tmp_path / "config.json").write_text(
        json.dumps(table | {"rope_theta": table.pop("rope_parameters")["rope_theta"]})
    )
    again, its_config = huggingface.read(tmp_path, ["train.seq_len=6", "log.dir=elsewhere"])
    assert (its_config.train.seq_len, its_config.log.dir) == (6, "elsewhere")
    assert its_config.model.rope_base == 5e3
    x = tokens(config)[:, :6]
    assert torch.equal(again(x), model(x)) and torch.allclose(loaded(tmp_path)(x).logits, model(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tokenizers"])
def test_tokenizers_make_the_same_ids_and_texts(kind: str, plays: list[Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    spec = "byte"
    if kind == "sentencepiece":
        tokenize([str(plays[0])], str(tmp_path / "x"), tokenizer=None, train_tokenizer=700)
        spec = str(tmp_path / "x.model")
    elif kind == "tokenizers":
        spec = str(trained_tokenizer(plays[0], tmp_path / "tokenizer.json"))
    ours = load_tokenizer(spec)
    (folder := tmp_path / "out").mkdir()
    assert write_tokenizer(spec, folder) == ours.eod
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == ours.eod
    likewise = []
    for architecture in HUGGING_FACE:  # whose own tokenizers transformers might think of
        (folder / "config.json").write_text(json.dumps({"model_type": architecture.name}))
        likewise.append(AutoTokenizer.from_pretrained(folder))
    text = plays[1].read_text()
    texts = [text[i : i + 997] for i in range(0, len(text), 997)]
    texts += [
        "",
        " ",
        "  two  spaces\n\n\ttab ",
        "naïve café 東京 🙂\0",
        "</s><|endoftext|><s><0x41>",
        " lead",
        "aaaaaaa",
    ]
    for one, ids in zip(texts, ours.encode(texts), strict=True):
        assert theirs(one)["input_ids"] == ids.tolist()
        assert theirs.decode(ids.tolist()) == ours.decode(ids)
    assert (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        == ours.encode([text])[0].tolist()
    )
    assert all(one(texts)["input_ids"] == theirs(texts)["input_ids"] for one in likewise)


def trained_tokenizer(text: Path, path: Path) -> Path:
    """A byte-level BPE that puts an end of text around what it encodes, and cuts it off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train([str(text)], trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=letters))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    made.enable_truncation(5)
    made.save(str(path))
    return path


def test_a_sentencepiece_model_that_changes_text_is_refused(plays: list[Path], tmp_path: Path) -> None:
    import sentencepiece

    prefix = str(tmp_path / "nfkc")
    sentencepiece.SentencePieceTrainer.train(input=str(plays[0]), model_prefix=prefix, vocab_size=500, minloglevel=2)
    with pytest.raises(ValueError, match="it leaves characters as they are"):
        write_tokenizer(f"{prefix}.model", tmp_path)


@pytest.mark.parametrize(
    ("keys", "match"),
    [({"architecture": "encoder"}, "encoder"), ({"scheme": {"name": "post_ln"}}, "GPTModel is Pre-LN")],
)
def test_what_a_format_cannot_have_is_refused(
    keys: dict[str, Any], match: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(keys)
    save_checkpoint(tmp_path / "checkpoint", build_model(config), config)
    format = "huggingface" if "architecture" in keys else "megatron"
    with pytest.raises(ValueError, match=match):
        export(tmp_path / "checkpoint", tmp_path / "out", format, "none")
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".partial*")]
    export(tmp_path / "checkpoint", tmp_path / "out", "torch")
    with pytest.raises(ValueError, match="not there yet"):
        export(tmp_path / "checkpoint", tmp_path / "out", "torch")


def test_the_verbs(run_config: MakeConfig, shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint to transformers and back by the command line, with the tokenizer of the data."""
    from transformers import AutoTokenizer

    config = run_config("run", NATIVE["llama"])
    model = moved(config)
    save_checkpoint(start := tmp_path / "checkpoint", model, config)
    assert main(["export", str(start), str(tmp_path / "hf")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "again"), f"data.train={shard}"]) == 0
    again, its_config = load_checkpoint(tmp_path / "again")
    assert its_config.data.train == shard
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())

    text = "To be, or not to be"
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == load_tokenizer(find_tokenizer(config.data)).encode([text])[0].tolist()
    theirs = loaded(tmp_path / "hf")
    assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-5)
    assert theirs.generation_config.eos_token_id == 256

    assert main(["export", str(start), str(tmp_path / "plain"), "--format", "torch"]) == 0
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == model.state_dict().keys()
    assert main(["export", str(start), str(tmp_path / "bad"), "--format", "onnx"]) == 2


@pytest.mark.parametrize(
    "keys", [NATIVE["glm4-peri"], {"weight_norm": "spectral"}, {"norm": "powernorm"}], ids=["glm4", "spectral", "power"]
)
def test_a_run_begins_with_the_weights_of_a_checkpoint(
    keys: dict[str, Any], run_config: MakeConfig, tmp_path: Path
) -> None:
    """Of a Hugging Face folder too; one step at no learning rate leaves them as they are."""
    config = run_config("run", keys)
    model = moved(config)
    if keys in NATIVE.values():
        huggingface.write(model, config, None, tmp_path)
        import_folder(tmp_path, tmp_path / "start", [f"data.train={config.data.train}"])
        keys = load_checkpoint(tmp_path / "start")[1].model.model_dump()
    else:
        save_checkpoint(tmp_path / "start", model, config)
    start = {"start": str(tmp_path / "start")}
    optim = {"lr": 1e-20, "weight_decay": 0.0}
    after, _ = load_checkpoint(checkpoints(train(run_config("run", keys, train={"steps": 1} | start, optim=optim)))[0])
    for name, parameter in model.named_parameters():
        assert torch.equal(after.get_parameter(name), parameter), name
    if keys.get("norm") == "powernorm":  # the running square moves by a tenth at a step, by its warmup by two
        phi, before = ((m.state_dict()["final.phi"]) for m in (after, model))
        assert (phi - before).abs().max() < 0.5 * (before - 1).abs().max()
    with pytest.raises(ValueError, match=r"model\.rope_base: train\.start has 10000\.0"):
        train(run_config("other", keys | {"rope_base": 1e3}, train={"steps": 1} | start))


def test_a_runs_tokenizer_is_that_which_made_its_data(
    run_config: MakeConfig, plays: list[Path], tmp_path: Path
) -> None:
    prefix = tmp_path / "data" / "x"
    tokenize([str(plays[0])], str(prefix), tokenizer=None, train_tokenizer=500)
    data = run_config("run", data={"train": str(prefix.parent)}).data
    assert find_tokenizer(data) == str(prefix.with_suffix(".model"))
    shutil.copy(prefix.with_suffix(".model"), kept := tmp_path / "kept.model")
    prefix.with_suffix(".model").write_bytes(b"another")
    with pytest.raises(ValueError, match="--tokenizer"):
        find_tokenizer(data)
    tokenize([str(plays[0])], str(tmp_path / "y"), tokenizer=str(kept), train_tokenizer=None)
    assert find_tokenizer(run_config("run", data={"train": str(tmp_path / "y")}).data) == str(kept)


MEGATRON_MODELS: dict[str, dict[str, Any]] = {
    "gelu": {"bias": True, "position": "none"},
    "relu": {"bias": True, "activation": "relu", "position": "learned", "tied": True},
    "geglu": {"bias": True, "activation": "geglu", "n_kv_heads": 2},
    "rms": RMS | {"activation": "silu", "rope_base": 5e4, "n_kv_heads": 2, "head_dim": 6},
    "swiglu": RMS | {"activation": "swiglu", "bias": True, "n_kv_heads": 2},
    "head-norms": RMS | {"activation": "swiglu", "attention": {"score": "rms_qknorm_head"}, "norm_eps": 1e-4},
}


@pytest.mark.parametrize("name", MEGATRON_MODELS)
@torch.no_grad()
def test_megatrons_gptmodel_is_the_same_model(
    name: str,
    make_config: MakeConfig,
    tmp_path: Path,
    gpt_model: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]],
) -> None:
    config = make_config(MEGATRON_MODELS[name])
    model = moved(config)
    megatron.write(model, config, tmp_path)
    x = tokens(config)
    assert torch.allclose(gpt_model(tmp_path)(x), model(x), atol=1e-5)


def test_every_architecture_is_tested(make_config: MakeConfig) -> None:
    def reached(models: dict[str, dict[str, Any]], among: tuple[Architecture, ...]) -> list[bool]:
        configs = [make_config(keys) for keys in models.values()]
        found = [architecture_of(config, build_model(config).scheme, among) for config in configs]
        return [architecture in found for architecture in among]

    assert all(reached(NATIVE, HUGGING_FACE)) and sum(reached(MEGATRON_MODELS, MEGATRON)) >= 5
