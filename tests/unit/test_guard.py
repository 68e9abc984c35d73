"""Steps left out: by what they are judged, that they change nothing, and how a run goes back when they do not end."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nlm.train
from nlm.build import build_engine
from nlm.checkpoint import checkpoints
from nlm.config import Config, FaultsConfig
from nlm.data.corpus import Corpus
from nlm.faults import Faults, Rollback
from nlm.guard import Guard, Judged
from nlm.mesh import Mesh
from nlm.parallel.engine import Engine
from nlm.statistics.diagnose import LEAST, first_bad_layer
from nlm.stop import Stopped
from nlm.storage import read_all
from nlm.train import train

RunConfig = Callable[..., Config]
NAN, INF = math.nan, math.inf


def verdicts(guard: Guard, losses: list[float], grad_norms: list[float] | None = None) -> list[bool]:
    norms = [1.0] * len(losses) if grad_norms is None else grad_norms
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        guard.judge(i, i, torch.tensor(loss), torch.tensor(norm))
    return [judged.left_out for judged in guard.judged()]


def guard(**settings: Any) -> Guard:
    return Guard(FaultsConfig(**{"window": 8, "rollback_after": 100} | settings), torch.device("cpu"))


def test_what_is_not_finite_is_left_out_from_the_first_step_on() -> None:
    assert verdicts(guard(), [NAN, 1.0, INF, -INF, 1.0, 1.0], [1.0, NAN, 1.0, 1.0, INF, 1.0]) == [True] * 5 + [False]


@pytest.mark.parametrize("which", ["loss", "gradient norm"])
def test_a_spike_is_more_than_sigma_above_a_full_window(which: str) -> None:
    """Of 1 and 3 in turn: mean 2, standard deviation sqrt(8/7). Norms are judged by their logarithms."""
    usual, one = [1.0, 3.0] * 4, [1.0] * 9
    limit = 2 + 6 * math.sqrt(8 / 7)
    for last, out in ((limit * 1.001, True), (limit * 0.999, False), (-100.0, False)):
        series = [*usual, last]
        found = verdicts(guard(), series) if which == "loss" else verdicts(guard(), one, np.exp(series).tolist())
        assert found == [False] * 8 + [out]
    assert verdicts(guard(), [1.0] * 7 + [1000.0]) == [False] * 8, "the window is not full"
    assert verdicts(guard(sigma=0.0), [*usual, 1000.0]) == [False] * 9


def test_a_gradient_that_grows_as_a_model_learns_is_no_spike() -> None:
    """Threefold where it scatters by a quarter, as when a decoder begins to use what its encoder says; tenfold is."""
    norms = np.exp(0.25 * np.random.default_rng(0).standard_normal(192))
    norms[128:] *= 3
    assert not any(verdicts(guard(window=128), [1.0] * 192, norms.tolist()))
    assert verdicts(guard(window=128), [1.0] * 129, [*norms[:128], 10.0])[-1]


def test_only_steps_that_counted_are_in_the_window_and_the_oldest_leaves_it() -> None:
    found = guard()
    assert verdicts(found, [1.0, 3.0] * 4 + [1000.0, NAN]) == [False] * 8 + [True, True]
    assert verdicts(found, [100.0]) == [True]
    assert verdicts(found, [8.0, 1.0, 3.0] * 3)[0] is False
    reference = np.array([1.0, 3.0, 8.0, 1.0, 3.0, 8.0, 1.0, 3.0])  # the last eight that counted, in some order
    limit = reference.mean() + 6 * reference.std(ddof=1)
    assert verdicts(found, [limit * 1.001]) == [True] and verdicts(found, [limit * 0.999]) == [False]


def test_after_so_many_in_a_row_everything_is_left_out_until_it_goes_back() -> None:
    found = guard(rollback_after=3)
    assert verdicts(found, [NAN, NAN, 1.0, NAN, NAN, NAN, 1.0]) == [True, True, False, True, True, True, True]
    assert found.in_a_row == 4 and found.updates == 1


def test_its_state_goes_on_where_it_was_and_another_window_begins_anew() -> None:
    found, other, shorter = guard(window=9), guard(window=9), guard(window=8)
    verdicts(found, [1.0, 3.0] * 5 + [NAN])
    for next_ in (other, shorter):
        next_.load_state(found.state())
        assert next_.updates == 10 and next_.in_a_row == 1
    assert verdicts(other, [100.0]) == [True] and verdicts(shorter, [100.0]) == [False]


def everything(engine: Engine) -> list[Tensor]:
    state = engine.optimizer.adamw.state  # type: ignore[attr-defined]
    return [*engine.pieces.tensors, *(tensor for kept in state.values() for tensor in kept.values())]


def test_a_step_left_out_changes_nothing(run_config: RunConfig) -> None:
    """No bit: of NaN in its gradients nothing stays, and what is projected to norm 1 is not projected again."""
    config = run_config("run", {"scheme": {"name": "ngpt"}})
    engine, batch = build_engine(config, Mesh()), nlm.train.RankData(config, Mesh()).rows(1)
    for left_out in (False, True, False):
        engine.forward_backward(batch)
        engine.clip()
        if left_out:
            engine.pieces.gradients()[0].fill_(NAN)
        before = [tensor.clone() for tensor in everything(engine)]
        engine.update(1e-2, left_out=torch.tensor(left_out))
        same = [torch.equal(a, b) for a, b in zip(everything(engine), before, strict=True)]
        assert all(same) if left_out else sum(same) < len(same) / 10


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """`poison({3, 4})`: the batches of these numbers make gradients of the second layer that are not finite."""

    def begin(numbers: set[int]) -> None:
        rows, forward_backward = nlm.train.RankData.rows, Engine.forward_backward
        current = 0

        def rows_of(self: Any, number: int) -> Any:
            nonlocal current
            current = number
            return rows(self, number)

        def poisoned(self: Engine, batch: Any) -> Tensor:
            loss = forward_backward(self, batch)
            if current in numbers:
                for h, gradient in zip(self.pieces.held, self.pieces.gradients(), strict=True):
                    if h.weight.site and h.weight.site.layer <= 1:
                        gradient.fill_(INF)
            return loss

        monkeypatch.setattr(nlm.train.RankData, "rows", rows_of)
        monkeypatch.setattr(Engine, "forward_backward", poisoned)

    return begin


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(run: Path, key: str) -> list[Any]:
    return [record[key] for record in records(run / "metrics.jsonl")]


def test_a_bad_batch_is_left_out_and_it_is_said(
    run_config: RunConfig, poison: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """And resuming after it is as not having stopped: AdamW has counted one update less than there were steps."""
    poison({3})
    config = {"checkpoint": {"every": 5, "keep_last": 9}}
    straight = train(run_config("straight", **config))
    assert "step 3 left out: loss 5." in capsys.readouterr().out
    (fault,) = records(straight / "faults.jsonl")
    assert fault["step"] == fault["batch"] == 3 and fault["left_out"] and fault["grad_norm"] == INF
    assert len(column(straight, "loss")) == 8 and column(straight, "batch") == list(range(1, 9))

    train(run_config("resumed", train={"stop_after": 5}, **config))
    resumed = train(run_config("resumed", **config))
    assert records(resumed / "faults.jsonl") == [fault]
    assert column(resumed, "loss") == column(straight, "loss")
    ours, theirs = (read_all(run / "checkpoints/step-00000008/tensors") for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_was_left_out_since_it_last_logged_is_on_record_when_it_stops(
    run_config: RunConfig, poison: Callable[[set[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({3})
    config = run_config("stopped", log={"every": 100})
    learning_rate = nlm.train.learning_rate

    def notice(optim: Any, step: int, steps: int) -> float:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(optim, step, steps)

    monkeypatch.setattr(nlm.train, "learning_rate", notice)
    with pytest.raises(Stopped, match="SIGTERM"):
        train(config)
    run = Path(config.log.dir)
    assert [fault["step"] for fault in records(run / "faults.jsonl")] == [3] and column(run, "step") == [1]
    assert [fault["step"] for fault in records(train(config) / "faults.jsonl")] == [3]


def test_a_run_goes_back_and_leaves_out_the_batches_since(
    run_config: RunConfig, poison: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """From its checkpoint of step 4 on it is the run that never saw batches 5 to 9, killed in between or not."""
    poison({7, 8, 9, 12})
    config = {
        "train": {"steps": 14},
        "faults": {"rollback_after": 3},
        "checkpoint": {"every": 4, "keep_last": 9},
        "optim": {"schedule": "constant"},
    }
    run = train(run_config("back", **config))
    said = capsys.readouterr().out
    assert "3 steps in a row left out; the first to go bad is layer 1: grad_norm/" in said
    assert "back to step 4, without the batches since" in said
    assert column(run, "step") == list(range(1, 15))
    assert column(run, "batch") == [1, 2, 3, 4, *range(10, 20)]
    corpus = Corpus(run_config("back", **config))
    for digest, number in zip(column(run, "batch_digest"), column(run, "batch"), strict=True):
        tokens = torch.from_numpy(corpus.batch(number).tokens)
        assert digest == int(nlm.train.Batch(tokens).digest(0)), number
    kinds = [("to" in fault, fault["step"]) for fault in records(run / "faults.jsonl")]
    assert kinds == [(False, 7), (False, 8), (False, 9), (True, 9), (False, 7)]

    killed = run_config("killed", **config)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nlm.train, "resume", interrupt)
        train(killed)
    assert records(Path(killed.log.dir) / "faults.jsonl")[-1]["to"] == 4
    train(killed)
    for key in ("loss", "batch", "batch_digest"):
        assert column(Path(killed.log.dir), key) == column(run, key)
    assert records(Path(killed.log.dir) / "faults.jsonl") == records(run / "faults.jsonl")
    ours, theirs = (read_all(checkpoints(r)[-1] / "tensors") for r in (Path(killed.log.dir), run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_cannot_go_back_ends_and_names_the_layer(
    run_config: RunConfig, poison: Callable[[set[int]], None]
) -> None:
    poison(set(range(3, 100)))
    with pytest.raises(FloatingPointError, match=r"step 3: .* 4 such .* layer 1: .* no checkpoint .* lower optim.lr"):
        train(run_config("none", train={"steps": 20}))
    with pytest.raises(FloatingPointError, match="the run had gone back to step 2 before"):
        train(run_config("again", train={"steps": 20}, checkpoint={"every": 2}))


def test_the_first_of_the_bad_steps_is_looked_at_though_it_is_noticed_later(
    run_config: RunConfig, poison: Callable[[set[int]], None]
) -> None:
    """At step 10, whose own batch is a good one."""
    poison({7, 8})
    late = run_config("late", train={"steps": 20}, faults={"rollback_after": 2}, log={"every": 5})
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 such .* the first to go bad is layer 1: grad_norm"):
        train(late)


def test_no_checkpoint_is_of_the_middle_of_bad_steps(run_config: RunConfig, poison: Callable[[set[int]], None]) -> None:
    """It would hide those before them, which are to be left out."""
    poison({3, 4})
    train(run_config("run", checkpoint={"every": 1, "keep_last": 9}))
    saved = [int(path.name[-1]) for path in checkpoints(Path(run_config("run").log.dir))]
    assert saved == [1, 2, 5, 6, 7, 8]


def test_a_learning_rate_that_is_far_too_high(run_config: RunConfig) -> None:
    config = run_config("diverges", train={"steps": 20}, optim={"lr": 1e30, "clip": 0.0}, checkpoint={"every": 1})
    with pytest.raises(FloatingPointError, match=r"first to go bad is layer \d+: .* had gone back to step 1 before"):
        train(config)


def test_without_statistics_it_says_how_to_learn_the_layer(
    run_config: RunConfig, poison: Callable[[set[int]], None]
) -> None:
    poison(set(range(2, 100)))
    with pytest.raises(FloatingPointError, match=r"with statistics.enabled = true it would say which layer"):
        train(run_config("none", statistics={"enabled": False}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"stream_rms_in/attn": [1, 1, 9, 9]}, "layer 2: stream_rms_in/attn is 9, was 1 ± 0.1"),
        ({"stream_rms_in/attn": [1, NAN, NAN, NAN]}, "layer 1: stream_rms_in/attn is nan"),
        ({"grad_norm/q": [9, 9, 9, 1]}, "layer 2: grad_norm/q is 9, was 1 ± 0.1"),  # down the stack
        ({"grad_norm/q": [1, NAN, 9, 9], "branch_rms/ffn": [9, 9, 9, 9]}, "layer 1: grad_norm/q is nan"),
        ({"grad_norm/q": [9, 9, 9, 9], "branch_rms/ffn": [1, 1, 1, 9]}, "layer 3: branch_rms/ffn is 9, was 1 ± 0.1"),
        ({"branch_rms/ffn": [1.5, 1.5, 0, 0]}, None),  # less than six standard deviations; smaller is not worse
    ],
)
def test_the_first_bad_layer_in_the_order_of_the_computation(
    changes: dict[str, list[float]], expected: str | None
) -> None:
    names = ["grad_norm/layer", "grad_norm/q", "stream_rms_in/attn", "branch_rms/ffn"]
    before = {name: np.tile([[0.9], [1.1]], (LEAST // 2, 4)).astype(np.float32) for name in names}
    vectors = {name: np.array(changes.get(name, [1.0] * 4), np.float32) for name in names}
    assert first_bad_layer(vectors, before, 6.0) == expected


def test_without_much_of_a_past_only_what_is_not_finite_is_bad() -> None:
    before = {"branch_rms/ffn": np.ones((LEAST - 1, 2), np.float32)}
    assert first_bad_layer({"branch_rms/ffn": np.array([9e9, 1], np.float32)}, before, 6.0) is None
    bad = first_bad_layer({"branch_rms/ffn": np.array([1, INF], np.float32)}, before, 6.0)
    assert bad == "layer 1: branch_rms/ffn is inf"


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    found = Faults(tmp_path, writes=True)
    for step in (3, 7, 8):
        found.left_out(Judged(step, step, True, 9.0, 1.0))
    found.roll_back(Rollback(8, 4, 9, "layer 1"))
    found.left_out(Judged(6, 10, True, 9.0, 1.0))
    found.roll_back(Rollback(12, 10, 17, "layer 2"))
    yield found


def test_which_batch_a_step_takes(faults: Faults, tmp_path: Path) -> None:
    for found in (faults, Faults(tmp_path, writes=False)):
        assert [found.batch(step) for step in (1, 4, 5, 10, 11, 12)] == [1, 4, 9, 14, 17, 18]


def test_going_on_from_an_older_step_forgets_what_will_happen_again(faults: Faults, tmp_path: Path) -> None:
    def left(step: int) -> list[int]:
        reader = Faults(tmp_path, writes=False)
        reader.start_after(step)
        return [record.get("to", record["step"]) for record in reader.records]

    assert left(10) == [3, 7, 8, 4, 6, 10] == left(99)
    assert left(9) == [3, 7, 8, 4, 6]
    assert left(4) == [3, 7, 8, 4]
    assert left(3) == [3] and left(2) == []
    faults.start_after(3)
    assert [record["step"] for record in records(tmp_path / "faults.jsonl")] == [3]


def test_a_damaged_record_is_an_error(faults: Faults, tmp_path: Path) -> None:
    with (tmp_path / "faults.jsonl").open("a") as file:
        file.write('{"step"')
    with pytest.raises(ValueError, match=r"faults.jsonl: damaged"):
        Faults(tmp_path, writes=True)
