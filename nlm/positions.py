"""Positions: rotary and sinusoidal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34): pair i of position t turns by t · base^(-2i/Dh).

    A pair is a channel and its neighbour (`interleaved`, as in the paper) or its counterpart in the other half
    of the head (as in Llama). The tables [S 1 Dh] are shared by all layers and both carry the sign of the
    rotation, so that turning x is x · cos + swap(x) · sin.
    """

    def __init__(self, head_dim: int, seq_len: int, base: float, interleaved: bool) -> None:
        super().__init__()
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved
        shape = (seq_len, 1, head_dim)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.initial: dict[str, Callable[[], Tensor]] = {
            "cos": lambda: self._tables(torch.arange(seq_len))[0],
            "sin": lambda: self._tables(torch.arange(seq_len))[1],
        }

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[… S] -> cos, sin, each [… S 1 Dh], in float64."""
        channel = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions[..., None] * self.base ** (-channel / self.head_dim)  # [… S Dh/2]
        return self._spread(angles.cos(), 1.0), self._spread(angles.sin(), -1.0)

    def _spread(self, table: Tensor, sign: float) -> Tensor:
        pair = torch.stack([sign * table, table], dim=-1 if self.interleaved else -2)
        return pair.flatten(-2)[..., None, :]  # [… S Dh/2] -> [… S 1 Dh]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[B S] -> cos, sin, each [B S 1 Dh], of positions that may be beyond the tables."""
        cos, sin = self._tables(positions)
        return cos.to(self.cos.dtype), sin.to(self.sin.dtype)

    def forward(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """-> cos, sin, each [S 1 Dh]."""
        if seq_len > self.cos.shape[0]:
            raise ValueError(f"{seq_len} positions asked of a model made for {self.cos.shape[0]}")
        return self.cos[:seq_len], self.sin[:seq_len]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B S H Dh], tables [S 1 Dh] or [B S 1 Dh] -> [B S H Dh]."""
    if interleaved:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # [B S H Dh/2 2]
    else:
        swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def sinusoidal(seq_len: int, dim: int) -> Tensor:
    """-> [S D]: sin and cos of t / 10000^(2i/D) in alternating channels (Vaswani et al. 2017, section 3.5)."""
    channel = torch.arange(0, dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), 10_000.0 ** (-channel / dim))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :dim]
