"""nlm trains very deep Transformers under any published normalization scheme."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlm.build import build_model, load_config
    from nlm.checkpoint import load_checkpoint
    from nlm.data.tokenizer import load_tokenizer
    from nlm.decode.generate import generate
    from nlm.norms import NORMS
    from nlm.schemes import SCHEMES
    from nlm.scores import SCORES
    from nlm.statistics.store import read_layers
    from nlm.weight_norms import WEIGHT_NORMS

__version__ = "0.1.0"
__all__ = [
    "NORMS",
    "SCHEMES",
    "SCORES",
    "WEIGHT_NORMS",
    "build_model",
    "generate",
    "load_checkpoint",
    "load_config",
    "load_tokenizer",
    "read_layers",
]

HOMES = {
    "NORMS": "nlm.norms",
    "SCHEMES": "nlm.schemes",
    "SCORES": "nlm.scores",
    "WEIGHT_NORMS": "nlm.weight_norms",
    "build_model": "nlm.build",
    "generate": "nlm.decode.generate",
    "load_checkpoint": "nlm.checkpoint",
    "load_config": "nlm.build",
    "load_tokenizer": "nlm.data.tokenizer",
    "read_layers": "nlm.statistics.store",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: torch takes seconds, which a process that only tokenizes need not wait."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
