"""The short form of tools/chaos.py: a run of four ranks that is killed four times, or a few times more."""

from pathlib import Path

from chaos import chaos


def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    done = chaos(tmp_path, kills=4, seed=1)
    print(done)
    assert done.total() >= 4 and any("during a save" in kind for kind in done)
