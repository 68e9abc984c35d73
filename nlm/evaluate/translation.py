"""BLEU and chrF of translations, direction by direction, beside what copying the source would score.

By sacreBLEU (Post 2018, arXiv:1804.08771), an extra: `pip install 'nlm[translation]'`. BLEU counts words as its
tokenizer 13a finds them; of Chinese as `zh` does, and of Japanese characters, since its words take a dictionary that is
no package. Such figures compare with each other only of one language.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import sacrebleu
from sacrebleu.metrics import BLEU, CHRF

TOKENIZERS = {"zh": "zh", "ja": "char"}
"""Of languages that put no spaces between words; of all others "13a"."""


@dataclass(frozen=True)
class Score:
    """Of a direction's segments: BLEU and chrF from 0 to 100, and those of the sources themselves."""

    segments: int
    bleu: float
    chrf: float
    copy_bleu: float
    copy_chrf: float


def score(source: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """Of texts [n], translated into `language`. Errors: ValueError for none, or not as many of each."""
    if not len(source) == len(hypotheses) == len(references) > 0:
        counts = f"{len(source)} sources, {len(hypotheses)} translations, {len(references)} references"
        raise ValueError(f"expected as many of each and at least one, got {counts}")
    bleu, chrf = BLEU(tokenize=tokenizer(language)), CHRF()
    return Score(
        len(source),
        *(metric.corpus_score(texts, [references]).score for texts in (hypotheses, source) for metric in (bleu, chrf)),
    )


def tokenizer(language: str) -> str:
    """What finds the words of a language, such as "de" or "zh_cn"."""
    return TOKENIZERS.get(language.lower().partition("_")[0], "13a")


def table(scores: Mapping[str, Score]) -> str:
    """Directions such as "de-en" and their scores -> rows in Markdown, the means of all at the end."""
    rows = {**scores, f"mean of {len(scores)}": _mean(list(scores.values()))}
    lines = ["| direction | segments | BLEU | chrF | BLEU of a copy | chrF of a copy |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {s.segments} | {s.bleu:.1f} | {s.chrf:.1f} | {s.copy_bleu:.1f} | {s.copy_chrf:.1f} |"
        for name, s in rows.items()
    ]
    used = {tokenizer(name.partition("-")[2]): name.partition("-")[2] for name in scores}
    words = ", ".join(f"{kind} ({language})" if kind != "13a" else kind for kind, language in sorted(used.items()))
    return "\n".join([*lines, "", f"sacreBLEU {sacrebleu.__version__}; words by {words}."])


def _mean(scores: Sequence[Score]) -> Score:
    segments, *values = zip(*map(astuple, scores), strict=True)
    return Score(sum(segments), *(sum(of) / len(of) for of in values))
