"""Rows of token shards and their mixtures: complete in every epoch, and a function of (config, step) alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlm.config import Config
from nlm.data import ShardSource, ShardWriter, load_tokenizer
from nlm.data.corpus import Corpus
from nlm.data.mixture import BLOCK, Mixture
from nlm.data.shards import TokenShard
from nlm.train import passes

MakeConfig = Callable[..., Config]


def write(prefix: Path, *documents: Sequence[int], vocab_size: int = 30_000) -> str:
    with ShardWriter(prefix, vocab_size) as shard:
        for document in documents:
            shard.add_document(document)
    return str(prefix)


def source(path: str, seq_len: int = 8, vocab_size: int = 30_000, seed: int = 0, mask: bool = False) -> ShardSource:
    return ShardSource(path, seq_len, vocab_size, seed, mask)


def firsts(path: str, numbers: Sequence[int], **settings: Any) -> list[int]:
    return source(path, **settings).rows(np.array(numbers)).tokens[:, 0].tolist()


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_every_row_once_an_epoch(seq_len: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(20 * seq_len + 1))  # a token is its own place; 20 rows
    rows = source(path, seq_len).rows(np.arange(60)).tokens
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(seq_len + 1))
    epochs = (rows[:, 0] // seq_len).reshape(3, 20)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_a_row_depends_on_seed_and_number_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(20 * 8 + 5))  # the last tokens fill no row
    whole = firsts(path, range(60), seed=9)
    for start in 0, 7, 19, 33:
        assert firsts(path, range(start, start + 20), seed=9) == whole[start : start + 20]
    assert firsts(path, range(60), seed=8) != whole


def test_the_order_is_frozen(tmp_path: Path) -> None:
    """A run resumed under a newer nlm must read what the old one would have read."""
    path = write(tmp_path / "a", range(1000))
    assert firsts(path, range(120, 124), seq_len=10, seed=1) == [90, 490, 670, 10]


def test_a_directory_is_one_corpus_of_all_its_shards(tmp_path: Path) -> None:
    """Each shard's rest is left out; no row has tokens of two."""
    write(tmp_path / "b", range(100, 100 + 8 * 3 + 2))
    write(tmp_path / "a", range(8 * 2 + 1))
    found = source(str(tmp_path))
    assert (found.n_rows, found.n_tokens) == (5, 43)
    np.testing.assert_array_equal(found.in_order(np.arange(5)).tokens[:, 0], [0, 8, 100, 108, 116])
    assert sorted(firsts(str(tmp_path), range(5))) == [0, 8, 100, 108, 116]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pairs of \.bin and \.idx in this directory, found none"):
        source(str(tmp_path / "empty"))


def test_a_corpus_of_one_row_is_enough_and_of_none_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(9))
    assert firsts(path, range(3)) == [0, 0, 0]
    with pytest.raises(ValueError, match=r"at least seq_len\+1 = 10 tokens, got 9"):
        source(path, seq_len=9)


def test_a_token_that_the_vocabulary_lacks_is_an_error_at_once_or_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a", range(100))
    with pytest.raises(ValueError, match=r"vocab_size: expected more than 99, a token in .*a, got 99"):
        source(path, vocab_size=99)
    monkeypatch.setattr("nlm.data.shards.LONG_SCAN", 50)  # a corpus too long to be scanned first
    found = source(path, vocab_size=90)
    assert found.in_order(np.arange(10)).tokens.max() == 80
    with pytest.raises(ValueError, match=r"vocab_size: expected more than 9., a token in .*a, got 90"):
        found.in_order(np.arange(12))


def test_where_documents_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(5), [], range(5, 11), range(11, 16), range(16, 40))
    rows = source(path, mask=True).in_order(np.arange(4))
    assert [np.flatnonzero(row).tolist() for row in rows.starts] == [[0, 5], [3, 8], [0], []], "the 9th is a target too"
    assert rows.tokens[1, 3] == 11
    assert not source(path).in_order(np.arange(4)).starts.any()


def test_a_row_is_text(shard: str) -> None:
    tokens = source(shard, seq_len=32, vocab_size=257).rows(np.arange(1000, 1008)).tokens
    assert tokens.dtype == np.int64 and tokens.shape == (8, 33)
    text = load_tokenizer("byte").decode(np.asarray(TokenShard(shard).tokens))
    for row in tokens:
        assert load_tokenizer("byte").decode(row) in text


