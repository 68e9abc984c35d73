"""Steps that are better left out: a loss or gradient that is not finite, or far above those before.

The decision is made on the device, from numbers that are the same on every rank: no rank waits for another, nor the
host for the device. The host reads what was decided when it logs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nlm.config import FaultsConfig


class Judged(NamedTuple):
    """A step, and whether its update was left out."""

    step: int
    batch: int
    left_out: bool
    loss: float
    grad_norm: float


class Guard:
    """Judges every step by the loss and the logarithm of the gradient norm of the last `window` that were not left out.

    A norm varies by factors. When a model finds what to learn next, it grows threefold within a window: more than six
    standard deviations of the norm itself, and that for many steps, since none of them then widens the window.
    """

    def __init__(self, config: FaultsConfig, device: torch.device) -> None:
        self._config = config
        self._window = torch.zeros(config.window, 2, dtype=torch.float64, device=device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # updates, of them in the window, in a row out
        self._since: list[tuple[int, int, Tensor]] = []

    def judge(self, step: int, batch: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Mean loss [] and global gradient norm [] of a step -> [] bool: whether to leave its update out.

        Once `rollback_after` in a row were, so are all others: what went bad stays as it is until the host looks.
        """
        _, seen, in_a_row = self._counts
        norm = grad_norm.double()
        now = torch.stack([loss.double(), norm.clamp(min=1e-30).log()])
        limit = self._window.mean(0) + self._config.sigma * self._window.std(0)
        spike = (now > limit).any() & (seen >= self._config.window) & (self._config.sigma > 0)
        left_out = ~now.isfinite().all() | spike | (in_a_row >= self._config.rollback_after)
        place = (seen % self._config.window)[None]
        self._window.index_copy_(0, place, now.where(~left_out, self._window.index_select(0, place)[0])[None])
        self._counts += torch.stack([~left_out, ~left_out, left_out])
        self._counts[2] *= left_out
        self._since.append((step, batch, torch.stack([left_out.double(), now[0], norm])))
        return left_out

    def judged(self) -> list[Judged]:
        """Every step since this was asked last. It waits for the device."""
        if not self._since:
            return []
        verdicts = torch.stack([verdict for _, _, verdict in self._since]).tolist()
        steps = [(step, batch) for step, batch, _ in self._since]
        self._since = []
        return [Judged(*at, bool(out), *numbers) for at, (out, *numbers) in zip(steps, verdicts, strict=True)]

    @property
    def in_a_row(self) -> int:
        """How many of the last steps were left out, with none between them. It waits for the device."""
        return int(self._counts[2])

    @property
    def updates(self) -> int:
        """How many steps were not left out. It waits for the device."""
        return int(self._counts[0])

    def state(self) -> dict[str, Tensor]:
        """In CPU memory."""
        return {"guard.window": self._window.cpu(), "guard.counts": self._counts.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._counts.copy_(state["guard.counts"])
        if self._window.shape == state["guard.window"].shape:
            self._window.copy_(state["guard.window"])
        else:
            self._counts[1] = 0  # another window, to be filled anew
        self._since = []
