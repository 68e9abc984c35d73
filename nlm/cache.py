"""What a decoder keeps of the positions it has seen, so that each that follows costs no more than itself."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nlm.anatomy import Site


class Cache:
    """Of texts, one a row, what attention keeps at every site: tensors [B C …] in which slot t is for position t.

    Beside these stands what does not change from then on, such as what an encoder has made of a source.

    At first come the texts' beginnings, of `lengths` tokens each, padded on their right to the longest; then, for all
    rows alike, the tokens after. What a padded position leaves is in slots that its row has yet to reach, where nobody
    looks before they are written anew.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        """How many positions each row has, or is to have after the first forward."""
        self.width = 0
        """Slots in use: the most positions of a row, those included that now come."""
        self.positions = self.last = self._rows = torch.empty(0, dtype=torch.int64)
        self._kept: dict[Site, list[Tensor]] = {}
        self._once: dict[Site | str, tuple[Tensor, ...]] = {}

    def enter(self, n: int, device: torch.device) -> Tensor | None:
        """The next n tokens of every row come: sets their `positions` [B n], and of each row the index of the `last`
        that counts [B] -> who sees whom [B 1 n T], or None where each sees itself and those before."""
        new = torch.arange(n, device=device)
        self._rows = torch.arange(len(self.lengths), device=device)[:, None]
        if not self.width:
            if not self.lengths or min(self.lengths) < 1 or max(self.lengths) != n:
                raise ValueError(f"expected rows of 1 to {n} tokens, one of {n} among them, got {self.lengths}")
            self.width = n
            self.positions = new.expand(len(self.lengths), n)
            self.last = torch.tensor(self.lengths, device=device) - 1
            return None
        self.positions = torch.tensor(self.lengths, device=device)[:, None] + new
        self.lengths = [length + n for length in self.lengths]
        self.width = max(self.lengths)
        self.last = new[-1:].expand(len(self.lengths))
        return torch.arange(self.width, device=device) <= self.positions[:, None, :, None]

    def keep(self, site: Site, *new: Tensor) -> tuple[Tensor, ...]:
        """What the site has of the positions that come [B n …] -> what it has of all [B T …].

        Room doubles when it is used up: a position costs what it takes, not what was there before.
        """
        kept = self._kept.get(site) or self._kept.setdefault(site, [x[:, :0] for x in new])
        if self.width > (room := kept[0].shape[1]):
            # Zeros: of a slot without weight, memory as it was could still make NaN.
            kept[:] = [
                torch.cat([old, x.new_zeros(len(x), max(self.width, 2 * room) - room, *x.shape[2:])], 1)
                for old, x in zip(kept, new, strict=True)
            ]
        for old, x in zip(kept, new, strict=True):
            old[self._rows, self.positions] = x
        return tuple(x[:, : self.width] for x in kept)

    def once(self, what: Site | str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tensors [B …] that are made at the first forward and stay."""
        if what not in self._once:
            self._once[what] = make()
        return self._once[what]

    def select(self, rows: Sequence[int]) -> None:
        """Row i goes on from what row rows[i] was."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[row] for row in rows]
        for site, kept in self._kept.items():
            index = torch.tensor(rows, device=kept[0].device)
            self._kept[site] = [x.index_select(0, index) for x in kept]
        for what, made in self._once.items():
            index = torch.tensor(rows, device=made[0].device)
            self._once[what] = tuple(x.index_select(0, index) for x in made)
