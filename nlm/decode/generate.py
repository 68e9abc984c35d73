"""Text that a trained decoder writes: the verb `nlm generate`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from nlm.cache import Cache
from nlm.data.tokenizer import Tokenizer
from nlm.decode.search import Beams, Continuation, Drawn, Sampling, beam_search, sample, text_key
from nlm.model import Transformer

REPLACEMENT = "\ufffd"
LONGEST_CHAR = 4
"""Bytes of a character in UTF-8."""


@dataclass(frozen=True)
class Generated(Continuation):
    """A continuation and, where there is a tokenizer, its text."""

    text: str | None


@final
class CachedDecoder:
    """A decoder with a cache, as the search wants it; of the vocabulary, tokens in range(n_tokens) alone. An
    encoder–decoder reads beside each text that starts one of the `sources`.

    Errors: ValueError for a model from which nothing can be generated.
    """

    def __init__(
        self, model: Transformer, n_tokens: int | None = None, sources: Sequence[Sequence[int]] | None = None
    ) -> None:
        refuse(model)
        self.model, self.n_tokens, self.sources = model, n_tokens, sources
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def start(self, texts: Sequence[Sequence[int]]) -> Tensor:
        self.cache = Cache([len(text) for text in texts])
        return self._next(texts, self.sources)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._next([[token] for token in tokens])

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)

    def _next(self, tokens: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None = None) -> Tensor:
        source = None if sources is None else self._filled(sources)
        with torch.compiler.set_stance("force_eager"):  # of growing shapes
            logits: Tensor = self.model(self._filled(tokens), source, cache=self.cache)
        return logits[:, 0, : self.n_tokens]

    def _filled(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[B S]: the longest, and others filled up on their right."""
        longest = max(map(len, texts))
        rows = [[*text, *[self.model.config.padding] * (longest - len(text))] for text in texts]
        return torch.tensor(rows, device=self.device)


def refuse(model: Transformer) -> None:
    """Errors: ValueError for a model from which nothing can be generated."""
    if model.config.is_encoder:
        raise ValueError(
            "model.architecture: expected a decoder, got an encoder, of which every position sees those after it; "
            "there is nothing to generate from"
        )
    if not (model.part.first and model.part.last) or model.tp.size > 1:
        raise ValueError("expected a whole model, got a rank's part of one; load it with nlm.load_checkpoint")
    if model.training:
        raise ValueError("expected a model that is evaluated, got one that is trained; call model.eval()")


def generate(
    model: Transformer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Tokenizer | None = None,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    n: int = 1,
    end: int | None = None,
    batch: int = 32,
    show: Callable[[str], object] | None = None,
) -> list[list[Generated]]:
    """Of every prompt, a text or tokens, `n` continuations: drawn at random (see Sampling; by default at temperature 1
    with seed 0), or with `beams` the best that beam search finds (see Beams), best first.

    A continuation is at most `max_tokens` long, by default as long as the context of training allows, and ends with
    the token `end`, by default the tokenizer's end of a text. `batch` prompts are computed at once; which of them are
    together does not change what is drawn. `show` gets the text of one prompt's one sample piece by piece.

    Errors: ValueError for a model from which nothing can be generated, a prompt without a token or with one that the
    model does not have, more positions than it has, choices that do nothing together; FloatingPointError where the
    model gives logits that are not finite.
    """
    if model.encoder is not None:
        raise ValueError("model.architecture: expected a decoder, got an encoder_decoder, which translates")
    refuse(model)
    search = _search(temperature, top_k, top_p, seed, beams, length_penalty, n)
    vocab_size = model.config.vocab_size
    if tokenizer is not None:
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {vocab_size} tokens, which the model has, got {tokenizer.vocab_size}; "
                f"give the tokenizer of its training"
            )
        vocab_size, end = tokenizer.vocab_size, tokenizer.eod if end is None else end
    tokens = [_tokens(prompt, tokenizer) for prompt in prompts]
    for i, prompt in enumerate(tokens):
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size:
            got = f"{min(prompt)} to {max(prompt)}" if prompt else "none"
            raise ValueError(f"prompt {i + 1}: expected tokens in range({vocab_size}), at least one, got {got}")
    limits = [_limit(model, len(prompt), max_tokens, i) for i, prompt in enumerate(tokens)]
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if show is not None and (tokenizer is None or len(prompts) != 1 or n != 1 or isinstance(search, Beams)):
        raise ValueError("show: expected a tokenizer, one prompt and one sample, drawn without beams")

    decoder, found = CachedDecoder(model, vocab_size), list[list[Generated]]()
    speaking = None if show is None or tokenizer is None else Speaking(tokenizer, tokens[0])

    def say(token: int) -> None:
        if show is not None and speaking is not None:
            show(speaking.add(token))

    for first in range(0, len(tokens), batch):
        here = slice(first, first + batch)
        if isinstance(search, Beams):
            ranked = beam_search(decoder, tokens[here], limits[here], end, search)
            continued = [texts[:n] for texts in ranked]
        else:
            numbers = range(first, first + len(tokens[here]))
            keys = [[text_key(seed or 0, i, j) for j in range(n)] for i in numbers]
            continued = _sampled(sample(decoder, tokens[here], limits[here], end, search, keys), keys, end, say)
        for prompt, texts in zip(tokens[here], continued, strict=True):
            found.append([Generated(t.tokens, t.log_prob, t.ended, _text(tokenizer, prompt, t.tokens)) for t in texts])
    if show is not None and speaking is not None:
        show(speaking.rest())
    return found


