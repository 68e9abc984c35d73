"""Statistics of the forward, and of the stream's gradient: what the ranks' parts of the stack have shown in a step."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import torch
import torch.distributed as dist
from torch import Tensor

from nlm.anatomy import Kind
from nlm.mesh import DATA_AXES
from nlm.model import Block, Stack
from nlm.parallel.engine import Engine
from nlm.signals import COLUMNS, INSIDE, Signals

DORMANT = 0.025
"""A hidden unit is dormant when its mean |a| is at most this share of that of its sublayer (Sokar et al. 2023,
arXiv:2302.12902, definition 3.1)."""
MINIMA, MAXIMA = (torch.tensor([which in name for name in COLUMNS]) for which in ("min", "max"))


class ForwardStatistics:
    """One vector [L] a quantity and sublayer, under the names that the sublayers have in the model; NaN for layers
    without one of that name. An encoder's layers come before those of its decoder; of pairs, padding does not count.

    In between there are R rows, of each stack the stream before its first layer and then its sublayers.
    """

    def __init__(self, engine: Engine, queries: int) -> None:
        self.engine, self.mesh, self.queries = engine, engine.mesh, queries
        stacks, device = engine.whole.stacks, self.mesh.device
        self.n_layers = sum(len(stack.blocks) for stack in stacks)
        sizes = [1 + stack.n_sublayers * len(stack.blocks) for stack in stacks]
        self.starts = [0, *accumulate(sizes)]
        """[stacks+1]: the row before each stack's first layer, and R."""
        self.n_rows = self.starts[-1]
        kinds: dict[str, Kind] = {}
        self.places: dict[str, Tensor] = {}
        """By name, [L]: the row that it has in each layer, R in one without it."""
        self.kinds: list[Kind | None] = [None] * self.n_rows
        self.last = torch.zeros(self.n_layers, dtype=torch.int64, device=device)
        """[L]: the row of each layer's last sublayer."""
        nowhere = torch.full((self.n_layers,), self.n_rows, device=device)
        for start, stack in zip(self.starts, stacks, strict=False):
            row = start
            for layer, block in enumerate(stack.blocks.values(), stack.first_number):
                assert isinstance(block, Block)
                for name in block.names:
                    row += 1
                    self.kinds[row] = kinds[name] = getattr(block, name).site.kind
                    self.places.setdefault(name, nowhere.clone())[layer] = row
                self.last[layer] = row
        self.attention = [name for name, kind in kinds.items() if kind != "ffn"]
        self.hidden = [name for name, kind in kinds.items() if kind == "ffn"]

    def begin(self) -> None:
        """The step to come is recorded."""
        for stack in self._stacks():
            stack.signals = Signals(self.queries)

    @torch.no_grad()
    def vectors(self) -> dict[str, Tensor]:
        """Of the recorded step, the same on every rank in every layout; it ends the recording."""
        vectors = dict(self._vectors())
        for stack in self._stacks():
            stack.signals = None
        return vectors

    def _stacks(self) -> Iterator[Stack]:
        return chain.from_iterable(model.stacks for model in self.engine.models)

    def _vectors(self) -> Iterator[tuple[str, Tensor]]:
        model = self.engine.whole.config
        rows, dead, dormant, gradients, uniform, watched, elements = self._joined()
        tokens = elements / model.dim
        is_cross = torch.tensor([kind == "cross" for kind in self.kinds], device=rows.device)
        key_tokens = tokens.where(~is_cross, tokens[0])  # with cross-attention, the first rows are an encoder's
        columns = dict(zip(COLUMNS, rows.unbind(1), strict=True))  # [R] each

        def moments(of: str) -> dict[str, Tensor]:
            mean, square = columns[f"{of}_sum"] / elements, columns[f"{of}_squares"] / elements
            variance = (square - mean.square()).clamp(min=0)
            largest = torch.maximum(columns[f"{of}_max"], -columns[f"{of}_min"])
            return {"rms": square.sqrt(), "mean": mean, "variance": variance, "max": largest}

        streams = moments("stream")
        everywhere = {f"stream_{name}_in": stream.roll(1) for name, stream in streams.items()}
        everywhere |= {f"branch_{name}": branch for name, branch in moments("branch").items()}
        everywhere |= {f"stream_{name}_out": stream for name, stream in streams.items()}
        norms = columns["stream_squares"].sqrt()
        everywhere["stream_cosine"] = columns["product"] / (norms.roll(1) * norms)
        heads = {
            "attention_entropy": columns["entropy"] / (watched * model.n_heads),
            "attention_uniform": uniform / watched,
            "attention_saturated": columns["saturated"] / (watched * model.n_heads),
            "max_logit": columns["max_logit"],
            "q_norm": (columns["q_squares"] / (tokens * model.n_heads)).sqrt(),
            "k_norm": (columns["k_squares"] / (key_tokens * model.n_kv_heads)).sqrt(),
        }
        yield from self._placed(everywhere, [*self.attention, *self.hidden])
        yield from self._placed(heads, self.attention)
        yield from self._placed({"dead_units": dead, "dormant_units": dormant}, self.hidden)
        yield "stream_grad_rms/layer", (gradients / elements[self.last]).sqrt() / self.mesh.data_size

    def _placed(self, quantities: dict[str, Tensor], names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """[R] each -> "quantity/sublayer", [L]."""
        for quantity, values in quantities.items():
            padded = torch.cat([values, values.new_full((1,), torch.nan)])
            yield from ((f"{quantity}/{name}", padded[self.places[name]]) for name in names)

    def _joined(self) -> tuple[Tensor, ...]:
        """-> over all microbatches and ranks: of COLUMNS [R C]; the shares [R] of hidden units that are dead, and
        dormant; Σ gradient² [L]; Σ uniform entropy [R], and of how many queries; how many elements the stream has [R].
        """
        mesh, tp, n_rows = self.mesh, self.mesh.tp, self.n_rows
        sizes = [n_rows * len(COLUMNS), n_rows, self.n_layers, 2 * n_rows, n_rows]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=mesh.device)
        rows, activity, gradients, uniform, elements = flat.split(sizes)
        rows, uniform = rows.view(-1, len(COLUMNS)), uniform.view(-1, 2)
        extremes = torch.full_like(rows, -torch.inf)
        minima, maxima = MINIMA.to(rows.device), MAXIMA.to(rows.device)
        units: list[tuple[Tensor, Tensor]] = []
        for start, stack in chain.from_iterable(zip(self.starts, m.stacks, strict=False) for m in self.engine.models):
            signals = stack.signals
            assert signals is not None and signals.columns, "the step was not recorded"
            if not stack.blocks:
                continue
            table = torch.stack(signals.columns).to(rows)  # [M 1+Pl C]
            first = start + stack.n_sublayers * min(map(int, stack.blocks))
            skip = 0 if first == start else 1  # what enters a later part is what left the one before it
            here = slice(first + skip, first + table.shape[1])
            rows[here] = table.sum(0)[skip:]
            extremes[here] = table.where(~minima, -table).amax(0)[skip:]
            elements[here] = signals.elements
            for layer, microbatches in signals.gradients.items():
                gradients[layer] = torch.stack(microbatches).to(rows).sum()
            if tp.rank == 0:
                for kind in signals.uniform[0]:
                    of_all = torch.stack([of[kind] for of in signals.uniform]).sum(0)
                    uniform[self._rows_of(kind, first, here.stop)] = of_all
            ffns = self._rows_of("ffn", first, here.stop)
            if len(ffns):
                active = torch.stack(signals.units)[:, ffns - first - 1].to(rows).sum(0)  # [N F/n]
                for group in (group for axis in DATA_AXES if (group := mesh.group(axis))):
                    dist.all_reduce(active, group=group)
                units.append((ffns, active))
        if mesh.data_rank == 0:  # the others have the same
            for numbers, active in units:
                activity[numbers] = active.sum(1)
        if tp.rank > 0 and not tp.sequence:  # it has the same stream as the first, but other heads
            rows[:, len(INSIDE) :] = 0
            gradients.zero_()
            elements.zero_()
        mesh.sum(flat)
        # A maximum may miss what is no number; a sum does not.
        extremes = mesh.max(extremes).where(~rows.isnan(), torch.nan)
        rows = torch.where(minima, -extremes, torch.where(maxima, extremes, rows))
        return rows, *self._idle(units, activity), gradients, *uniform.unbind(1), elements

    def _rows_of(self, kind: str, first: int, stop: int) -> Tensor:
        """Of the sublayers between the row `first`, which is before them, and `stop`."""
        found = [row for row in range(first + 1, stop) if self.kinds[row] == kind]
        return torch.tensor(found, dtype=torch.int64, device=self.mesh.device)

    def _idle(self, units: Sequence[tuple[Tensor, Tensor]], activity: Tensor) -> tuple[Tensor, Tensor]:
        """Σ |a| of this rank's hidden units [N F/n] with the rows of their N sublayers, and of all units of each row
        [R] -> the shares [R] of units that are dead, and dormant."""
        n_units = self.engine.whole.config.ffn_dim
        counts = torch.zeros(2, self.n_rows, dtype=torch.float64, device=self.mesh.device)
        for ffns, sums in units if self.mesh.data_rank == 0 else ():
            counts[0, ffns] = (sums == 0).sum(1).to(counts)
            counts[1, ffns] = (sums <= DORMANT / n_units * activity[ffns, None]).sum(1).to(counts)
        dead, dormant = (self.mesh.sum(counts) / n_units).where(~activity.isnan(), torch.nan)
        return dead, dormant
