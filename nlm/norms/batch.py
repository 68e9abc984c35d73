"""Norms by each channel's statistics over all tokens of the batches: PowerNorm, unified normalization, BatchNorm.

As published they look at the whole batch, in a decoder also at the tokens that it is to predict. In the causal form,
which two of them have, statistics are those of the steps before, constants to the gradient.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.autograd import Function

from nlm.norms.token import ChannelNorm, NormSite, precise, sum_squares
from nlm.parallel.tensor import Ranks, reduce

MOMENTUM = 0.9
"""How much of a running average is left after a step."""


class BatchStatistics(ChannelNorm):
    """γ z + b, with z [B S D] by statistics of each channel, in buffers [D] that go from step to step (`state`).

    A forward in training adds what it has seen to `observed`, weighed by its tokens; after the step, `advance` makes
    the next state of the mean over all microbatches and ranks (see optim/running.py).
    """

    has_causal_form = True
    observed: Tensor
    count: Tensor
    updates: Tensor

    def __init__(self, at: NormSite, published: bool, state: Mapping[str, float], n_observed: int = 1) -> None:
        super().__init__(at)
        self.published, self.state = published, tuple(state)
        self.joined: tuple[Ranks, ...] = (*at.data, at.tp) if at.tp.sequence and at.width.is_whole else at.data
        self.n_joined = prod([ranks.size for ranks in self.joined])
        self.n_parts = prod([ranks.size for ranks in at.data])
        """In how many parts each batch is; a rank's loss is the batch's times their number."""
        for name, value in state.items():
            self.register_buffer(name, torch.empty(len(at.width)))
            self.spans[name], self.initial[name] = (at.width,), value
        for name, shape in {"observed": (n_observed, len(at.width)), "count": (), "updates": ()}.items():
            self.register_buffer(name, torch.empty(shape), persistent=False)
            self.initial[name] = 0.0

    @abstractmethod
    def advance(self, state: Mapping[str, Tensor], means: Tensor, pull: Tensor, update: Tensor) -> dict[str, Tensor]:
        """State [N] of all such norms of the model together, what they observed [k N] -> the state after `update` [],
        counted from 1.

        `pull` is the mean over the tokens of the gradient by z times z, 0 in the causal form.
        """

    def batch_mean(self, x: Tensor) -> Tensor:
        """[B S D] -> [D], as published over all ranks."""
        mean = x.mean((0, 1))
        for ranks in self.joined if self.published else ():
            mean = ranks.sum(mean) / ranks.size
        return mean

    @torch.no_grad()
    def observe(self, x: Tensor, *means: Tensor) -> None:
        """Keeps means [D] over the tokens of x [B S D]."""
        n = x.shape[0] * x.shape[1]
        if self.published:  # its one forward a step may be computed again
            self.observed.zero_()
            self.count.zero_()
        self.observed += torch.stack(means) * n
        self.count += n


class QuadraticMean(BatchStatistics):
    """z = x / sqrt(v + eps), where v comes of mean squares of the channels; by default `published` in an encoder."""

    calibrates = True

    def entering(self, x: Tensor) -> Tensor:
        """What is done to each token before."""
        return precise(x)

    def mean_square(self, x: Tensor) -> Tensor:
        """[B S D] -> [D]."""
        return self.batch_mean(x.detach().square())

    def forward(self, x: Tensor) -> Tensor:
        x = self.entering(x)
        if self.training:
            m = self.mean_square(x)
            self.observe(x, m)
            if self.published:
                return self.published_form(x, m)
        return self.scaled(x * (self.settled() + self.eps).rsqrt())

    @abstractmethod
    def settled(self) -> Tensor:
        """[D]: v of the state alone."""

    @abstractmethod
    def published_form(self, x: Tensor, m: Tensor) -> Tensor:
        """γ z + b in training, with the batch's own mean square m [D]."""


