"""Runs of two ranks as they are seen from outside: what each rank says, who keeps the others waiting, and what an
endpoint for Prometheus tells while they train. Real processes."""

import ctypes
import json
import math
import os
import re
import signal
import socket
import time
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest
from launched import free_port
from ranks import DEADLINE_S, codes, start, torchrun

import nlm.train
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.config import Config
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.parallel.engine import Engine
from nlm.statistics.page import page
from nlm.statistics.runs import read_runs
from nlm.stop import StopRequest

RunConfig = Callable[..., Config]
HOST = socket.gethostname()
STAMP = re.compile(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z {re.escape(HOST)}: ")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(run: Path, rank: int) -> str:
    return (run / "ranks" / f"rank-{rank:05}.log").read_text()


def sleeping() -> Callable[..., None]:
    """On rank 1 a sleep of some times what the rest of a step takes, so that it is the slow one on a busy machine, too.
    The rest does not show what the other computes in the meantime, which may take longer: it waits for a core."""
    ended, rests = math.inf, list[float]()

    def sleep(*_: object) -> None:
        nonlocal ended
        if os.environ["RANK"] == "1":
            rests.append(max(0, time.monotonic() - ended))
            time.sleep(0.4 + min(8, 4 * median_low(rests[1:] or rests)))
            ended = time.monotonic()

    return sleep


def slow_reads() -> None:
    rows, sleep = RankData.rows, sleeping()

    def slow(self: RankData, batch: int) -> Batch:
        sleep()
        return rows(self, batch)

    RankData.rows = slow  # type: ignore[method-assign]


def slow_layers() -> None:
    def slow(config: Config, mesh: Mesh) -> Engine:
        engine = build_engine(config, mesh)
        engine.models[0].register_forward_pre_hook(sleeping())
        return engine

    nlm.train.build_engine = slow  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("slow", "layout", "why"),
    [
        (slow_reads, {"dp_replicate": 2}, r"\S+ s of it reading data"),
        (slow_layers, {"dp_shard": 2}, "computing"),
        (slow_layers, {"pp": 2, "microbatches": 2}, "computing"),
        (slow_layers, {"tp": 2}, "computing"),
    ],
    ids=["ddp-data", "fsdp", "pipeline", "tp"],
)
def test_a_slow_rank_is_named(
    slow: Callable[[], None], layout: dict[str, int], why: str, run_config: RunConfig, tmp_path: Path
) -> None:
    config = run_config("run", train={"steps": 16}, log={"every": 4}, parallel=layout)
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    ended = codes(start(2, path, tmp_path / "said", slow))
    console = (tmp_path / "said").read_text()
    assert ended == [0, 0], console
    run = Path(config.log.dir)
    said = rf"ALARM since step \d+: straggler: rank 1 on {re.escape(HOST)}: \S+ × .*\), {why}"
    assert len(re.findall(said, console)) == 1 and console.count("straggler:") == 1, console
    assert re.search(rf"a step took .* rank 1 on {re.escape(HOST)}, \S+ × the others'", console), console
    (alarm,) = lines(run / "alarms.jsonl")
    assert alarm["rank"] == 1 and alarm["seen"] > 1.2 * alarm["expected"] and alarm["step"] >= 10
    for record in lines(run / "timing.jsonl")[1:]:
        own, wait, data, step = (record[name]["p50"] for name in ("own_s", "wait_s", "data_s", "step_s"))
        assert own[1] > 0.4 and own[0] < own[1] and wait[0] > wait[1]
        assert (data[1] > own[1] / 2) == (slow is slow_reads), "of its own time"
        assert all(part <= whole for parts in (own, wait, data) for part, whole in zip(parts, step, strict=True))
    slowest = lines(run / "timing.jsonl")[1]["own_s"]["p99"]
    assert slowest[0] < slowest[1] / 1.2, "nor is the step in which DDP orders its buckets"
    html = page(read_runs([run]))
    table = html.partition("Time by rank")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>(\d)</td>", table) == ["1", "0"], "the slowest first"


