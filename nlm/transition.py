"""A model whose norms lose their statistics, one after the other, while it trains.

A norm divides every token by that token's standard deviation; a frozen one divides all by the running average of these
(Heimersheim 2024, arXiv:2409.13710; its successor's code, submarat/removing-layer-norm). From the first layer to the
last, the norms of the feed-forward sublayers go over first, then what queries and keys read, then what values read, and
the final norm at the end. Until then the first token of a text, and the one that ends it, have averages of their own.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nlm.anatomy import Role
from nlm.config import ConfigError
from nlm.fold import readings
from nlm.model import Linear, Transformer
from nlm.norms.frozen import FrozenLayerNorm

ORDER = ("ffn", "qk", "v", "final")
"""Of what reads the norms, as it goes over to frozen ones."""
GAPS = (2, 2, 3)
"""Steps from one layer to the next, for the first three of them."""
THEN = {"ends": 2, "first": 10}
"""What happens to tokens with averages of their own: so many steps after the last event they get the others'."""
ORDINARY, END, FIRST = range(3)
"""Kinds of tokens."""
MOMENTUM = 0.9


class Event(NamedTuple):
    """At the beginning of `step`, counted from 1, `what` (of ORDER or THEN) goes over, in `layer`."""

    step: int
    what: str
    layer: int


def plan(n_layers: int, start: int = 20, gaps: Sequence[int] = GAPS, order: Sequence[str] = ORDER) -> list[Event]:
    """All events in their order. The defaults are those for GPT-2 small; the last is then at step 116 of 300.

    Errors: ConfigError for a start before anything was seen, gaps that are not three numbers, and another order than
    one of ORDER's four.
    """
    problems = []
    if start < 2:
        problems.append(f"--start: expected 2 or more, so that one step at least is averaged before it, got {start}")
    if len(gaps) != 3 or min(gaps) < 0:
        problems.append(f"--gaps: expected three numbers of steps, of {', '.join(ORDER[:3])}, got {list(gaps)}")
    if sorted(order) != sorted(ORDER):
        problems.append(f"--order: expected {','.join(ORDER)} in any order, got {','.join(order)}")
    if problems:
        raise ConfigError(problems)
    gap = dict(zip(ORDER, (*gaps, 0), strict=True))
    step, events = start, []
    for what in order:
        for layer in range(1 if what == "final" else n_layers):
            events.append(Event(step, what, layer))
            step += gap[what]
    for what, wait in THEN.items():
        step += wait
        events.append(Event(step, what, 0))
    return events


class Tokens:
    """Of which kind each token [B S] of the batch in hand is. `end` is the token that ends a text, where that is known.

    The first token of a row is FIRST, and where the model is told of documents the first of each.
    """

    kinds: Tensor

    def __init__(self, end: int | None) -> None:
        self.end, self.special = end, set(THEN)

    def look(self, model: nn.Module, arguments: tuple[Tensor | None, ...]) -> None:
        """Before the model's forward."""
        tokens, _, _, segments, _ = arguments
        assert tokens is not None
        self.kinds = torch.full_like(tokens, ORDINARY)
        if "ends" in self.special and self.end is not None:
            self.kinds[tokens == self.end] = END
        if "first" in self.special:
            self.kinds[:, 0] = FIRST
            if segments is not None:
                self.kinds[:, 1:][segments[:, 1:] != segments[:, :-1]] = FIRST