class PowerNorm(QuadraticMean):
    """Each token divided by its root mean square, then each channel by φ, its running root mean square (Shen et al.
    2020, arXiv:2003.07845, algorithm 2, and their code, which updates φ twice in each step of the warmup).

    `published`: by the batch's own in the first `warmup_steps`; the gradient is that of the batch's own always, with a
    running mean ν in the place of what would follow from it.
    """

    phi: Tensor
    nu: Tensor

    def __init__(self, at: NormSite, *, published: bool | None = None, warmup_steps: NonNegativeInt = 4000) -> None:
        published = _is_encoder(at) if published is None else published
        super().__init__(at, published, {"phi": 1.0} | ({"nu": 0.0} if published else {}))
        self.warmup_steps = warmup_steps

    def entering(self, x: Tensor) -> Tensor:
        x = precise(x)
        return x * (sum_squares(x, self.width, self.tp) / self.width.full + self.eps).rsqrt()

    def settled(self) -> Tensor:
        return self.phi

    def published_form(self, x: Tensor, m: Tensor) -> Tensor:
        v = m.where(self.updates < self.warmup_steps, self.phi)
        pull = (1 - MOMENTUM) * self.n_parts * self.nu
        return self.scaled(_PowerNorm.apply(x, (v + self.eps).rsqrt(), (m + self.eps).rsqrt(), pull))

    def advance(self, state: Mapping[str, Tensor], means: Tensor, pull: Tensor, update: Tensor) -> dict[str, Tensor]:
        phi, (m,) = state["phi"], means
        if not self.published:
            return {"phi": _average(phi, m)}
        warm = update <= self.warmup_steps
        z_square = m / (m.where(warm, phi) + self.eps)
        nu = state["nu"] + pull - (1 - MOMENTUM) * state["nu"] * z_square
        return {"phi": _average((phi + (m - phi) / update).where(warm, phi), m), "nu": nu}

    def calibrated(self, x: Tensor) -> dict[str, Tensor]:
        return {"phi": self.mean_square(self.entering(x))}


