"""The learning rate as a function of the step."""

from math import cos, pi

from nlm.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of `step` (1 … steps): linear warmup to lr, then the schedule down to final_lr_frac · lr."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - round(config.decay_frac * steps))
    done = max(0, step - start) / max(1, steps - start)
    match config.schedule:
        case "constant":
            high = 1.0
        case "cosine":
            high = (1 + cos(pi * done)) / 2
        case "linear" | "wsd":
            high = 1 - done
    return config.lr * (config.final_lr_frac + (1 - config.final_lr_frac) * high)
