"""AdamW over the groups that the scheme's rule makes of the weights."""

from collections import defaultdict

import torch

from nlm.anatomy import Group
from nlm.config import OptimConfig
from nlm.model import Transformer, weights


def adamw(model: Transformer, config: OptimConfig) -> torch.optim.AdamW:
    """One parameter group for each Group; `lr_multiplier` in a group scales the scheduled learning rate."""
    groups: dict[Group, list[torch.nn.Parameter]] = defaultdict(list)
    for _, parameter, weight in weights(model):
        groups[model.scheme.group(weight)].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr_multiplier": group.lr,
                "weight_decay": config.weight_decay * group.weight_decay,
            }
            for group, parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
