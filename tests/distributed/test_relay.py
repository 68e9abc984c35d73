"""A run that goes through every layout of the matrix, a step in each."""

from contextlib import closing
from pathlib import Path

from parity import LAYOUTS, Ranks
from relay import LIMIT, relay, shuffled


def test_a_run_goes_on_in_every_layout(tmp_path: Path) -> None:
    order = shuffled(rounds=1)
    assert set(order) == {None, *LAYOUTS}
    with closing(Ranks()) as ranks:
        found = relay(order, tmp_path, ranks)
    assert found["batch_digest"].first is None, "not the same data"
    assert found["loss"].size < 1e-6
    assert found["parameters"].size < LIMIT and found["optimizer"].size < LIMIT, found
