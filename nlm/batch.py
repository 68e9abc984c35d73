"""A batch of token rows, and what a model is to read and to predict of it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from nlm.anatomy import IGNORED

KEPT = -1
"""In the place of a stand-in: the token itself is read, and not to be predicted."""


@dataclass(frozen=True)
class Batch:
    """Tokens [B S+1]; with a document mask also [B S+1], the document of its row that each is in, counted up from 0.

    `keys` [B] are the rows' own random numbers, for what is to be random in training. `stand_ins` [B S+1] are of an
    encoder's batch: what is read in the place of each token that is to be predicted, and KEPT elsewhere. Of the rows
    where `counted` [B] is false nothing is to be predicted. `source` [B T] is what an encoder–decoder's encoder reads
    beside the tokens, its target; in both the token `padding` fills what a row does not, and is not to be predicted.
    """

    tokens: Tensor
    documents: Tensor | None = None
    keys: Tensor | None = None
    stand_ins: Tensor | None = None
    counted: Tensor | None = None
    source: Tensor | None = None
    padding: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> Tensor:
        """[B S]."""
        tokens = self.tokens if self.stand_ins is None else self.stand_ins.where(self.stand_ins != KEPT, self.tokens)
        return tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """[B S]: the token after each input; under the mask, IGNORED where that begins another document. Of an encoder,
        the tokens that something stands in for, and IGNORED elsewhere, as everywhere for padding."""
        if self.stand_ins is not None:
            targets = self.tokens.where(self.stand_ins != KEPT, IGNORED)[:, :-1]
        elif self.documents is not None:
            targets = self.tokens[:, 1:].where(self.documents[:, 1:] == self.documents[:, :-1], IGNORED)
        else:
            targets = self.tokens[:, 1:]
        if self.padding is not None:
            targets = targets.where(targets != self.padding, IGNORED)
        return targets if self.counted is None else targets.where(self.counted[:, None], IGNORED)

    @property
    def segments(self) -> Tensor | None:
        """[B S]: the document of each input."""
        return None if self.documents is None else self.documents[:, :-1]

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """What a model takes to give its loss."""
        return self.inputs, self.source, self.targets, self.segments, self.keys

    @property
    def has_ignored(self) -> bool:
        """Whether some targets may be IGNORED."""
        return self.padding is not None or not (self.documents is self.stand_ins is self.counted is None)

    def n_targets(self) -> Tensor:
        """[]: how many targets there are to learn from, in float64, which holds their inverse well."""
        return (self.targets != IGNORED).sum(dtype=torch.float64)

    def n_rows(self) -> Tensor:
        """[]: how many rows have a target, in float64."""
        return (self.targets != IGNORED).any(1).sum(dtype=torch.float64)

    def digest(self, first_row: int) -> Tensor:
        """[] int64: of all tokens, each at its place in the whole batch, of which these are the rows from `first_row`
        on; those of the parts add up to that of the batch, in the lower 32 bits."""
        tokens = self.tokens if self.source is None else torch.cat([self.tokens, self.source], 1)
        if self.padding is not None:  # empty rows, which some layouts need, count nothing
            tokens = tokens.where(self.tokens[:, 1:2] != self.padding, -1)
        places = torch.arange(tokens.numel(), device=tokens.device) + first_row * tokens.shape[1]
        mixed = places * 0x9E3779B97F4A7C1  # a multiplier whose bits are well mixed; products wrap around
        mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B
        return ((tokens.flatten() + 1) * (mixed | 1)).sum() & 0xFFFFFFFF

    def chunk(self, parts: int) -> list[Self]:
        """The rows in `parts` equal parts."""
        sizes = [len(part) for part in self.tokens.chunk(parts)]
        ends = accumulate(sizes)
        return [self._each(lambda x, end=end, n=n: x[end - n : end]) for end, n in zip(ends, sizes, strict=True)]  # type: ignore[misc]

    def first(self, n_rows: int) -> Self:
        return self._each(lambda tensor: tensor[:n_rows])

    def only(self, counted: Tensor) -> Self:
        """The same rows, of which only those are to be predicted where `counted` [B] is true."""
        return replace(self, counted=counted)

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in tensors if isinstance(tensor, Tensor)}
        return replace(self, **changed)