def _sampled(
    tokens: Iterable[Drawn], keys: list[list[int]], end: int | None, say: Callable[[int], None]
) -> list[list[Continuation]]:
    """What was drawn, by prompt and sample."""
    drawn: list[list[Drawn]] = [[] for own in keys for _ in own]
    for each in tokens:
        drawn[each.row].append(each)
        say(each.token)
    texts = iter(
        Continuation(tuple(d.token for d in row), sum(d.log_prob for d in row), row[-1].token == end) for row in drawn
    )
    return [[next(texts) for _ in own] for own in keys]


def _search(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    beams: int | None,
    length_penalty: float | None,
    n: int,
) -> Sampling | Beams:
    """Errors: ValueError for choices that are out of range, or would do nothing."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    chance = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if beams is not None:
        _refuse_idle(chance, "nothing is drawn at random with beams")
        search = Beams(beams, length_penalty or 0.0)
        if n > beams:
            raise ValueError(f"n: expected at most as many as there are beams, {beams}, got {n}")
        return search
    _refuse_idle({"length_penalty": length_penalty}, "it ranks what beams find; give beams")
    sampling = Sampling(1.0 if temperature is None else temperature, top_k, top_p)
    if temperature == 0:
        _refuse_idle({**chance, "temperature": None}, "nothing is drawn at random at temperature 0")
        if n > 1:
            raise ValueError(f"n: expected 1, as all would be the same at temperature 0, got {n}")
    return sampling


def _refuse_idle(given: dict[str, float | None], why: str) -> None:
    if idle := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(idle)}: {why}; leave it out")


def _tokens(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise ValueError("tokenizer: expected one for prompts of text, got none; give it, or prompts of tokens")
    # A text begins where one ended.
    return tokenizer.encode([prompt])[0].tolist() or [tokenizer.eod]


def _limit(model: Transformer, length: int, max_tokens: int | None, number: int) -> int:
    """How many tokens may follow a prompt of that length: the last of them is read by nobody, and needs no position."""
    room = model.design.seq_len + 1 - length
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    endless = model.position is None
    if (room < 1 and not (endless and max_tokens)) or (not endless and (max_tokens or 1) > room):
        raise ValueError(
            f"prompt {number + 1}: expected at most {model.design.seq_len} positions, those of training, "
            f"got a prompt of {length} tokens and max_tokens = {max_tokens}; "
            + ("give max_tokens to go beyond" if endless else "shorten them")
        )
    return max_tokens or room


class Speaking:
    """Tokens to text as they come, in pieces that nothing changes any more.

    A character may be of several tokens, and a tokenizer may write a token otherwise where a text begins. So what a
    token adds is seen behind the tokens before it, and what may be the beginning of a character is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        """From some place on where a character begins."""
        self._whole = len(prompt)
        """So many of them end with a character."""
        self._said = len(tokenizer.decode(self._tokens))
        """So many characters of their text have been given out."""

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), LONGEST_CHAR - 1)
        piece = text[self._said : len(text) - held]
        self._said += len(piece)
        if not held:
            del self._tokens[: self._whole]
            self._whole = len(self._tokens)
            self._said = len(self._tokenizer.decode(self._tokens))
        return piece

    def rest(self) -> str:
        piece = self._tokenizer.decode(self._tokens)[self._said :]
        self._said += len(piece)
        return piece


def _text(tokenizer: Tokenizer | None, prompt: Sequence[int], tokens: Sequence[int]) -> str | None:
    if tokenizer is None:
        return None
    speaking = Speaking(tokenizer, prompt)
    return "".join([*map(speaking.add, tokens), speaking.rest()])