class Transition:
    """A norm on its way to a frozen one: γ (x - mean) / σ + b. σ is each token's own standard deviation or, for the
    readers that went over, the average `sigma` [3] for tokens of its kind. Of RMSNorm, all without the mean."""

    def __init__(self, norm: FrozenLayerNorm, tokens: Tokens, readers: Sequence[str]) -> None:
        self.norm, self.tokens, self.readers = norm, tokens, readers
        self.over: set[str] = set()
        self.sigma: Tensor | None = None
        self._seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """[B S D] -> [B S D], what the first of the readers gets; `other` keeps what the last does."""
        x = self.norm.centred(x)
        self.std = (x.square().mean(-1) + self.norm.eps).sqrt()  # [B S]
        if torch.is_grad_enabled() and not self.over:
            kinds = self.tokens.kinds.flatten()
            sums = self.std.new_zeros(2, 3)
            sums[0].index_add_(0, kinds, self.std.detach().flatten())
            sums[1].index_add_(0, kinds, torch.ones_like(kinds, dtype=sums.dtype))
            self._seen.append(sums)
        divided = [self.divided(x, reader) for reader in self.readers]
        self.other = divided[-1]
        return divided[0]

    def divided(self, x: Tensor, reader: str) -> Tensor:
        sigma = self.std
        if reader in self.over:
            assert self.sigma is not None, f"{reader} went over before anything was seen"
            sigma = self.sigma[self.tokens.kinds]
        return self.norm.scaled(x / sigma[..., None])

    def follow(self) -> None:
        """After a training step: σ̄ ← 0.9 σ̄ + 0.1 of the step's mean, a kind at a time. It begins with the first mean,
        of a kind that has not been seen with that of ordinary tokens."""
        if not self._seen:
            return
        sums, counts = torch.stack(self._seen).sum(0)
        means = sums / counts
        if self.sigma is None:
            self.sigma = means.where(counts > 0, means[ORDINARY])
        else:
            self.sigma = self.sigma.lerp(means, 1 - MOMENTUM).where(counts > 0, self.sigma)
        self._seen = []


class Removal:
    """What lies over a model of frozen norms while they become so; it begins as one of real norms with the same gains.

    `auxiliary` times the mean of (σ_t - target)² over tokens t is added to the loss, by its gradient alone: what is
    logged stays the model's. σ_t is of the stream that the final norm reads, the target its mean over ordinary tokens.
    """

    def __init__(self, model: Transformer, end: int | None, auxiliary: float = 0.0) -> None:
        self.auxiliary, self.tokens = auxiliary, Tokens(end)
        self.transitions: dict[tuple[str, int], Transition] = {}
        self._hooks = [model.register_forward_pre_hook(self.tokens.look)]
        if auxiliary:
            self._hooks.append(model.register_forward_hook(self._pull))
        for site, norm_name, linears in readings(model):
            norm = model.get_submodule(norm_name)
            assert isinstance(norm, FrozenLayerNorm)
            readers = {"attn": ("qk", "v"), "ffn": ("ffn",), "stack": ("final",)}[site.kind]
            transition = Transition(norm, self.tokens, readers)
            norm.forward = transition.__call__  # type: ignore[method-assign]
            for reader in readers:
                self.transitions[reader, site.layer] = transition
            for linear in map(model.get_submodule, linears if site.kind == "attn" else ()):
                assert isinstance(linear, Linear)
                if linear.roles["weight"] is Role.V:
                    self._hooks.append(linear.register_forward_pre_hook(partial(_instead, transition)))

    def happen(self, event: Event) -> None:
        if event.what in THEN:
            self.tokens.special.remove(event.what)
        else:
            self.transitions[event.what, event.layer].over.add(event.what)

    def follow(self) -> None:
        """After every training step."""
        for transition in self.transitions.values():
            transition.follow()

    @torch.no_grad()
    def end(self) -> None:
        """Every σ̄ becomes part of a gain; the model is on its own."""
        for transition in set(self.transitions.values()):
            assert transition.over == set(transition.readers) and transition.sigma is not None
            assert transition.norm.weight is not None
            transition.norm.weight.div_(transition.sigma[ORDINARY])
            del transition.norm.forward
        for hook in self._hooks:
            hook.remove()

    def _pull(self, model: nn.Module, arguments: object, loss: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return loss
        std = self.transitions["final", 0].std
        target = std.detach()[self.tokens.kinds == ORDINARY].mean()
        extra = self.auxiliary * (std - target).square().sum()  # the engine divides by the number of tokens
        return loss + (extra - extra.detach())


def _instead(transition: Transition, linear: nn.Module, inputs: object) -> tuple[Tensor]:
    return (transition.other,)
