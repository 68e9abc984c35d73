"""Which ranks are named as slow, and what Prometheus is told of scalars that have parts. Without processes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from launched import free_port

from nlm.config import Config, ConfigError
from nlm.sinks import Prometheus, sinks
from nlm.timing import PERCENTILES, Stragglers, Table, by_rank, record, summary


def table(own: Sequence[float], data: Sequence[float] | None = None, step: float = 1.0) -> Table:
    """Every percentile the same; the others wait."""
    of = np.array([[step, d, step - o, o] for o, d in zip(own, data or [0.0] * len(own), strict=True)])
    return np.repeat(of[:, :, None], len(PERCENTILES), axis=2)


def named(windows: Sequence[Sequence[float]], stages: Sequence[int], steps: int = 5) -> list[tuple[int, int]]:
    """-> step and rank of those that are named."""
    judge = Stragglers(["a"] * len(stages), stages, after=0)
    found = [s for i, own in enumerate(windows, 1) for s in judge.judge(i * steps, steps, table(own))]
    return [(s.step, s.rank) for s in found]


ALL = [0, 0, 0, 0]
EVEN, SLOW = [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.7, 0.5]


def test_a_rank_is_named_once_until_it_recovers() -> None:
    assert named([EVEN, SLOW, SLOW, SLOW, SLOW], ALL) == [(20, 2)]
    assert named([SLOW, SLOW, EVEN, SLOW, SLOW], ALL) == []
    assert named([SLOW] * 4 + [EVEN] + [SLOW] * 3, ALL) == [(15, 2), (40, 2)]
    assert named([SLOW] * 9, ALL, steps=1) == [], "nine steps are no habit"
    assert named([[0.5, 0.5, 0.55, 0.5]] * 9, ALL) == [], "a tenth more is nothing"
    assert named([[0.01, 0.01, 0.04, 0.01]] * 9, ALL) == [], "nor is what a step hardly feels"


def test_stages_of_a_pipeline_are_compared_with_themselves() -> None:
    heavy_stage = [0.3, 0.3, 0.6, 0.6]
    assert named([heavy_stage] * 5, [0, 0, 1, 1]) == []
    assert named([[0.3, 0.3, 0.6, 0.9]] * 5, [0, 0, 1, 1]) == [(15, 3)]
    for together in ([0, 0, 0, 0], [0, 1, 2, 3]):
        assert named([heavy_stage] * 5, together) == [(15, 2), (15, 3)]


def test_what_is_said_of_it() -> None:
    judge = Stragglers(["a", "b", "c"], [0, 0, 0], after=10)
    slow = table([0.4, 0.6, 0.4], data=[0.0, 0.3, 0.0])
    *_, (one,) = [judge.judge(step, 5, slow) for step in (15, 20, 25)]
    assert (one.since, one.seen, one.expected) == (11, 0.6, 0.4)
    assert one.text.startswith("straggler: rank 1 on b: 1.5 × the own time") and "0.3 s of it reading data" in one.text
    lines = [{"step": 15} | record(5, slow, "abc"), {"step": 20} | record(5, slow * 3, "abc")]
    assert by_rank(lines)[1]["own_s"][90] == pytest.approx(1.2), "the median of the two lines"
    assert summary(lines).endswith("has rank 1 on b, 1.50 × the others'")


def test_prometheus_is_for_who_asks_for_it_and_for_this_machine(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    assert not any(isinstance(sink, Prometheus) for sink in sinks(tmp_path / "run", make_config(), 0))
    for host, elsewhere in ({}, False), ({"host": "0.0.0.0"}, True):
        port = free_port()
        with Prometheus(tmp_path / "run", make_config(log={"prometheus": {"port": port} | host}), 0):
            for address, answers in ("127.0.0.1", True), ("127.0.0.2", elsewhere):
                with nullcontext() if answers else pytest.raises(URLError):
                    urlopen(f"http://{address}:{port}/metrics", timeout=30).close()


def test_parts_of_a_scalar_are_labels(make_config: Callable[..., Config], tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families as parsed

    port = free_port()
    config = make_config(log={"prometheus": {"port": port}})
    scalars = {"loss": 2.5, "bleu/de-en": 30.0, "bleu/en-de": 25.0, "epoch/web": 0.5, "unheard_of": 7.0}
    with Prometheus(tmp_path / "mine", config, 0) as sink:
        sink.scalars(4, scalars)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            families: dict[str, Any] = {family.name: family for family in parsed(answer.read().decode())}
        with pytest.raises(ConfigError, match=rf"log\.prometheus: cannot listen at 127\.0\.0\.1:{port} \("):
            Prometheus(tmp_path / "another", config, 0)
    with Prometheus(tmp_path / "mine", config, 4):
        pass  # the port is free again, for a run that goes back
    samples = {name: [(s.labels, s.value) for s in family.samples] for name, family in families.items()}
    run = {"run": "mine"}
    assert samples["nlm_loss"] == [(run, 2.5)] and samples["nlm_step"] == [(run, 4)]
    assert samples["nlm_bleu"] == [(run | {"direction": "de-en"}, 30.0), (run | {"direction": "en-de"}, 25.0)]
    assert samples["nlm_epoch"] == [(run | {"source": "web"}, 0.5)]
    assert samples["nlm_unheard_of"] == [(run, 7.0)]
