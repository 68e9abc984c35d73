"""What a trained encoder–decoder makes of texts, by beam search, and how good that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nlm.data.lookup import find_tokenizer
from nlm.data.pairs import Pairs, source_ids
from nlm.data.tokenizer import Ids, Tokenizer, language_tag, load_tokenizer
from nlm.decode.generate import CachedDecoder
from nlm.decode.search import Beams, beam_search
from nlm.evaluate.translation import Score, score
from nlm.model import Transformer
from nlm.parallel.engine import Engine

BEAMS = Beams(4, 0.6)
"""By which a model is judged (Wu et al. 2016, arXiv:1609.08144, section 7)."""


@dataclass(frozen=True)
class Translator:
    """A model and its tokenizer; sources are at most `source_len` tokens long, `batch` of them are read at once."""

    model: Transformer
    coder: Tokenizer
    source_len: int
    search: Beams
    batch: int = 64

    def texts(self, texts: list[str], language: str) -> list[str]:
        """Texts of any language -> in `language`; what is too long is cut. Errors: ValueError for one not learned."""
        tag = self.coder.special(language_tag(language))
        if tag is None:
            raise ValueError(f"--to: expected a language of the training, got {language!r}")
        return self.sources([source_ids(ids, tag, self.coder.eod, self.source_len) for ids in self.coder.encode(texts)])

    def sources(self, sources: Sequence[Ids]) -> list[str]:
        """What the encoder reads, from the tag to the end -> texts. Those of like length are read together."""
        found, order = [""] * len(sources), sorted(range(len(sources)), key=lambda i: len(sources[i]))
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            read = [sources[i].tolist() for i in some]
            decoder = CachedDecoder(self.model, self.coder.vocab_size, read)
            # No translation of an ordinary text is longer; what never ends would take all the time.
            limits = [min(self.model.design.seq_len, 2 * len(source) + 10) for source in read]
            texts = beam_search(decoder, [[self.coder.eod]] * len(some), limits, self.coder.eod, self.search)
            for i, (best, *_) in zip(some, texts, strict=True):
                found[i] = self.coder.decode(best.tokens)
        return found


def scores(translator: Translator, pairs: Pairs, segments: int | None = None) -> dict[str, Score]:
    """By direction, of all its pairs or the first so many."""
    found, decode = {}, translator.coder.decode
    for i, direction in enumerate(pairs.directions):
        sources, targets = zip(*(pairs.pair(i, n) for n in range(pairs.sizes[i])[:segments]), strict=True)
        translated, language = translator.sources(sources), direction.partition("-")[2]
        texts, references = ([decode(ids) for ids in of] for of in ([s[1:] for s in sources], targets))
        found[direction] = score(texts, translated, references, language)
    return found


def means(found: dict[str, Score]) -> dict[str, float]:
    """For a log: BLEU and chrF, the mean over directions and that of each."""
    named = {name: {direction: getattr(s, name) for direction, s in found.items()} for name in ("bleu", "chrf")}
    return {name: float(np.mean(list(of.values()))) for name, of in named.items()} | {
        f"{name}/{direction}": value for name, of in named.items() for direction, value in of.items()
    }


class ValidationScores:
    """Of a run's validation pairs, as it goes on; the rank that speaks translates, the others have nothing to say.

    Errors: ValueError where the tokenizer of the run's data is not there, or sacreBLEU is not.
    """

    def __init__(self, engine: Engine, pairs: Pairs) -> None:
        self.engine, self.pairs = engine, pairs
        self.coder = load_tokenizer(find_tokenizer(engine.config.data))

    def __call__(self) -> dict[str, float]:
        config, (model,) = self.engine.config, self.engine.models
        if not self.engine.mesh.speaks:
            return {}
        translator = Translator(model.eval(), self.coder, config.source_len, BEAMS)
        found = scores(translator, self.pairs, config.evaluate.translations)
        model.train()
        return means(found)
