"""Pairs for encoder–decoders out of a text, to try them with: a source is what comes before its target."""

from dataclasses import replace

import torch

from nlm.batch import Batch
from nlm.config import Config
from nlm.data.rank import RankData
from nlm.mesh import Mesh


class Pairs(RankData):
    """In the place of RankData. The rows are of several lengths, both in their sources and in their targets."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        source_len, train = config.source_len, config.train
        row = source_len + train.seq_len
        text = {
            "model": config.model.model_copy(update={"architecture": "decoder", "vocab_size": config.model.n_tokens}),
            "train": train.model_copy(update={"seq_len": row, "batch_tokens": config.batch_rows * row}),
        }
        super().__init__(config.model_copy(update=text), mesh)
        self.source_len, self.padding = source_len, config.model.padding

    def rows(self, batch: int) -> Batch:
        return pairs(super().rows(batch), self.source_len, self.padding)


def pairs(text: Batch, source_len: int, padding: int) -> Batch:
    """Rows [B T+S+1] of text -> sources [B T] and targets [B S+1], of lengths that depend on the text."""

    def shortened(tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        kept = length - tokens.sum(1, keepdim=True) % (length // 2)
        return tokens.where(torch.arange(length, device=tokens.device) < kept, padding)

    source, target = text.tokens[:, :source_len], text.tokens[:, source_len:]
    return replace(text, tokens=shortened(target), source=shortened(source), padding=padding)
