"""A batch of token rows, and what a model is to read and to predict of it."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nlm.anatomy import IGNORED


@dataclass(frozen=True)
class Batch:
    """Tokens [B S+1]; with a document mask also [B S+1], the document of its row that each is in, counted up from 0."""

    tokens: Tensor
    documents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> Tensor:
        """[B S]."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """[B S]: the token after each input; under the mask, IGNORED where that begins another document."""
        after = self.tokens[:, 1:]
        return (
            after if self.documents is None else after.where(self.documents[:, 1:] == self.documents[:, :-1], IGNORED)
        )

    @property
    def segments(self) -> Tensor | None:
        """[B S]: the document of each input."""
        return None if self.documents is None else self.documents[:, :-1]

    def n_targets(self) -> Tensor:
        """[]: how many targets there are to learn from, in float64, which holds their inverse well."""
        return (self.targets != IGNORED).sum(dtype=torch.float64)

    def chunk(self, parts: int) -> list[Self]:
        """The rows in `parts` equal parts."""
        tokens = self.tokens.chunk(parts)
        documents = [None] * len(tokens) if self.documents is None else self.documents.chunk(parts)
        return [type(self)(*pair) for pair in zip(tokens, documents, strict=True)]

    def to(self, device: torch.device) -> Self:
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        return type(self)(self.tokens.to(device, non_blocking=True), documents)
