"""Which recomputation `recompute = "auto"` is: the cheapest of those that are expected to fit."""

import torch

from nlm.config import Config
from nlm.plan.layouts import FREE_SHARE, RECOMPUTE, Tracer, fullest


def settled(config: Config, device: torch.device) -> Config:
    """The config with a mode of recomputation that fits on `device`, where it has "auto".

    Errors: ValueError where nothing says how much memory a rank may need, or no mode fits.
    """
    if config.parallel.recompute != "auto":
        return config
    gib = config.parallel.memory_gib
    if device.type == "cuda":
        gib = gib or (1 - FREE_SHARE) * torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib is None:
        raise ValueError("parallel.memory_gib: expected what recompute = 'auto' is to fit into, got nothing; set it")
    return chosen(config, gib, offloads=device.type == "cuda")


def chosen(config: Config, gib: float, offloads: bool = True) -> Config:
    """The config with the first mode that fits in the place of "auto"; `offloads`: the host's memory is another.

    Errors: ValueError, with what each mode needs, where none fits.
    """
    tracer, needs = Tracer(config), list[str]()
    for mode in RECOMPUTE if offloads else [mode for mode in RECOMPUTE if mode != "offload"]:
        parallel = config.parallel.model_copy(update={"recompute": mode, "memory_gib": None})
        other = config.model_copy(update={"parallel": parallel})
        needed = float(fullest(other, tracer.costs(other)).sum()) / 2**30
        if needed <= gib:
            return other
        needs.append(f"{needed:.2f} under {mode!r}")
    raise ValueError(
        f"parallel.recompute: expected a rank to need at most {gib:.2f} GiB, planned are {', '.join(needs)}; more "
        "parallel.microbatches, ranks that divide the model (dp_shard, tp, pp) or a shorter train.seq_len take less"
    )
