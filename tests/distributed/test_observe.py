"""Runs of two ranks as they are seen from outside: what each rank says, who keeps the others waiting, and what an
endpoint for Prometheus tells while they train. Real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import free_port
from ranks import torchrun

from nlm.config import Config
from nlm.statistics.page import page
from nlm.statistics.runs import read_runs

RunConfig = Callable[..., Config]
HOST = socket.gethostname()
STAMP = re.compile(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z {re.escape(HOST)}: ")
DEADLINE_S = 240


def lines(path: Path) -> list[str]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else []


def log_of(run: Path, rank: int) -> str:
    return (run / "ranks" / f"rank-{rank:05}.log").read_text()


def script(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(f"import os, sys, time, warnings\nimport nlm.train\nfrom nlm.cli import main\n{text}\n")
    with path.open("a") as file:
        file.write("sys.exit(main(sys.argv[1:]))\n")
    return path


SLEEPS = """
begun = None

def sleeps():
    '''Twice what its step took without this, and more: on a busy machine steps take as long as they like.'''
    global begun
    if os.environ["RANK"] == "1":
        time.sleep(0.3 + min(4, 2 * (0 if begun is None else time.monotonic() - begun)))
        begun = time.monotonic()
"""
SLOW_READS = """
import nlm.data.rank
rows = nlm.data.rank.RankData.rows

def slow(self, batch):
    sleeps()
    return rows(self, batch)

nlm.data.rank.RankData.rows = slow
"""
SLOW_LAYER = """
from nlm.build import build_engine

def slowed(config, mesh):
    engine = build_engine(config, mesh)
    engine.models[0].register_forward_pre_hook(lambda *_: sleeps())
    return engine

nlm.train.build_engine = slowed
"""


@pytest.mark.parametrize(
    ("slow", "layout", "why"),
    [
        (SLOW_LAYER, {"dp_replicate": 2}, "computing"),
        (SLOW_LAYER, {"dp_shard": 2}, "computing"),
        (SLOW_READS, {"tp": 2}, r"\S+ s of it reading data"),
    ],
    ids=["ddp-layer", "fsdp-layer", "tp-data"],
)
def test_a_slow_rank_is_named(
    slow: str, layout: dict[str, int], why: str, run_config: RunConfig, tmp_path: Path
) -> None:
    config = run_config("run", train={"steps": 15}, log={"every": 5}, parallel=layout)
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    done = torchrun(2, script(tmp_path, "slow", SLEEPS + slow), "train", path)
    assert done.returncode == 0, done.stdout
    run = Path(config.log.dir)
    said = rf"ALARM since step \d+: straggler: rank 1 on {re.escape(HOST)}: \S+ × .*\), {why}"
    assert len(re.findall(said, done.stdout)) == 1 and done.stdout.count("straggler:") == 1, done.stdout
    assert re.search(rf"a step took .* rank 1 on {re.escape(HOST)}, \S+ × the others'", done.stdout), done.stdout
    (alarm,) = lines(run / "alarms.jsonl")
    assert alarm["rank"] == 1 and alarm["seen"] > 1.2 * alarm["expected"] and alarm["step"] >= 10
    for record in lines(run / "timing.jsonl")[1:]:
        own, wait, data, step = (record[name]["p50"] for name in ("own_s", "wait_s", "data_s", "step_s"))
        assert own[1] > 0.3 and own[0] < own[1] and wait[0] > wait[1]
        assert (data[1] > own[1] / 2) == (slow is SLOW_READS), "of its own time"
        assert all(part <= whole for parts in (own, wait, data) for part, whole in zip(parts, step, strict=True))
    html = page(read_runs([run]))
    table = html.partition("Time by rank")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>(\d)</td>", table) == ["1", "0"], "the slowest first"


SPEAKS = """
from nlm.stop import StopRequest
agreed, steps = StopRequest.agreed, []

def speaking(self):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        warnings.warn("odd weather")
        os.write(2, b"native words\\n")
        FAULT
    return agreed(self)

