"""TOML and overrides to a Config: what wins over what, and every problem said at once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nlm import NORMS, SCHEMES, SCORES, load_config
from nlm.config import Config, ConfigError, NamedChoice

MINIMAL = """
[model]
vocab_size = 96
dim = 32
n_layers = 3
n_heads = 4
scheme = { name = "pre_ln" }
[train]
steps = 4
batch_tokens = 48
seq_len = 12
[optim]
lr = 1e-3
[data]
train = "tokens"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return error.value.problems


def test_defaults(minimal: Path) -> None:
    model = load_config(minimal).model
    assert (model.n_kv_heads, model.head_dim, model.ffn_dim) == (4, 8, 128)
    assert load_config(minimal).log.dir == "runs/minimal"
    assert load_config(minimal, ["model.activation=swiglu"]).model.ffn_dim == 88  # 8/3 · 32, up to a multiple of 8


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=5e-4", "optim", "lr", 5e-4),
        ("optim.betas=[0.8, 0.9]", "optim", "betas", [0.8, 0.9]),
        ("model.tied=true", "model", "tied", True),
        ("model.norm=rmsnorm", "model", "norm", NamedChoice(name="rmsnorm")),
        ('data.train="a=b"', "data", "train", "a=b"),
        ("data.train=a=b", "data", "train", "a=b"),
        ("optim.weight_decay=0", "optim", "weight_decay", 0.0),
    ],
)
def test_overrides(minimal: Path, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load_config(minimal, [override]), section), key) == value


def test_later_files_win_and_the_file_itself_over_them(minimal: Path) -> None:
    (minimal.parent / "first.toml").write_text("[model]\ndim = 64\nn_layers = 5\nnorm = 'rmsnorm'\n")
    (minimal.parent / "second.toml").write_text("extends = 'first.toml'\n[model]\nn_layers = 7\nn_heads = 2\n")
    own = MINIMAL.replace("n_layers = 3\nn_heads = 4\n", "").replace("dim = 32", "dim = 128")
    minimal.write_text("extends = ['second.toml']\n" + own)
    model = load_config(minimal, ["model.n_heads=8"]).model
    assert (model.dim, model.n_layers, model.n_heads, model.norm.name) == (128, 7, 8, "rmsnorm")


def test_another_scheme_drops_the_fields_of_the_former(minimal: Path) -> None:
    config = load_config(minimal, ["model.scheme.name=ngpt", "model.scheme.alpha=0.1"])
    assert config.model.scheme.fields == {"alpha": 0.1}
    minimal.write_text(MINIMAL.replace('{ name = "pre_ln" }', "{ name = 'ngpt', alpha = 0.1 }"))
    assert load_config(minimal, ["model.scheme.name=post_ln"]).model.scheme.fields == {}


def test_another_optimizer_drops_the_fields_of_the_former_and_keeps_the_schedule(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("lr = 1e-3", "lr = 1e-3\nname = 'adamp'\ndelta = 0.2\nwarmup_steps = 2"))
    optim = load_config(minimal, ["optim.name=lion", "optim.betas=[0.9, 0.98]"]).optim
    assert (optim.lr, optim.warmup_steps, optim.fields) == (1e-3, 2, {"betas": [0.9, 0.98]})
    assert load_config(minimal, ["optim.lr=1"]).optim.fields == {"delta": 0.2}


def test_written_and_read_again_it_is_the_same(minimal: Path) -> None:
    config = load_config(minimal, ["model.scheme.residual_init=false", "data.validation=more", "optim.betas=[0.5,0.6]"])
    again = minimal.parent / "again.toml"
    again.write_text(config.to_toml())
    assert load_config(again) == config


