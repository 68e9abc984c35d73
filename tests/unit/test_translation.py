"""Scores of translations: BLEU by its definition, the words of each language, and what copying the source is worth."""

import math
from collections import Counter

import pytest

from nlm.evaluate.translation import Score, score, table

ENGLISH = ["the red house by the sea", "we wait for the last train to the north", "no one came to the door at night"]
GERMAN = ["das rote Haus am Meer", "wir warten auf den letzten Zug nach Norden", "niemand kam bei Nacht an die Tür"]
FOUND = ["the red house near the sea", "we wait for the train to the north", "no one came to the door"]


def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(hypotheses: list[list[str]], references: list[list[str]]) -> float:
    """Papineni et al. 2002, section 2.3, of words; without smoothing, so some four words must match."""
    logs = []
    for n in range(1, 5):
        sides = [(grams(h, n), grams(r, n)) for h, r in zip(hypotheses, references, strict=True)]
        matches = sum((found & given).total() for found, given in sides)
        logs.append(math.log(matches / sum(found.total() for found, _ in sides)))
    long, short = (sum(map(len, side)) for side in (references, hypotheses))
    return 100 * math.exp(min(0, 1 - long / short) + sum(logs) / 4)


def test_bleu_is_as_defined() -> None:
    words = [[text.split() for text in texts] for texts in (FOUND, ENGLISH)]
    found = score(GERMAN, FOUND, ENGLISH, "en")
    assert found.bleu == pytest.approx(bleu(*words))
    assert found.segments == 3 and found.copy_bleu < 5 < found.bleu < 100
    assert found.copy_chrf < found.chrf < 100


def test_a_perfect_translation_and_a_copy() -> None:
    perfect = score(ENGLISH, GERMAN, GERMAN, "de")
    copied = score(ENGLISH, ENGLISH, GERMAN, "de")
    assert (perfect.bleu, perfect.chrf) == (pytest.approx(100), pytest.approx(100))
    assert (copied.bleu, copied.chrf) == (perfect.copy_bleu, perfect.copy_chrf)


@pytest.mark.parametrize(
    ("language", "found", "reference"),
    [
        ("ja", "私は駅で列車を待っています", "私は駅で電車を待っています"),
        ("zh", "我们在车站等火车已经很久了", "我们在车站等汽车已经很久了"),
        ("zh_cn", "我们在车站等火车已经很久了", "我们在车站等汽车已经很久了"),
    ],
)
def test_characters_count_where_no_spaces_part_words(language: str, found: str, reference: str) -> None:
    """By words, two sentences that differ in one character would have nothing in common."""
    expected = bleu([list(found)], [list(reference)])
    assert score([reference], [found], [reference], language).bleu == pytest.approx(expected)
    assert score([reference], [found], [reference], "de").bleu == 0


def test_the_table_has_every_direction_and_the_mean() -> None:
    rows = table({"en-de": Score(100, 20.0, 40.0, 1.0, 10.0), "de-ja": Score(50, 10.04, 30.0, 3.0, 20.0)}).splitlines()
    assert "| en-de | 100 | 20.0 | 40.0 | 1.0 | 10.0 |" in rows and "| de-ja | 50 | 10.0 | 30.0 | 3.0 | 20.0 |" in rows
    assert "| mean of 2 | 150 | 15.0 | 35.0 | 2.0 | 15.0 |" in rows
    assert rows[-1].endswith("; words by 13a, char (ja).")


def test_as_many_translations_as_references() -> None:
    with pytest.raises(ValueError, match="got 3 sources, 2 translations, 3 references"):
        score(GERMAN, FOUND[:2], ENGLISH, "en")
    with pytest.raises(ValueError, match="at least one"):
        score([], [], [], "en")