def test_a_mixture_has_its_proportions_in_every_block_and_each_source_in_order() -> None:
    mixture = Mixture([7, 2.9, 0.1], seed=3)
    sources, numbers = mixture.places(0, 3 * BLOCK)
    for i, share in enumerate((0.7, 0.29, 0.01)):
        np.testing.assert_array_equal(numbers[sources == i], np.arange((sources == i).sum()))
        counts = [(sources[b * BLOCK : (b + 1) * BLOCK] == i).sum() for b in range(3)]
        assert counts[0] == counts[1] == counts[2]
        assert abs(counts[0] - share * BLOCK) < 1
    assert (sources[:BLOCK] != sources[BLOCK : 2 * BLOCK]).any()
    assert abs(np.bincount(sources[:1000]) - [700, 290, 10]).max() < 60  # mixed, not one after another


@pytest.mark.parametrize("start", [0, 1000, BLOCK - 3, 2 * BLOCK])
def test_places_depend_on_nothing_but_the_row(start: int) -> None:
    whole = Mixture([1, 2], 5).places(0, 2 * BLOCK + 10)
    part = Mixture([1, 2], 5).places(start, start + 10)
    for all_of, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(some, all_of[start : start + 10])
    counts = Mixture([1, 2], 5).counts(start)
    np.testing.assert_array_equal(counts, np.bincount(whole[0][:start], minlength=2))


def test_a_weight_too_small_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights of at least a 65536th of their sum, got 1e-09 .* for source 1"):
        Mixture([1, 1e-9], 0)


def corpus(make_config: MakeConfig, sources: object, **data: object) -> Corpus:
    train = {"steps": 4, "batch_tokens": 96, "seq_len": 8, "seed": 2}
    return Corpus(make_config({"vocab_size": 30_000}, train=train, data={"train": sources, **data}))


def test_parts_of_a_batch_make_the_batch_whatever_their_number(tmp_path: Path, make_config: MakeConfig) -> None:
    sources = [
        {"path": write(tmp_path / "a", range(500)), "weight": 3.0},
        {"path": write(tmp_path / "b", range(1000, 1300)), "weight": 1.0},
    ]
    whole = [corpus(make_config, sources).batch(step).tokens for step in (1, 2, 3, 40)]
    assert {int(tokens[0] >= 1000) for batch in whole for tokens in batch} == {0, 1}
    for parts in 2, 3, 12:
        mixed = corpus(make_config, sources)
        for step, batch in reversed(list(zip((1, 2, 3, 40), whole, strict=True))):
            found = [mixed.batch(step, part, parts).tokens for part in range(parts)]
            np.testing.assert_array_equal(np.concatenate(found), batch)


def test_epochs_count_each_source(tmp_path: Path, make_config: MakeConfig) -> None:
    a, b = write(tmp_path / "a", range(8 * 24 + 1)), write(tmp_path / "b", range(8 * 6 + 1))
    assert corpus(make_config, a).epochs(3) == {a: 1.5}  # 36 of 24 rows
    mixed = corpus(make_config, [{"path": a, "weight": 1.0}, {"path": b, "weight": 1.0}])
    n = sum((mixed.batch(step).tokens.max(1) > 0).sum() for step in range(1, 41))
    epochs = mixed.epochs(40)
    assert epochs[a] * 24 + epochs[b] * 6 == n == 480
    assert abs(epochs[a] * 24 - 240) < 40
    rows = mixed.rows(40)
    assert rows == {name: epochs[name] * length for name, length in ((a, 24), (b, 6))}
    assert passes(mixed, 40) == {f"epoch/{a}": epochs[a], f"epoch/{b}": epochs[b]} | {
        f"rows/{name}": n for name, n in rows.items()
    }
    assert passes(corpus(make_config, a), 3) == {"epoch": 1.5}


def test_without_weights_every_token_counts_the_same(tmp_path: Path, make_config: MakeConfig) -> None:
    a, b = write(tmp_path / "a", range(8 * 24)), write(tmp_path / "b", range(8 * 72))
    epochs = corpus(make_config, [{"path": a}, {"path": b}]).epochs(10_000)
    assert epochs[b] * 71 / (epochs[a] * 23) == pytest.approx(3, rel=1e-2)


def test_a_fingerprint_knows_every_change(tmp_path: Path, make_config: MakeConfig) -> None:
    path = write(tmp_path / "a", range(100), range(50))
    before = corpus(make_config, path).fingerprint
    assert json.loads(json.dumps(before)) == before == corpus(make_config, path).fingerprint
    for documents in ((range(101), range(50)), (range(50), range(100)), (range(100), range(1, 51))):
        write(tmp_path / "a", *documents)
        assert corpus(make_config, path).fingerprint != before
