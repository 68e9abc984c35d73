"""Weights & Biases and MLflow, offline and in a folder: what arrives there, also after an interruption."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nlm.config import Config
from nlm.train import train

RunConfig = Callable[..., Config]
IMAGES = {"layers/grad_norm", "profiles/grad_norm", "layers/stream_rms_out", "profiles/stream_rms_out"}


def interrupted(run_config: RunConfig, log: dict[str, Any]) -> Path:
    """Eight steps, of which the first process makes five; the learning rate is another then."""
    sections = {"log": log, "statistics": {"images_every": 4}}
    train(run_config("run", train={"stop_after": 5}, **sections))
    return train(run_config("run", optim={"lr": 2e-3}, **sections))


def test_mlflow(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'nlm[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    interrupted(run_config, {"mlflow": {"tracking_uri": uri, "experiment": "deep"}})
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("deep").experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, 9))
    assert run.data.params["model.scheme.name"] == "pre_ln" and run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["changed.optim.lr"] == "0.002"
    images = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")}
    assert {image.partition("+")[0].replace("~", "/") for image in images} >= IMAGES


def entries(path: Path) -> Iterator[Any]:
    """The records of a W&B file, which is a LevelDB log behind seven bytes: blocks of 32 KiB, of records in pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, whole = path.read_bytes(), b""
    assert content[:4] == b":W&B"
    at = 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little for another piece: filled up
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full one, or the last piece
            yield Record.FromString(whole)
            whole = b""


def test_wandb(run_config: RunConfig) -> None:
    pytest.importorskip("wandb", reason="needs pip install 'nlm[wandb]'")
    run = interrupted(run_config, {"wandb": {"project": "deep", "mode": "offline"}})
    first, second = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name, "one run, named by its identifier"
    history, config = [], {}
    for entry in (*entries(first), *entries(second)):
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
        history += [items] if items else []
        config |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
    assert [items["step"] for items in history if "loss" in items] == list(range(1, 9))
    assert {name for items in history for name in items} >= IMAGES
    assert config["model"]["scheme"]["name"] == "pre_ln" and config["optim"]["lr"] == 2e-3
    assert len(list(run.rglob("media/images/**/*.png"))) >= 2 * len(IMAGES)
