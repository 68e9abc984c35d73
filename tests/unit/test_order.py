"""The random order of rows: a bijection, keyed by its seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlm.data import Permutation


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


def test_the_order_is_frozen() -> None:
    """A run resumed under a newer nlm must read what the old one would have read."""
    assert Permutation(10, 0)(np.arange(10)).tolist() == [6, 1, 7, 3, 9, 4, 5, 8, 2, 0]
