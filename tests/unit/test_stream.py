"""Text that is tokenized as it comes: the same rows whatever the workers, and after every resume."""

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from nlm.config import Config
from nlm.data import load_tokenizer
from nlm.data.corpus import Corpus
from nlm.data.stream import StreamSource

SEQ_LEN = 64


@pytest.fixture(scope="module")
def speeches(plays: list[Path]) -> list[list[str]]:
    """Of three plays."""
    return [[s for s in play.read_text("utf-8").split("\n\n") if s.strip()][:400] for play in plays[:3]]


@pytest.fixture(scope="module")
def folder(speeches: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speeches")
    for i, play in enumerate(speeches):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": s, "n": 1}) + "\n" for s in play), "utf-8")
        pyarrow.parquet.write_table(pyarrow.table({"body": play}), folder / f"{i}.parquet", row_group_size=50)
        (folder / f"{i}.txt").write_text("\n\n".join(play), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlm.data.stream.CHUNK_CHARS", 3000)


def stream(files: str | Path, **settings: Any) -> StreamSource:
    return StreamSource([str(files)], "byte", SEQ_LEN, 257, 0, **settings)


def read(source: StreamSource, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    rows = source.rows(np.arange(start, stop))
    return rows.tokens, rows.starts


@pytest.mark.parametrize(("kind", "field"), [("jsonl", "text"), ("parquet", "body")])
def test_rows_are_the_documents_one_behind_the_other(
    kind: str, field: str, folder: Path, speeches: list[list[str]]
) -> None:
    documents = [text.encode() for play in speeches for text in play]
    expected = np.concatenate([np.append(np.frombuffer(d, np.uint8), 256).astype(np.int64) for d in documents])
    n = (len(expected) - 1) // SEQ_LEN
    tokens, starts = read(stream(folder / f"*.{kind}", text_field=field), 0, n)
    np.testing.assert_array_equal(tokens, np.lib.stride_tricks.sliding_window_view(expected, SEQ_LEN + 1)[::SEQ_LEN])
    at = np.cumsum([0] + [len(d) + 1 for d in documents])
    np.testing.assert_array_equal(starts[:, :-1].ravel().nonzero()[0], at[at < n * SEQ_LEN])


def test_a_text_file_is_one_document(folder: Path, speeches: list[list[str]]) -> None:
    tokens, starts = read(stream(folder / "*.txt"), 0, 200)
    assert load_tokenizer("byte").decode(tokens[:, :-1].ravel()) in "\n\n".join(speeches[0])
    assert starts.ravel().nonzero()[0].tolist() == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_with_exactly_the_next_token(workers: int, folder: Path) -> None:
    """From states that are JSON, in and between blocks and across the end of the files."""
    whole, starts = read(stream(folder / "*.jsonl", shuffle=4), 0, 5000)
    start, state = 0, None
    for stop in (1, 4990, 5000) if workers else (1, 4, 5, 7, 40, 400, 4990, 5000):
        source = stream(folder / "*.jsonl", shuffle=4, workers=workers)
        if state:
            source.load_state(json.loads(state))
        tokens, where = read(source, start, stop)
        np.testing.assert_array_equal(tokens, whole[start:stop])
        np.testing.assert_array_equal(where, starts[start:stop])
        start, state = stop, json.dumps(source.state())
    assert source.epochs(0) >= 1  # so the end was in it


def test_shuffled_blocks_hold_the_rows_of_the_text(folder: Path) -> None:
    plain, _ = read(stream(folder / "*.jsonl"), 0, 64)
    mixed, _ = read(stream(folder / "*.jsonl", shuffle=32), 0, 64)
    assert (plain != mixed).any()
    for block in plain[:32], plain[32:]:
        half, mixed = mixed[:32], mixed[32:]
        assert sorted(map(bytes, half)) == sorted(map(bytes, block))


def test_a_stream_in_a_mixture(folder: Path, shard: str, make_config: Callable[..., Config]) -> None:
    """A batch resumed from its state is the one that would have come, and the shard's rows need no state."""
    files = {"files": [str(folder / "*.jsonl")], "tokenizer": "byte", "weight": 1.0, "workers": 0}
    config = make_config(
        {"vocab_size": 257},
        train={"steps": 9, "batch_tokens": 256, "seq_len": 32},
        data={"train": [{"path": shard, "weight": 1.0}, files]},
    )
    corpus = Corpus(config)
    assert not corpus.seeks
    batches = [corpus.batch(step).tokens for step in range(1, 5)]
    state = json.loads(json.dumps(corpus.state()))
    rest = [corpus.batch(step).tokens for step in range(5, 8)]
    resumed = Corpus(config)
    resumed.load_state(state)
    for step, expected in enumerate(rest, 5):
        np.testing.assert_array_equal(resumed.batch(step).tokens, expected)
    assert all((a != b).any() for a, b in zip(batches, rest, strict=False))


def test_batches_that_nobody_asks_for_are_read_over(folder: Path, make_config: Callable[..., Config]) -> None:
    """Also after a resume, as when a run has gone back and leaves some out."""
    text = {"files": [str(folder / "*.jsonl")], "tokenizer": "byte", "weight": 1.0, "workers": 0, "shuffle": 5}

    def corpus() -> Corpus:
        return Corpus(make_config({"vocab_size": 257}, data={"train": [text]}))

    one_by_one, leaping, resumed = corpus(), corpus(), corpus()
    batches = [one_by_one.batch(number).tokens for number in range(1, 8)]
    np.testing.assert_array_equal(leaping.batch(2).tokens, batches[1])
    resumed.load_state(json.loads(json.dumps(leaping.state())))
    for other in (leaping, resumed):
        np.testing.assert_array_equal(other.batch(5).tokens, batches[4])
        np.testing.assert_array_equal(other.batch(7).tokens, batches[6])


class Flaky(SimpleHTTPRequestHandler):
    """Serves ranges as a store does, except for so many requests, of the whole file, of a range and of a path each."""

    broken: dict[bool | str, int] = {}

    def do_GET(self) -> None:
        for kind in ("Range" in self.headers, self.path):
            if Flaky.broken.get(kind):
                Flaky.broken[kind] -= 1
                self.send_error(503)
                return
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("nlm.data.stream.RETRY_S", (0.01,) * 5)
    monkeypatch.setattr("datasets.config.STREAMING_READ_RETRY_INTERVAL", 0.01)  # it has tries of its own
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, directory=folder)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_remote_file_is_read_like_a_local_one_and_again_when_it_fails(server: str, folder: Path) -> None:
    source = stream(f"{server}/0.jsonl")
    Flaky.broken = {False: 3, True: 2}
    np.testing.assert_array_equal(read(source, 0, 50)[0], read(stream(folder / "0.jsonl"), 0, 50)[0])
    assert Flaky.broken == {False: 0, True: 0}


def test_every_remote_file_may_fail_and_none_is_read_twice(
    server: str, folder: Path, speeches: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as often as there are tries, which begin anew with every chunk that was whole."""
    for which in ("READ", "OPEN"):
        monkeypatch.setattr(f"datasets.config.STREAMING_{which}_MAX_RETRIES", 1)
    names = [f"{i}.jsonl" for i in range(3)]
    source = StreamSource([f"{server}/{name}" for name in names], "byte", SEQ_LEN, 257, 0)
    local = StreamSource([str(folder / name) for name in names], "byte", SEQ_LEN, 257, 0)
    rows = [sum(len(speech.encode()) + 1 for speech in play) // SEQ_LEN for play in speeches]
    start = 0
    for i, n in enumerate(rows):
        stop = sum(rows[:i]) + n // 2  # not yet near the next file
        np.testing.assert_array_equal(read(source, start, stop)[0], read(local, start, stop)[0])
        assert not any(Flaky.broken.values())
        start, Flaky.broken = stop, {f"/{i + 1}.jsonl": 4}


def test_a_remote_file_that_cannot_be_read_is_an_error(server: str) -> None:
    with pytest.raises(ValueError, match=r"data\.train, http://.*/missing\.jsonl: cannot be read on"):
        read(stream(f"{server}/missing.jsonl"), 0, 1)


def test_a_fingerprint_knows_the_files_and_their_sizes(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "0.jsonl", tmp_path)
    before = stream(tmp_path / "*.jsonl").fingerprint()
    assert before == json.loads(json.dumps(before)) == stream(tmp_path / "*.jsonl").fingerprint()
    with open(tmp_path / "0.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    longer = stream(tmp_path / "*.jsonl").fingerprint()
    shutil.copy(folder / "1.jsonl", tmp_path)
    assert len({json.dumps(f) for f in (before, longer, stream(tmp_path / "*.jsonl").fingerprint())}) == 3


def test_bad_input_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected files ending in \.txt, \.md, \.jsonl, \.parquet, .* got 'a\.csv'"):
        stream("a.csv")
    with pytest.raises(ValueError, match="expected files of one format in a source, got json and text"):
        StreamSource(["a.jsonl", "b.txt.gz"], "byte", 8, 257, 0)
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 257, the size of byte, got 256"):
        StreamSource(["a.jsonl"], "byte", 8, 256, 0)
    with pytest.raises(ValueError, match="expected text in field 'n', got int; name the one"):
        read(stream(folder / "0.jsonl", text_field="n"), 0, 1)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read on"):
        read(stream(tmp_path / "nowhere.jsonl"), 0, 1)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"empty\.jsonl: empty corpus"):
        read(stream(tmp_path / "empty.jsonl"), 0, 1)
    (tmp_path / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut')
    with pytest.raises(ValueError, match=r"cut\.jsonl: cannot be read on"):
        read(stream(tmp_path / "cut.jsonl"), 0, 9)
    whole = gzip.compress(b'{"text": "packed"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: cannot be read on"):
        read(stream(tmp_path / "cut.jsonl.gz"), 0, 9)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1, and nothing more")
    with pytest.raises(ValueError, match=r"cut\.parquet: cannot be read on"):
        read(stream(tmp_path / "cut.parquet"), 0, 1)
