"""What each rank of a pipeline does when: the order is that of torch's own schedules, the time is simulated."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch.distributed.pipelining.schedules import _Action, _ComputationType

from nlm.config import ParallelConfig
from nlm.parallel.pipeline import SCHEDULES


class Action(NamedTuple):
    """Of a microbatch in a stage: "F" forward, "B" all of the backward, or "I" the gradient of the stage's input and
    "W" those of its weights."""

    kind: str
    stage: int
    microbatch: int


KINDS = {
    _ComputationType.FORWARD: "F",
    _ComputationType.FULL_BACKWARD: "B",
    _ComputationType.BACKWARD_INPUT: "I",
    _ComputationType.BACKWARD_WEIGHT: "W",
}


def orders(parallel: ParallelConfig) -> list[list[Action]]:
    """What each pipeline rank does, in its order; a pipeline of one rank goes from microbatch to microbatch."""
    if parallel.pp == 1:
        return [[Action(kind, 0, m) for m in range(parallel.microbatches) for kind in "FB"]]
    return _orders(parallel.pp, parallel.schedule, parallel.n_stages, parallel.microbatches)


@cache
def _orders(pp: int, name: str, n_stages: int, microbatches: int) -> list[list[Action]]:
    if name == "1f1b":
        return [_one_forward_one_backward(rank, pp, microbatches) for rank in range(pp)]
    stages = [_stand_in(stage, n_stages, pp) for stage in range(n_stages // pp)]
    make: Any = SCHEDULES[name]
    order = make(stages, microbatches, loss_fn=lambda loss, _: loss, scale_grads=False).pipeline_order
    return [list(_flat(order[rank])) for rank in range(pp)]


def _one_forward_one_backward(stage: int, n_stages: int, microbatches: int) -> list[Action]:
    """As torch runs it; what it prints of this schedule's order is not that."""
    ahead = min(microbatches, n_stages - stage)
    forwards = [Action("F", stage, m) for m in range(microbatches)]
    order = forwards[:ahead]
    for m in range(microbatches):
        order += [Action("B", stage, m), *forwards[ahead + m :][:1]]
    return order


def _stand_in(stage: int, n_stages: int, pp: int) -> SimpleNamespace:
    """What a schedule asks of a stage before it runs."""
    return SimpleNamespace(
        stage_index=stage,
        num_stages=n_stages,
        group_size=pp,
        group_rank=0,
        is_first=stage == 0,
        is_last=stage == n_stages - 1,
        submod=None,
        has_backward=True,
    )


def _flat(actions: Sequence[_Action | None]) -> Iterator[Action]:
    for action in actions:
        if action is None:
            continue
        if action.sub_actions:
            yield from _flat(action.sub_actions)
        elif action.computation_type in KINDS and action.microbatch_index is not None:
            yield Action(KINDS[action.computation_type], action.stage_index, action.microbatch_index)


def makespan(orders: Sequence[Sequence[Action]], seconds: Mapping[tuple[str, int], float], last_stage: int) -> float:
    """How long the pipeline takes when each action, by kind and stage, takes so many seconds and passing on none.

    An action waits for its rank's one before, and for what it reads: the stage before, in the backward the one behind.
    """
    ended: dict[Action, float] = {}
    clocks, at = [0.0] * len(orders), [0] * len(orders)
    while any(i < len(order) for i, order in zip(at, orders, strict=True)):
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                action = order[at[rank]]
                ready = _ready(action, ended, last_stage)
                if ready is None:
                    break
                clocks[rank] = max(clocks[rank], ready) + seconds[action.kind, action.stage]
                ended[action] = clocks[rank]
                at[rank] += 1
                moved = True
        assert moved, "the schedule waits for itself"
    return max(clocks)


def _ready(action: Action, ended: Mapping[Action, float], last_stage: int) -> float | None:
    """When all is there that an action reads, or None when that is not known yet."""
    kind, stage, m = action
    match kind:
        case "F":
            needed = [[Action("F", stage - 1, m)]] if stage else []
        case "W":
            needed = [[Action("I", stage, m)]]
        case _ if stage == last_stage:
            needed = [[Action("F", stage, m)]]
        case _:
            needed = [[Action("B", stage + 1, m), Action("I", stage + 1, m)]]
    times = [next((ended[a] for a in options if a in ended), None) for options in needed]
    return None if None in times else max((t for t in times if t is not None), default=0.0)
