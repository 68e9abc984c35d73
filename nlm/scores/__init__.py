"""Score functions of attention, and SCORES, the choice by name."""

from nlm.scores.base import Heads, Keep, Score, document_mask, keys_seen, uniform_entropy
from nlm.scores.linear import Fourier, Galerkin, NaLaFormer
from nlm.scores.rectified import ReLA, Sigmoid
from nlm.scores.sa_softmax import SASoftmax
from nlm.scores.softmax import Cosine, QKNorm, RMSQKNormFull, RMSQKNormHead, SoftCap, Softmax, TopK

SCORES: dict[str, type[Score]] = {
    "softmax": Softmax,
    "qknorm": QKNorm,
    "cosine": Cosine,
    "rms_qknorm_head": RMSQKNormHead,
    "rms_qknorm_full": RMSQKNormFull,
    "softcap": SoftCap,
    "top_k": TopK,
    "sa_softmax": SASoftmax,
    "rela": ReLA,
    "sigmoid": Sigmoid,
    "fourier": Fourier,
    "galerkin": Galerkin,
    "nalaformer": NaLaFormer,
}

__all__ = ["SCORES", "Heads", "Keep", "Score", "document_mask", "keys_seen", "uniform_entropy"]
