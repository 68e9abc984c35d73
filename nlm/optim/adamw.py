"""AdamW over the groups that the scheme's rule makes of the weights."""

from collections import defaultdict

import torch
from torch import Tensor

from nlm.anatomy import Group
from nlm.config import OptimConfig
from nlm.parallel.pieces import Pieces


def adamw(pieces: Pieces, config: OptimConfig) -> torch.optim.AdamW:
    """One parameter group for each Group; `lr_multiplier` in a group scales the scheduled learning rate."""
    groups: dict[Group, list[Tensor]] = defaultdict(list)
    for h in pieces.held:
        groups[pieces.scheme.group(h.weight)].append(h.tensor)
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
