"""Statistics of the forward, and of the stream's gradient: what the ranks' parts of the stack have shown in a step."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from nlm.mesh import DATA_AXES
from nlm.model import Attention, Block
from nlm.parallel.engine import Engine
from nlm.signals import COLUMNS, INSIDE, Signals

DORMANT = 0.025
"""A hidden unit is dormant when its mean |a| is at most this share of that of its sublayer (Sokar et al. 2023,
arXiv:2302.12902, definition 3.1)."""
MINIMA, MAXIMA = (torch.tensor([which in name for name in COLUMNS]) for which in ("min", "max"))


class ForwardStatistics:
    """One vector [L] a quantity and sublayer, under the names that the sublayers have in the model; NaN for layers
    without one of that name."""

    def __init__(self, engine: Engine, queries: int) -> None:
        self.engine, self.mesh, self.queries = engine, engine.mesh, queries
        blocks = [block for block in engine.whole.blocks.values() if isinstance(block, Block)]
        self.n_layers = len(blocks)
        sublayers = [[(name, isinstance(getattr(block, name), Attention)) for name in block.names] for block in blocks]
        found = list(dict.fromkeys(chain.from_iterable(sublayers)))
        self.attention = [name for name, is_attention in found if is_attention]
        self.hidden = [name for name, is_attention in found if not is_attention]
        self.ffns = [i for i, (_, is_attention) in enumerate(chain.from_iterable(sublayers)) if not is_attention]
        """Which of all 2L sublayers have hidden units."""
        nowhere = 2 * self.n_layers
        self.places = {
            entry[0]: torch.tensor(
                [2 * l + row.index(entry) if entry in row else nowhere for l, row in enumerate(sublayers)],
                device=self.mesh.device,
            )
            for entry in found
        }
        """By name, [L]: which of the 2L sublayers it is in each layer."""

    def begin(self) -> None:
        """The step to come is recorded."""
        for model in self.engine.models:
            model.signals = Signals(self.queries)

    @torch.no_grad()
    def vectors(self) -> dict[str, Tensor]:
        """Of the recorded step, the same on every rank in every layout; it ends the recording."""
        vectors = dict(self._vectors())
        for model in self.engine.models:
            model.signals = None
        return vectors

    def _vectors(self) -> Iterator[tuple[str, Tensor]]:
        model, config = self.engine.whole.config, self.engine.config
        rows, dead, dormant, gradients, uniform = self._joined()
        tokens, elements = config.train.batch_tokens, config.train.batch_tokens * model.dim
        watched = config.batch_rows * min(self.queries, config.train.seq_len)
        columns = dict(zip(COLUMNS, rows.unbind(1), strict=True))  # [1+2L] each

        def moments(of: str) -> dict[str, Tensor]:
            mean, square = columns[f"{of}_sum"] / elements, columns[f"{of}_squares"] / elements
            variance = (square - mean.square()).clamp(min=0)
            largest = torch.maximum(columns[f"{of}_max"], -columns[f"{of}_min"])
            return {"rms": square.sqrt(), "mean": mean, "variance": variance, "max": largest}

        streams = moments("stream")
        everywhere = {f"stream_{name}_in": stream[:-1] for name, stream in streams.items()}
        everywhere |= {f"branch_{name}": branch[1:] for name, branch in moments("branch").items()}
        everywhere |= {f"stream_{name}_out": stream[1:] for name, stream in streams.items()}
        norms = columns["stream_squares"].sqrt()
        everywhere["stream_cosine"] = columns["product"][1:] / (norms[:-1] * norms[1:])
        heads = {
            "attention_entropy": columns["entropy"] / (watched * model.n_heads),
            "attention_uniform": (uniform / watched).expand_as(norms),
            "attention_saturated": columns["saturated"] / (watched * model.n_heads),
            "max_logit": columns["max_logit"],
            "q_norm": (columns["q_squares"] / (tokens * model.n_heads)).sqrt(),
            "k_norm": (columns["k_squares"] / (tokens * model.n_kv_heads)).sqrt(),
        }
        yield from self._placed(everywhere, [*self.attention, *self.hidden])
        yield from self._placed({name: values[1:] for name, values in heads.items()}, self.attention)
        yield from self._placed({"dead_units": dead, "dormant_units": dormant}, self.hidden)
        yield "stream_grad_rms/layer", (gradients / elements).sqrt() / self.mesh.data_size

    def _placed(self, quantities: dict[str, Tensor], names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """[2L] each -> "quantity/sublayer", [L]."""
        for quantity, values in quantities.items():
            padded = torch.cat([values, values.new_full((1,), torch.nan)])
            yield from ((f"{quantity}/{name}", padded[self.places[name]]) for name in names)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> over all microbatches and ranks: of COLUMNS [1+2L C], the first row the stream before the first layer;
        the shares [2L] of hidden units that are dead, and dormant; Σ gradient² [L]; Σ uniform entropy []."""
        mesh, tp, n_layers = self.mesh, self.mesh.tp, self.n_layers
        sizes = [(1 + 2 * n_layers) * len(COLUMNS), 2 * n_layers, n_layers, 1]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=mesh.device)
        rows, activity, gradients, uniform = flat.split(sizes)
        rows = rows.view(-1, len(COLUMNS))
        extremes = torch.full_like(rows, -torch.inf)
        minima, maxima = MINIMA.to(rows.device), MAXIMA.to(rows.device)
        units: list[tuple[Tensor, Tensor]] = []
        for model in self.engine.models:
            signals = model.signals
            assert signals is not None and signals.columns, "the step was not recorded"
            table = torch.stack(signals.columns).to(rows)  # [M 1+2l C]
            skip = 0 if model.part.first else 1  # what enters a later part is what left the one before it
            here = slice(2 * model.part.layers.start + skip, 2 * model.part.layers.stop + 1)
            rows[here] = table.sum(0)[skip:]
            extremes[here] = table.where(~minima, -table).amax(0)[skip:]
            for layer, microbatches in signals.gradients.items():
                gradients[layer] = torch.stack(microbatches).to(rows).sum()
            if model.part.first and tp.rank == 0:
                uniform += torch.stack(signals.uniform).sum()
            ffns = torch.tensor([i for i in self.ffns if i // 2 in model.part.layers], device=mesh.device)
            if len(ffns):
                sums = torch.stack(signals.units)[:, ffns - 2 * model.part.layers.start].to(rows).sum(0)  # [N F/n]
                for group in (group for axis in DATA_AXES if (group := mesh.group(axis))):
                    dist.all_reduce(sums, group=group)
                units.append((ffns, sums))
        if mesh.data_rank == 0:  # the others have the same
            for numbers, sums in units:
                activity[numbers] = sums.sum(1)
        if tp.rank > 0 and not tp.sequence:  # it has the same stream as the first, but other heads
            rows[:, len(INSIDE) :] = 0
            gradients.zero_()
        mesh.sum(flat)
        # A maximum may miss what is no number; a sum does not.
        extremes = mesh.max(extremes).where(~rows.isnan(), torch.nan)
        rows = torch.where(minima, -extremes, torch.where(maxima, extremes, rows))
        return rows, *self._idle(units, activity), gradients, uniform[0]

    def _idle(self, units: Sequence[tuple[Tensor, Tensor]], activity: Tensor) -> tuple[Tensor, Tensor]:
        """Σ |a| of this rank's hidden units [N F/n] with the numbers of their N sublayers, and of all units of each of
        the 2L -> the shares [2L] of units that are dead, and dormant."""
        n_units = self.engine.whole.config.ffn_dim
        counts = torch.zeros(2, 2 * self.n_layers, dtype=torch.float64, device=self.mesh.device)
        for ffns, sums in units if self.mesh.data_rank == 0 else ():
            counts[0, ffns] = (sums == 0).sum(1).to(counts)
            counts[1, ffns] = (sums <= DORMANT / n_units * activity[ffns, None]).sum(1).to(counts)
        dead, dormant = (self.mesh.sum(counts) / n_units).where(~activity.isnan(), torch.nan)
        return dead, dormant
