"""Adafactor is as good as Adam with a small part of its state."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, as_good, config, train, validation_loss

MODEL = {"n_layers": 6, "dim": 64}


def trained(name: str) -> tuple[list[float], int]:
    """-> losses, and how many numbers the optimizer keeps."""
    engines = [train(config("pre_ln", seed, MODEL, optim={"name": name})) for seed in SEEDS]
    optimizer = engines[0].optimizer
    kept = [*optimizer.shared.values(), *(tensor for state in optimizer.state for tensor in state.values())]
    return [validation_loss(engine) for engine in engines], sum(tensor.numel() for tensor in kept)


def measure() -> list[Check]:
    (adafactor, few), (adamw, many) = trained("adafactor"), trained("adamw")
    return [
        as_good("Adafactor", adafactor, "AdamW", adamw),
        Check("its state / AdamW's", [few / many], below=0.1, note=f"{few:,} numbers of {many:,}"),
    ]


CLAIM = Claim(
    {"optimizers": ("adafactor",)},
    "Shazeer & Stern 2018, arXiv:1804.04235",
    "Second moments by rows and columns cost next to no memory and no quality",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("adafactor_loss")
