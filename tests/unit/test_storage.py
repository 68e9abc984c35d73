"""Rectangles on disk: whatever they were written in, any others can be read."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlm import storage
from nlm.storage import Rectangle, read, read_all, write

MATRIX = torch.arange(70.0).view(7, 10)
GAIN = torch.tensor([3.0], dtype=torch.float64)


def part(top: int, bottom: int, left: int, right: int, of: torch.Tensor = MATRIX) -> Rectangle:
    return Rectangle("matrix", (7, 10), (top, left), of[top:bottom, left:right].contiguous())


def gain() -> Rectangle:
    return Rectangle("gain", (1,), (0,), GAIN.clone())


CUT = [part(0, 3, 0, 10), part(3, 4, 0, 4), part(3, 4, 4, 10), part(4, 7, 0, 5), part(4, 7, 5, 10), gain()]


@settings(max_examples=20, deadline=None)
@given(rows=st.tuples(st.integers(0, 6), st.integers(1, 7)), columns=st.tuples(st.integers(0, 9), st.integers(1, 10)))
def test_any_rectangle_can_be_read(
    rows: tuple[int, int], columns: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    write(folder, CUT, None)
    wanted = part(rows[0], min(rows[0] + rows[1], 7), columns[0], min(columns[0] + columns[1], 10), MATRIX * 0)
    one = Rectangle("gain", (1,), (0,), GAIN * 0)
    read(folder, [wanted, one])
    top, left = wanted.offsets
    assert torch.equal(wanted.tensor, MATRIX[top:, left:][: wanted.tensor.shape[0], : wanted.tensor.shape[1]])
    assert torch.equal(one.tensor, GAIN)


def test_many_files_are_read_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", 100)
    write(tmp_path, CUT, None)
    assert len(list(tmp_path.iterdir())) == 3
    found = read_all(tmp_path)
    assert found.keys() == {"matrix", "gain"}
    assert torch.equal(found["matrix"], MATRIX) and torch.equal(found["gain"], GAIN)


def test_what_is_no_whole_is_neither_written_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="matrix: expected 70 elements in all files together, got 40"):
        write(tmp_path, CUT[1:], None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(storage, "FILE_BYTES", 100)
    write(tmp_path, CUT, None)
    (tmp_path / "shard-00001-model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="matrix: expected 70 elements in all files together, got"):
        read(tmp_path, [part(5, 6, 0, 10)])


def test_another_tensor_is_refused(tmp_path: Path) -> None:
    write(tmp_path, CUT, None)
    with pytest.raises(ValueError, match=r"other: expected a tensor of shape \(1,\), got no such tensor"):
        read(tmp_path, [Rectangle("other", (1,), (0,), GAIN)])
    with pytest.raises(ValueError, match=r"matrix: expected a tensor of shape \(7, 11\), got \(7, 10\)"):
        read(tmp_path, [Rectangle("matrix", (7, 11), (0, 0), torch.empty(7, 11))])


def test_a_file_that_holds_code_is_not_run(tmp_path: Path) -> None:
    """A pickle under the name of a file of ours, which would make a folder if it were loaded."""
    victim = tmp_path / "victim"
    folder = tmp_path / "tensors"
    folder.mkdir()
    payload = b"cos\nmkdir\n(V" + str(victim).encode() + b"\ntR."
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(payload)
    with pytest.raises(Exception, match="header"):
        read(folder, [gain()])
    assert not victim.exists()
