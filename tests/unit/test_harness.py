"""lm-evaluation-harness on a checkpoint, against its own class for Hugging Face models with the same weights."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nlm import load_checkpoint
from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.config import Config
from nlm.data.tokenize import tokenize
from nlm.data.tokenizer import load_tokenizer
from nlm.evaluate.harness import Harness
from nlm.evaluate.load import Loader, evaluation_config
from nlm.mesh import Mesh
from nlm.train import train

CONTEXT = 48
LLAMA = {
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "activation": "swiglu",
    "norm": {"name": "rmsnorm"},
    "position": "rope",
    "scheme": {"name": "pre_ln"},
}
NAMES = {
    "embed": "model.embed_tokens",
    "final": "model.norm",
    "head": "lm_head",
    "attn_residual.norm": "input_layernorm",
    "ffn_residual.norm": "post_attention_layernorm",
    **{f"attn.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"ffn.w_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
TASKS = {
    "next_line": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "scenes": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "go_on": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n", "nd"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def lines(plays: list[Path]) -> list[str]:
    return [line + "\n" for line in plays[0].read_text().splitlines() if len(line) > 20][40:]


@pytest.fixture
def checkpoint(run_config: Callable[..., Config], lines: list[str], tmp_path: Path) -> Path:
    """A Llama that has learned a little of a play, in tokens of its own."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(lines, trainer)
    model.save(str(tmp_path / "tokens.json"))
    (tmp_path / "text.txt").write_text("".join(lines))
    tokenize([str(tmp_path / "text.txt")], str(tmp_path / "shard"), str(tmp_path / "tokens.json"), None)
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": 150, "batch_tokens": 8 * CONTEXT, "seq_len": CONTEXT},
        "optim": {"lr": 1e-2},
        "data": {"train": str(tmp_path / "shard")},
        "statistics": {"enabled": False},
    }
    return checkpoints(train(run_config("llama", LLAMA | {"vocab_size": 300}, **sections)))[-1]


@pytest.fixture
def theirs(checkpoint: Path, tmp_path: Path) -> HFLM:
    """The same weights, as Hugging Face's Llama."""
    model, config = load_checkpoint(checkpoint)
    c = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
        )
    )
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("blocks."):
            _, layer, inner = stem.split(".", 2)
            tensors[f"model.layers.{layer}.{NAMES[inner]}.weight"] = tensor
        else:
            tensors[f"{NAMES[stem]}.weight"] = tensor
    llama.load_state_dict(tensors)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokens.json"), eos_token="<|endoftext|>")
    return HFLM(pretrained=llama.eval(), tokenizer=tokenizer, batch_size=2, device="cpu", max_length=CONTEXT)


def begun(lines: list[str], i: int) -> str:
    """Text that ends in the middle of a line."""
    return "".join(lines[i : i + 1 + i % 4])[: -8 - i]


def write_tasks(folder: Path, lines: list[str], targets: list[str]) -> None:
    """Some contexts longer than the model's, some empty."""
    n = 12
    choices = [
        {
            "context": "".join(lines[i : i + i % 4]),
            "choices": [lines[i + i % 4], lines[i + 50], lines[i + 90]],
            "answer": i % 2,
        }
        for i in range(n)
    ]
    documents = {
        "next_line": choices,
        "scenes": [{"text": "".join(lines[9 * i : 9 * i + 2 * i + 1])} for i in range(4)],
        "go_on": [{"context": begun(lines, i), "target": target} for i, target in enumerate(targets)],
    }
    folder.mkdir(exist_ok=True)
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        kwargs = json.dumps({"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {kwargs}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + body)


def found(model: Any, folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[Any]]]:
    """Metrics and the model's answers, by task."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, float)}
        for task, values in results["results"].items()
    }
    answers = {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}
    return metrics, answers


def test_the_same_metrics_as_the_harness_itself(
    checkpoint: Path, theirs: HFLM, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tasks"
    asked = [Instance("generate_until", {}, (), 0) for _ in range(8)]
    options = {"until": ["\n", "nd"], "max_gen_toks": 16, "do_sample": False}
    for i, instance in enumerate(asked):
        instance.arguments = (begun(lines, i), options)
    said = theirs.generate_until(asked)
    write_tasks(folder, lines, [text if i % 2 else "nothing" for i, text in enumerate(said)])
    config = evaluation_config(checkpoint)
    inference = Loader(Mesh()).load(checkpoint, config)
    ours = Harness(inference=inference, coder=load_tokenizer(str(tmp_path / "tokens.json")))
    expected, answers = found(theirs, folder)
    metrics, own_answers = found(ours, folder)
    assert metrics.keys() == expected.keys() == TASKS.keys()
    for task, values in expected.items():
        assert metrics[task] == pytest.approx(values, rel=1e-4), task
    assert own_answers["go_on"] == answers["go_on"] and len({str(answer) for answer in answers["go_on"]}) > 3
    for mine, other in zip(own_answers["next_line"], answers["next_line"], strict=True):
        for ((a, a_greedy),), ((b, b_greedy),) in zip(mine, other, strict=True):
            assert a == pytest.approx(b, rel=1e-4) and a_greedy == b_greedy
    assert expected["go_on"]["exact_match"] == pytest.approx(0.5)
    assert 0 < expected["next_line"]["acc"] < 1 and expected["scenes"]["bits_per_byte"] < 6

    capsys.readouterr()
    command = ["evaluate", str(checkpoint), "--tasks", ",".join(TASKS), "--include-path", str(folder)]
    assert main(command) == 0
    kept = json.loads((checkpoint.parent.parent / "evaluation" / f"{checkpoint.name}.json").read_text())
    assert kept["tasks"] == metrics and kept["text"] == {}
    assert f"{metrics['scenes']['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert main([*command[:3], "no_such", *command[4:]]) == 2
    assert "no task is called no_such; there are go_on, next_line, scenes" in capsys.readouterr().err

    output = tmp_path / "output"
    command = ["nlm.evaluate.harness", "--model", "nlm", "--model_args", f"checkpoint={checkpoint}"]
    command += ["--tasks", "next_line", "--include_path", str(folder), "--output_path", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (written,) = output.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["next_line"]["acc,none"] == metrics["next_line"]["acc"]


def test_what_it_does_not_do(checkpoint: Path) -> None:
    ours = Harness(str(checkpoint), batch_size=2)
    for options, message in (
        ({"do_sample": True, "temperature": 0.7}, "set do_sample: false"),
        ({"max_gen_toks": CONTEXT}, f"expected max_gen_toks below the context's {CONTEXT}"),
    ):
        request = Instance("generate_until", {}, ("To be", options), 0)
        with pytest.raises(ValueError, match=message):
            ours.generate_until([request])
    with pytest.raises(ValueError, match="is longer than"):
        ours._loglikelihood_tokens([(None, [1], [2] * (CONTEXT + 1))])
