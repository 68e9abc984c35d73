"""How texts go on: tokens drawn at random or greedily, and beam search, of whatever tells the next token's logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nlm.random import WORD, hashed, uniform


class Decoder(Protocol):
    """A model and the texts that it reads, one a row. What it keeps of them, and what else it reads, is its own."""

    def start(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """B texts begin with these tokens, at least one each -> the logits of the next token of each [B V]."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Every text goes on with one token [B] -> likewise [B V]."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """From now on, row i is a text that goes on from what row rows[i] was; rows may come twice, or go."""
        ...


class Drawn(NamedTuple):
    """A token of text number `row`, and ln of the probability that the model gives it."""

    row: int
    token: int
    log_prob: float


@dataclass(frozen=True)
class Continuation:
    """Tokens that follow a prompt, with the one that ends a text where it `ended` so, and ln of the probability that
    the model gives them."""

    tokens: tuple[int, ...]
    log_prob: float
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """Tokens are drawn of softmax(logits / `temperature`), at 0 the likeliest is taken; of the `top_k` likeliest alone,
    and then of the fewest that together have the probability `top_p` (Holtzman et al. 2020, arXiv:1904.09751)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number from 0 on, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B V] -> [B V] in float64, of the tokens that are drawn from."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        ordered, order = (logits / self.temperature).sort(dim=1, descending=True, stable=True)
        p = ordered[:, : self.top_k].softmax(1)
        if self.top_p is not None:
            p = p.where(p.cumsum(1) - p < self.top_p, 0.0)
        return torch.zeros_like(logits).scatter_(1, order[:, : self.top_k], p / p.sum(1, keepdim=True))

    def draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """[B V], random numbers in [0, 1) [B] -> tokens [B]."""
        total = self.probabilities(logits).cumsum(1)
        return torch.searchsorted(total / total[:, -1:], numbers[:, None], right=True)[:, 0]


def sample(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end: int | None,
    sampling: Sampling,
    keys: Sequence[Sequence[int]],
) -> Iterator[Drawn]:
    """Tokens as they are drawn, until `end`, which is one of them, or the limit of tokens of the prompt.

    Each prompt goes on in so many texts as it has `keys`; the texts are numbered prompt after prompt. Chance depends on
    a text's key and the place of a token in it alone.
    """
    logits = _finite(decoder.start(prompts))
    of = [i for i, own in enumerate(keys) for _ in own]
    if len(of) > len(prompts):
        decoder.select(of)
        logits = logits[of]
    rows, seen = list(range(len(of))), [len(prompts[i]) for i in of]
    last = [len(prompts[i]) + limits[i] for i in of]
    all_keys = torch.tensor([key for own in keys for key in own], device=logits.device)
    while True:
        places = torch.tensor([seen[row] for row in rows], device=logits.device)
        chosen = sampling.draw(logits, uniform(all_keys[rows], places))
        log_probs = logits.double().log_softmax(1).gather(1, chosen[:, None])[:, 0]
        tokens = chosen.tolist()
        yield from map(Drawn, rows, tokens, log_probs.tolist())
        for row in rows:
            seen[row] += 1
        left = [i for i, row in enumerate(rows) if tokens[i] != end and seen[row] < last[row]]
        if not left:
            return
        if len(left) < len(rows):
            decoder.select(left)
            rows = [rows[i] for i in left]
        logits = _finite(decoder.step([tokens[i] for i in left]))


def text_key(seed: int, prompt: int, number: int) -> int:
    """The key of a text, in [0, 2³²): the sample of that number of the prompt of that number."""
    return hashed(f"{seed} {prompt} {number}") & WORD


@dataclass(frozen=True)
class Beams:
    """Beam search with `width` texts a prompt, ranked by ln P / lp, where lp = ((5 + n) / 6)^α of their n tokens and
    the `length_penalty` α (Wu et al. 2016, arXiv:1609.08144, eq. 14, without its coverage)."""

    width: int
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"beams: expected at least 1, got {self.width}")
        if not 0 <= self.length_penalty < float("inf"):
            raise ValueError(f"length_penalty: expected a number from 0 on, got {self.length_penalty}")

    def score(self, log_prob: float, n: int) -> float:
        """Of n tokens."""
        return log_prob / ((5 + n) / 6) ** self.length_penalty

    def rank(self, found: Continuation) -> float:
        return self.score(found.log_prob, len(found.tokens))


def beam_search(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end: int | None,
    beams: Beams,
) -> list[list[Continuation]]:
    """Of every prompt at most so many continuations as there are beams, the best first.

    A prompt is done when no text that goes on could still come among its best.
    """
    width, done = beams.width, [list[Continuation]() for _ in prompts]
    logits = _finite(decoder.start(prompts))
    live = {i: [Continuation((), 0.0, False)] for i in range(len(prompts))}
    while True:
        after = logits.double().log_softmax(1)  # [B V]
        sums = after + torch.tensor([[text.log_prob] for texts in live.values() for text in texts], device=after.device)
        rows, tokens, first = list[int](), list[int](), 0
        for i, texts in list(live.items()):
            of_prompt = sums[first : first + len(texts)].flatten()
            # At most one candidate of each text ends it: enough are left that go on.
            best = of_prompt.topk(min(2 * width, len(of_prompt)))
            places = [divmod(place, sums.shape[1]) for place in best.indices.tolist()]
            live[i] = []
            going = list[int]()
            for rank, ((row, token), log_prob) in enumerate(zip(places, best.values.tolist(), strict=True)):
                text = Continuation((*texts[row].tokens, token), log_prob, token == end)
                if text.ended or len(text.tokens) == limits[i]:
                    if rank < width:
                        done[i].append(text)
                elif len(live[i]) < width:
                    live[i].append(text)
                    going.append(first + row)
            done[i] = nlargest(width, done[i], key=beams.rank)
            first += len(texts)
            # None of more tokens than the limit, and probabilities only fall: that is the best there can be.
            hope = max((beams.score(text.log_prob, limits[i]) for text in live[i]), default=-torch.inf)
            if not live[i] or (len(done[i]) == width and beams.rank(done[i][-1]) >= hope):
                del live[i]
            else:
                rows += going
                tokens += [text.tokens[-1] for text in live[i]]
        if not live:
            return done
        decoder.select(rows)
        logits = _finite(decoder.step(tokens))


def _finite(logits: Tensor) -> Tensor:
    """Errors: FloatingPointError where there is nothing to choose from."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights are not, or it has diverged")
    return logits