def test_all_problems_at_once(minimal: Path) -> None:
    found = problems(
        minimal,
        "model.dims=3",
        "model.dim=wide",
        "model.n_kv_heads=3",
        "model.scheme.name=pre_lm",
        "model.norm=rms",
        "model.attention.score=qknrom",
        "train.batch_tokens=50",
        "optim.warmup_steps=5",
        "optim.lr=-1.0",
    )
    expected = [
        ("model.dims", "unknown key"),
        ("model.dim", "'wide'"),
        ("model.n_kv_heads", "divisor of model.n_heads = 4 (one of [1, 2, 4]), got 3"),
        ("model.scheme.name", "'pre_ln'"),
        ("model.norm.name", "'rmsnorm'"),
        ("model.attention.score", "'qknorm'"),
        (
            "train.batch_tokens",
            "multiple of train.seq_len · parallel.microbatches · dp_replicate · dp_shard = 12, got 50",
        ),
        ("optim.warmup_steps", "at most train.steps = 4, got 5"),
        ("optim.lr", "-1.0"),
    ]
    assert len(found) == len(expected), found
    for key, detail in expected:
        assert [text for text in found if text.startswith(f"{key}:") and detail in text], (key, found)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.n_heads=5", "model.n_heads: expected a divisor of model.dim = 32 (one of [1, 2, 4, 8, 16, 32]), got 5"),
        ("model.head_dim=7", "model.head_dim: expected an even number for model.position = 'rope', got 7"),
        ("model.vocab_size=0", "model.vocab_size"),
        ("model.tied=1", "model.tied"),
        ("model.scheme.alpha=0.1", "model.scheme.alpha: unknown key"),
        ("model.scheme.residual_init=1", "model.scheme.residual_init"),
        ("model.attention.g0=3.0", "model.attention.g0: unknown key"),
        ("train.precision=fp16", "train.precision"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.schedule=cos", "optim.schedule"),
        ("modle.dim=3", "modle: unknown key"),
        ("model.architecture=prefix", "model.architecture"),
        ("lr", "lr: expected an override of the form section.key=value"),
        ("optim..lr=1", "optim..lr=1: expected an override"),
    ],
)
def test_one_problem(minimal: Path, override: str, problem: str) -> None:
    (found,) = problems(minimal, override)
    assert found.startswith(problem)


def test_missing_keys_are_named(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("steps = 4\n", "").replace('train = "tokens"\n', ""))
    assert problems(minimal) == ("train.steps: missing; give it a value", "data.train: missing; give it a value")


def test_a_choice_that_is_no_table(minimal: Path) -> None:
    (problem,) = problems(minimal, "model.attention=softmax")
    assert problem.startswith("model.attention: ") and "'softmax'" in problem


@pytest.mark.parametrize("text", ["[model", "a = 1\na = 2", "extends = 3"])
def test_files_that_are_no_config(minimal: Path, text: str) -> None:
    minimal.write_text(text)
    assert str(minimal) in problems(minimal)[0]


def test_a_file_that_is_missing_or_extends_itself(minimal: Path) -> None:
    assert "cannot be read" in problems(minimal.parent / "none.toml")[0]
    minimal.write_text("extends = 'minimal.toml'\n" + MINIMAL)
    assert "extends itself" in problems(minimal)[0]


CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_scheme_has_a_file() -> None:
    assert {path.stem for path in (CONFIGS / "schemes").glob("*.toml")} == set(SCHEMES)


@pytest.mark.parametrize("size", sorted((CONFIGS / "sizes").glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("scheme", sorted((CONFIGS / "schemes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_size_goes_with_every_scheme(scheme: Path, size: Path, tmp_path: Path) -> None:
    """Each with the other and a run's own few keys makes a whole config."""
    run = tmp_path / "run.toml"
    run.write_text(f"extends = ['{scheme}', '{size}']\n")
    own = ["train.steps=5000", "train.batch_tokens=2048", "train.seq_len=1024", "model.vocab_size=512", "data.train=x"]
    config = load_config(run, own)
    assert config.model.scheme.name == scheme.stem
    assert config.model.norm.name in NORMS and config.model.attention.score in SCORES


@pytest.mark.parametrize("run", [CONFIGS / "quickstart.toml", *(CONFIGS / "runs").glob("*.toml")], ids=lambda p: p.stem)
def test_every_run_is_whole(run: Path) -> None:
    assert load_config(run).train.steps > 0


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ([], "data.train.sources: list should have at least 1 item"),
        ([{"weight": 1.0}], "a path to shards or text files, one of the two"),
        ([{"path": "a", "files": ["b.txt"]}], "a path to shards or text files, one of the two"),
        ([{"files": ["b.txt"], "weight": 1.0}], "a tokenizer and a weight for text files"),
        ([{"files": ["b.txt"], "tokenizer": "byte"}], "a tokenizer and a weight for text files"),
        ([{"path": "a", "shuffle": 2, "workers": 0}], "shuffle, workers: of text files only"),
        ([{"path": "a", "weight": 0.5}, {"path": "b"}], "a weight for every source, or, of shards only, for none"),
        ([{"path": "a"}, {"path": "b"}, {"path": "a"}], "a is there twice; add the weights up"),
    ],
)
def test_sources_that_contradict_themselves(sources: object, problem: str, make_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        make_config(data={"train": sources})


def test_sources_survive_toml(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    text = {"files": ["b/*.txt", "c.txt"], "tokenizer": "byte", "weight": 2.0}
    config = make_config(data={"train": [{"path": "a", "weight": 1.0}, text], "document_mask": True})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "config.toml") == config
    assert [source.path for source in config.data.sources] == ["a", None]
