"""Arithmetic of training, counted by torch on the real model, of whose layers one of each kind is run without memory.

What counts are matrix products, a multiply-add as 2. Attention counts in full, causal or not, and in the backward
without the scores that a fused kernel computes again: for softmax 12 · H · Dh · S a token and layer, as is usual where
a share of the peak is given (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). The optimizer does not count.
"""

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nlm.build import design
from nlm.config import Config
from nlm.model import Part
from nlm.plan.fake import faked
from nlm.plan.layers import ENDS, kinds


def flops_per_token(config: Config) -> float:
    """FLOPs of forward and backward for each token, nothing computed twice; of all ranks together."""
    rows = config.batch_rows // config.parallel.data_ranks // config.parallel.microbatches
    layers = Counter(kinds(config))
    flops = _flops(config, ENDS, rows)
    flops += sum(n * _flops(config, Part(range(l, l + 1), first=False, last=False), rows) for l, n in layers.items())
    return flops / (rows * config.train.seq_len)


def _flops(config: Config, part: Part, rows: int) -> int:
    """Of forward and backward of a part of the stack over rows of tokens."""
    model, shape = design(config, part=part), (rows, config.train.seq_len)
    source_len = config.source_len if config.model.reads_source else 0
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        faked(model)
        tokens = torch.zeros(shape, dtype=torch.int64)
        source = torch.zeros(rows, source_len, dtype=torch.int64) if source_len else None
        stream = torch.zeros(rows, config.train.seq_len + source_len, config.model.dim, requires_grad=True)
        x, targets = tokens if part.first else stream, tokens if part.last else None
        out = model(x, source, targets, tokens if config.data.document_mask else None)
        out.sum().backward()
    return counter.get_total_flops()
