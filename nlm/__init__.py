"""nlm trains very deep Transformers under any published normalization scheme."""

from nlm.attention import SCORES
from nlm.build import build_model, load_config
from nlm.norms import NORMS
from nlm.schemes import SCHEMES

__version__ = "0.1.0"
__all__ = ["NORMS", "SCHEMES", "SCORES", "build_model", "load_config"]