def speaks(fault: Callable[[], None]) -> None:
    """Rank 1 says something in its third step, from Python and from C, and then there is a fault."""
    agreed, steps = StopRequest.agreed, []

    def speaking(self: StopRequest) -> str | None:
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) == 3:
            warnings.warn("odd weather", stacklevel=1)
            os.write(2, b"native words\n")
            fault()
        return agreed(self)

    StopRequest.agreed = speaking  # type: ignore[method-assign]


def raises() -> None:
    raise RuntimeError("bad weather")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashes() -> None:
    ctypes.string_at(0)


def test_a_rank_that_raises_leaves_its_traceback_in_its_file(run_config: RunConfig, tmp_path: Path) -> None:
    """And a second start, by torchrun, goes on in it."""
    config = run_config("run", parallel={"dp_replicate": 2})
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    run = Path(config.log.dir)
    assert codes(start(2, path, tmp_path / "said", partial(speaks, raises))) == [1, 1]
    console = (tmp_path / "said").read_text()
    ours, other = log_of(run, 1), log_of(run, 0)
    for text in ("Traceback (most recent", "in speaking", "RuntimeError: bad weather", "UserWarning: odd weather"):
        assert text in ours, ours
    assert "native words" in ours and "native words" not in console and "odd weather" not in console
    stamped = [line for line in ours.splitlines() if line != "native words"]
    assert all(STAMP.match(line) for line in stamped), ours
    assert stamped[0].endswith(f"as process {stamped[0].split()[-1]}") and "--- rank 1 of 2 starts, as" in stamped[0]
    assert f"nlm: rank 1 on {HOST}: RuntimeError: bad weather" in console, "the console has the short story"
    assert "step 2/8" in console and "step 2/8" in other and "step 2/8" not in ours
    assert "RankLost" in other and "Traceback" in other

    assert torchrun(2, "-m", "nlm", "train", path).returncode == 0
    again = log_of(run, 1)
    assert again.startswith(ours) and "--- rank 1 of 2 starts again, as process" in again[len(ours) :]


@pytest.mark.parametrize("fault", [is_killed, crashes])
def test_a_rank_that_is_killed_or_crashes_leaves_a_readable_file(
    fault: Callable[[], None], run_config: RunConfig, tmp_path: Path
) -> None:
    config = run_config("run", parallel={"dp_replicate": 2})
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    first, other = start(2, path, tmp_path / "said", partial(speaks, fault))
    other.join(DEADLINE_S)
    first.kill()
    assert other.exitcode == -(signal.SIGKILL if fault is is_killed else signal.SIGSEGV)
    said = log_of(Path(config.log.dir), 1)
    assert said.endswith("\n") and "UserWarning: odd weather" in said and "native words\n" in said
    if fault is crashes:
        after = said.partition("native words\n")[2]
        assert "Fatal Python error: Segmentation fault" in after and "in speaking" in after, said


def test_prometheus_asks_while_two_ranks_train(run_config: RunConfig, tmp_path: Path) -> None:
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_openmetrics
    from prometheus_client.parser import text_string_to_metric_families as parsed

    port = free_port()
    config = run_config(
        "run", train={"steps": 10**6}, parallel={"dp_replicate": 2}, log={"prometheus": {"port": port}, "every": 3}
    )
    (path := tmp_path / "run.toml").write_text(config.to_toml())
    run = Path(config.log.dir)
    processes = start(2, path, tmp_path / "said")

    def asked(accept: str) -> tuple[str, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    try:
        deadline = time.monotonic() + DEADLINE_S
        seen: dict[int, dict[str, Any]] = {}
        while len(seen) < 2:
            assert time.monotonic() < deadline and processes[0].is_alive(), seen
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
        names = {sample.name for family in parsed_openmetrics(text) for sample in family.samples}
        assert names == {sample.name for family in families.values() for sample in family.samples}
        config = run_config("second", log={"prometheus": {"port": port}})
        (path := tmp_path / "second.toml").write_text(config.to_toml())
        assert codes(start(1, path, tmp_path / "refused")) == [2]
        assert f"nlm: log.prometheus: cannot listen at 127.0.0.1:{port} (" in (tmp_path / "refused").read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()

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
