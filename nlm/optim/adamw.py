"""AdamW over the groups that the scheme's rule makes of the weights."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from nlm.anatomy import Group, Weight
from nlm.config import OptimConfig
from nlm.schemes.base import Scheme


def adamw(parameters: Iterable[tuple[Tensor, Weight]], scheme: Scheme, config: OptimConfig) -> torch.optim.AdamW:
    """One parameter group for each Group; `lr_multiplier` in a group scales the scheduled learning rate."""
    groups: dict[Group, list[Tensor]] = defaultdict(list)
    for parameter, weight in parameters:
        groups[scheme.group(weight)].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": tensors,
                "lr_multiplier": group.lr,
                "weight_decay": config.weight_decay * group.weight_decay,
            }
            for group, tensors in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The scheduled learning rate `lr`, times each group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def leave_out(optimizer: torch.optim.Optimizer, update: Tensor | None) -> None:
    """[] bool: whether the next `step` is to change nothing, neither parameters nor moments nor their count of steps.

    The kernel reads it on the device, as it does for gradient scaling: the host need not wait.
    """
    optimizer.found_inf = None if update is None else update.float()  # type: ignore[attr-defined]