StopRequest.agreed = speaking
"""


def test_a_rank_that_raises_leaves_its_traceback_in_its_file(run_config: RunConfig, tmp_path: Path) -> None:
    """And a second start goes on in it."""
    config = run_config("run", parallel={"dp_replicate": 2})
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    raises = script(tmp_path, "raises", SPEAKS.replace("FAULT", 'raise RuntimeError("bad weather")'))
    done = torchrun(2, raises, "train", path)
    run = Path(config.log.dir)
    assert done.returncode == 1
    ours, other = log_of(run, 1), log_of(run, 0)
    for text in ("Traceback (most recent", "in speaking", "RuntimeError: bad weather", "UserWarning: odd weather"):
        assert text in ours, ours
    assert "native words" in ours and "native words" not in done.stdout and "odd weather" not in done.stdout
    stamped = [line for line in ours.splitlines() if line != "native words"]
    assert all(STAMP.match(line) for line in stamped), ours
    assert stamped[0].endswith(f"as process {stamped[0].split()[-1]}") and "--- rank 1 of 2 starts, as" in stamped[0]
    assert f"nlm: rank 1 on {HOST}: RuntimeError: bad weather" in done.stdout, "the console has the short story"
    assert "step 2/8" in done.stdout and "step 2/8" in other and "step 2/8" not in ours
    assert "RankLost" in other and "Traceback" in other

    assert torchrun(2, "-m", "nlm", "train", path).returncode == 0
    again = log_of(run, 1)
    assert again.startswith(ours) and "--- rank 1 of 2 starts again, as process" in again[len(ours) :]


@pytest.mark.parametrize(
    "fault", ["os.kill(os.getpid(), 9)", "import ctypes; ctypes.string_at(0)"], ids=["kill", "segv"]
)
def test_a_rank_that_is_killed_or_crashes_leaves_a_readable_file(
    fault: str, run_config: RunConfig, tmp_path: Path
) -> None:
    config = run_config("run", parallel={"dp_replicate": 2})
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    assert torchrun(2, script(tmp_path, "dies", SPEAKS.replace("FAULT", fault)), "train", path).returncode != 0
    said = log_of(Path(config.log.dir), 1)
    assert said.endswith("\n") and "UserWarning: odd weather" in said and "native words\n" in said
    if "ctypes" in fault:
        after = said.partition("native words\n")[2]
        assert "Fatal Python error: Segmentation fault" in after and "in speaking" in after, said


def test_prometheus_asks_while_two_ranks_train(run_config: RunConfig, tmp_path: Path) -> None:
    from prometheus_client import openmetrics
    from prometheus_client.parser import text_string_to_metric_families as parsed

    port = free_port()
    config = run_config(
        "run", train={"steps": 10**6}, parallel={"dp_replicate": 2}, log={"prometheus": {"port": port}, "every": 3}
    )
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    run = Path(config.log.dir)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    process = subprocess.Popen(
        [*command, "-m", "nlm", "train", path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def asked(accept: str) -> tuple[str, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    try:
        deadline = time.monotonic() + DEADLINE_S
        seen: dict[int, dict[str, Any]] = {}
        while len(seen) < 2:
            assert time.monotonic() < deadline and process.poll() is None, seen
            time.sleep(0.2)
            try:
                _, text = asked("text/plain")
            except OSError:
                continue
            families = {family.name: family for family in parsed(text)}
            if "nlm_step" in families:
                seen[int(families["nlm_step"].samples[0].value)] = families
        kind, text = asked("application/openmetrics-text; version=1.0.0")
        assert "openmetrics" in kind and "# UNIT nlm_step_seconds seconds" in text
        assert openmetrics.parser.text_string_to_metric_families(text)
        blocked = subprocess.run(
            [sys.executable, "-m", "nlm", "train", path, f"log.dir={tmp_path / 'second'}", "parallel.dp_replicate=1"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=DEADLINE_S,
        )
        assert blocked.returncode == 2
        assert f"nlm: log.prometheus: cannot listen at 127.0.0.1:{port} (" in blocked.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    metrics = (run / "metrics.jsonl").read_text()
    records = {r["step"]: r for r in map(json.loads, metrics[: metrics.rindex("\n")].splitlines())}
    for step, families in seen.items():
        record = records[step]
        expected = {
            "nlm_loss": record["loss"],
            "nlm_grad_norm": record["grad_norm"],
            "nlm_learning_rate": record["lr"],
            "nlm_tokens_per_second": record["tokens_s"],
            "nlm_step_seconds": record["step_s"],
            "nlm_peak_memory_bytes": record["peak_memory_gib"] * 2**30,
            "nlm_flops_per_second": record["tflops_per_rank"] * 1e12,
        }
        for name, value in expected.items():
            (sample,) = families[name].samples
            assert sample.value == pytest.approx(value, rel=1e-12) and sample.labels == {"run": "run"}
            assert families[name].documentation and families[name].type == "gauge"
        (info,) = families["nlm_run_info"].samples
        assert info.labels["scheme"] == "pre_ln" and info.labels["ranks"] == "2" and info.labels["n_layers"] == "3"
