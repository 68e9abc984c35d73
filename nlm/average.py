"""The mean of several checkpoints' weights, of late ones of a run as a rule (Vaswani et al. 2017, section 6.1)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nlm.checkpoint import checkpoint_config, load_checkpoint
from nlm.config import Config, ConfigError
from nlm.model import Transformer, held


@torch.no_grad()
def averaged(checkpoints: Sequence[str | Path]) -> tuple[Transformer, Config]:
    """A model of the mean weights, taken in float64, and the config of the last of the checkpoints.

    Errors: ValueError for a missing or damaged checkpoint; ConfigError where they are not of one model.
    """
    last = Path(checkpoints[-1])
    config = checkpoint_config(last)
    for other in checkpoints:
        if checkpoint_config(Path(other)).model != config.model:
            raise ConfigError([f"{other}: expected the [model] of {last}, got another; average checkpoints of one run"])
    model, config = load_checkpoint(last)
    parameters = {h.name: h.tensor for h in held(model)}
    sums = {name: tensor.double() for name, tensor in parameters.items()}
    for other in checkpoints[:-1]:
        for h in held(load_checkpoint(other)[0]):
            sums[h.name] += h.tensor
    for name, tensor in parameters.items():
        tensor.copy_(sums[name] / len(checkpoints))
    return model, config
