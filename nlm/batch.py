"""A batch of token rows, and what a model is to read and to predict of it."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nlm.anatomy import IGNORED

KEPT = -1
"""In the place of a stand-in: the token itself is read, and not to be predicted."""


@dataclass(frozen=True)
class Batch:
    """Tokens [B S+1]; with a document mask also [B S+1], the document of its row that each is in, counted up from 0.

    `keys` [B] are the rows' own random numbers, for what is to be random in training. `stand_ins` [B S+1] are of an
    encoder's batch: what is read in the place of each token that is to be predicted, and KEPT elsewhere.
    """

    tokens: Tensor
    documents: Tensor | None = None
    keys: Tensor | None = None
    stand_ins: Tensor | None = None

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
        the tokens that something stands in for, and IGNORED elsewhere."""
        if self.stand_ins is not None:
            return self.tokens.where(self.stand_ins != KEPT, IGNORED)[:, :-1]
        after = self.tokens[:, 1:]
        return (
            after if self.documents is None else after.where(self.documents[:, 1:] == self.documents[:, :-1], IGNORED)
        )

    @property
    def segments(self) -> Tensor | None:
        """[B S]: the document of each input."""
        return None if self.documents is None else self.documents[:, :-1]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What a model takes to give its loss."""
        return self.inputs, self.targets, self.segments, self.keys

    @property
    def has_ignored(self) -> bool:
        """Whether some targets may be IGNORED."""
        return self.documents is not None or self.stand_ins is not None

    def n_targets(self) -> Tensor:
        """[]: how many targets there are to learn from, in float64, which holds their inverse well."""
        return (self.targets != IGNORED).sum(dtype=torch.float64)

    def digest(self, first_row: int) -> Tensor:
        """[] int64: of all tokens, each at its place in the whole batch, of which these are the rows from `first_row`
        on; those of the parts add up to that of the batch, in the lower 32 bits."""
        places = torch.arange(self.tokens.numel(), device=self.tokens.device) + first_row * self.tokens.shape[1]
        mixed = places * 0x9E3779B97F4A7C1  # a multiplier whose bits are well mixed; products wrap around
        mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B
        return ((self.tokens.flatten() + 1) * (mixed | 1)).sum() & 0xFFFFFFFF

    def chunk(self, parts: int) -> list[Self]:
        """The rows in `parts` equal parts."""
        tensors = (self.tokens, self.documents, self.keys, self.stand_ins)
        chunks = [[None] * parts if tensor is None else tensor.chunk(parts) for tensor in tensors]
        return [type(self)(*part) for part in zip(*chunks, strict=True)]  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Self:
        tensors = (self.tokens, self.documents, self.keys, self.stand_ins)
        return type(self)(*(t if t is None else t.to(device, non_blocking=True) for t in tensors))  # type: ignore[arg-type]
