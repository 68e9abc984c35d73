"""LayerNorms can be taken out of a trained model."""

from pathlib import Path
from tempfile import TemporaryDirectory

from nlm.build import build_engine, parse_config
from nlm.checkpoint import load_checkpoint
from nlm.mesh import Mesh
from nlm.remove_norms import remove_norms
from nlm.train import train as run
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, train, validation_loss

STEPS, MORE = 100, 150


def without(seed: int, folder: Path) -> float:
    """Validation loss of a model after STEPS with its norms and MORE in which they go."""
    with_norms = config("pre_ln", seed, {"n_layers": 6}, log={"dir": str(folder / "run"), "tensorboard": False})
    checkpoint = run(with_norms) / "checkpoints" / f"step-{STEPS:08d}"
    model, frozen = load_checkpoint(remove_norms(checkpoint, folder / "without", steps=MORE))
    engine = build_engine(parse_config(frozen.model_dump(exclude_none=True)), Mesh())
    engine.models[0].load_state_dict(model.state_dict())
    return validation_loss(engine)


def measure() -> list[Check]:
    gaps = []
    for seed in SEEDS:
        with TemporaryDirectory() as folder:
            usual = train(config("pre_ln", seed, {"n_layers": 6}, train={"steps": STEPS + MORE}))
            gaps.append(without(seed, Path(folder)) - validation_loss(usual))
    return [Check("loss without norms - with them, after as many steps", gaps, below=0.1, against=0.2)]


CLAIM = Claim(
    {"norms": ("frozen_layernorm",)},
    "Heimersheim 2024, arXiv:2409.13710",
    "A model gets along without its LayerNorms at inference, at little loss, after a short training on",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("norm_removal")
