"""nlm trains very deep Transformers under any published normalization scheme."""

from nlm.attention import SCORES
from nlm.build import build_model, load_config
from nlm.checkpoint import load_checkpoint
from nlm.norms import NORMS
from nlm.schemes import SCHEMES
from nlm.statistics.store import read_layers

__version__ = "0.1.0"
__all__ = ["NORMS", "SCHEMES", "SCORES", "build_model", "load_checkpoint", "load_config", "read_layers"]