class UnifiedNorm(QuadraticMean):
    """Unified normalization, UN: v is the geometric mean of the last four mean squares (Yang et al. 2022,
    arXiv:2208.01313, section 3, and their code; without its filter of outliers, which is off for text).

    `published`: of the batch's own and the three before, but before `warmup_steps` of the batch's own alone; the
    gradient is made less by a running mean κ, and grows with v over its running mean ρ, by which it is evaluated.
    """

    rho: Tensor
    kappa: Tensor
    WINDOW = 4
    LEVEL_STEPS = 1000
    """Until then at least the gradient does not follow v."""

    def __init__(self, at: NormSite, *, published: bool | None = None, warmup_steps: NonNegativeInt = 4000) -> None:
        published = _is_encoder(at) if published is None else published
        names = [f"{kind}{i}" for kind in ("m", "q")[: 1 + published] for i in range(self.WINDOW)]  # 0 is the newest
        state = {name: float(name[0] == "m") for name in names}
        super().__init__(at, published, state | ({"rho": 1.0, "kappa": 0.0} if published else {}))
        self.warmup_steps = warmup_steps
        self.groups = tuple([(ranks.group, ranks.size) for ranks in self.joined])

    def settled(self) -> Tensor:
        return self.rho if self.published else _geometric([getattr(self, f"m{i}") for i in range(self.WINDOW)])

    def published_form(self, x: Tensor, m: Tensor) -> Tensor:
        state = {name: getattr(self, name) for name in self.state}
        update: Tensor = self.updates + 1
        v = self._smooth(m, state, "m", update, _geometric)
        follows = update > max(self.LEVEL_STEPS, self.warmup_steps)
        ratio = ((v + self.eps) / (self.rho + self.eps)).sqrt().clamp(1 / 5, 5).where(follows, 1)
        # κ after this batch is share · q + rest, with the batch's own q, of which the backward is to know.
        rest, after = (
            _average(self.kappa, self._smooth(q, state, "q", update, _mean))
            for q in (torch.zeros_like(m), torch.ones_like(m))
        )
        z = _UnifiedNorm.apply(x, (v + self.eps).rsqrt(), rest, after - rest, self.groups, self.n_parts)
        y = _ScaledGradient.apply(z * self.weight, ratio)
        return y if self.bias is None else y + self.bias

    def advance(self, state: Mapping[str, Tensor], means: Tensor, pull: Tensor, update: Tensor) -> dict[str, Tensor]:
        (m,) = means
        after = self._window(m, state, "m")
        if self.published:
            after |= self._window(pull, state, "q")
            after["rho"] = _average(state["rho"], self._smooth(m, state, "m", update, _geometric))
            after["kappa"] = _average(state["kappa"], self._smooth(pull, state, "q", update, _mean))
        return after

    def calibrated(self, x: Tensor) -> dict[str, Tensor]:
        m = self.mean_square(self.entering(x))
        return {name: m for name in self.state if name[0] in "mr"}

    def _window(self, newest: Tensor, state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        """The last four with the newest."""
        values = [newest, *(state[f"{kind}{i}"] for i in range(self.WINDOW - 1))]
        return {f"{kind}{i}": value for i, value in enumerate(values)}

    def _smooth(
        self,
        newest: Tensor,
        state: Mapping[str, Tensor],
        kind: str,
        update: Tensor,
        mean: Callable[[list[Tensor]], Tensor],
    ) -> Tensor:
        """The `mean` of the window with the newest [D], or that alone in the first steps."""
        smooth = (update > self.WINDOW) & (update >= self.warmup_steps)
        return mean([*self._window(newest, state, kind).values()]).where(smooth, newest)


class BatchNorm(BatchStatistics):
    """(x - mean) / sqrt(var + eps) of each channel over the batch, evaluated by running averages (Ioffe & Szegedy 2015,
    arXiv:1502.03167). A decoder that has it reads ahead: it is here for encoders, and for comparison."""

    has_causal_form = False
    mean: Tensor
    var: Tensor

    def __init__(self, at: NormSite) -> None:
        super().__init__(at, True, {"mean": 0.0, "var": 1.0}, n_observed=2)

    def forward(self, x: Tensor) -> Tensor:
        x = precise(x)
        if not self.training:
            return self.scaled((x - self.mean) * (self.var + self.eps).rsqrt())
        mean = self.batch_mean(x)
        centered = x - mean
        var = self.batch_mean(centered.square())
        n = x.shape[0] * x.shape[1] * self.n_joined
        self.observe(x, mean, var * (n / max(1, n - 1)))
        return self.scaled(centered * (var + self.eps).rsqrt())

    def advance(self, state: Mapping[str, Tensor], means: Tensor, pull: Tensor, update: Tensor) -> dict[str, Tensor]:
        return {name: _average(state[name], new) for name, new in zip(self.state, means, strict=True)}


def _is_encoder(at: NormSite) -> bool:
    assert at.site is not None, "the form depends on the site"
    return at.site.stack == "encoder"


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _geometric(values: list[Tensor]) -> Tensor:
    return torch.stack(values).clamp(min=torch.finfo(values[0].dtype).tiny).log().mean(0).exp()


def _average(running: Tensor, new: Tensor) -> Tensor:
    return MOMENTUM * running + (1 - MOMENTUM) * new


class _PowerNorm(Function):
    """x · scale, with the gradient (g - pull · z) · gradient_scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, gradient_scale: Tensor, pull: Tensor) -> Tensor:
        z = x * scale
        ctx.save_for_backward(z, gradient_scale, pull)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        z, gradient_scale, pull = ctx.saved_tensors
        return (g - pull * z) * gradient_scale, None, None, None


class _UnifiedNorm(Function):
    """x · scale, with the gradient (g - κ z) · scale, κ = rest + share · q by this batch's own q, the mean of g z."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, rest: Tensor, share: Tensor, groups: tuple[tuple[str, int], ...], n: int
    ) -> Tensor:
        z = x * scale
        ctx.save_for_backward(z, scale, rest, share)
        ctx.groups, ctx.n = groups, n
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        z, scale, rest, share = ctx.saved_tensors
        q = (g * z).mean((0, 1))
        for group, size in ctx.groups:
            q = reduce(q, group) / size
        return (g - (ctx.n * rest + share * q) * z) * scale, None, None, None, None, None


class _ScaledGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return g * factor, None
