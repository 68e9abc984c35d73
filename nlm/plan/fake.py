"""Models whose tensors have shapes and no memory: they take the way of CPU tensors, kernel by kernel."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nlm.model import Transformer


def faked(model: Transformer, mode: FakeTensorMode) -> Transformer:
    """In place: a designed model, on the meta device, becomes one of fake CPU tensors.

    `Module.to_empty` would do it but for fake tensors, which it cannot put into the place of others.
    """
    with mode:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model
