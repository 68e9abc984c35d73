"""A rank without memory and without others: fake tensors take the way of CPU tensors, kernel by kernel."""

import torch
from torch import nn

from nlm.config import Config
from nlm.mesh import Mesh
from nlm.model import Transformer
from nlm.parallel.engine import Engine, WholeEngine
from nlm.parallel.pieces import Pieces
from nlm.parallel.tensor import TensorParallel


class ImaginedTensorParallel(TensorParallel):
    """The first of `size` ranks, the others of which are not there: fake collectives need but the group's size."""

    def __init__(self, size: int, sequence: bool) -> None:
        super().__init__()
        self.size, self.sequence = size, sequence and size > 1
        self.group = "imagined"


class ImaginedMesh(Mesh):
    """Tensor parallel ranks of which this one is the first."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.sizes["tp"] = tp, tp.size


class ImaginedPieces(Pieces):
    exact_elements = 2**62
    """All: on the CPU norms are taken in thousands of parts, which cost no memory, but time even here."""


class ImaginedEngine(WholeEngine):
    """What training does with gradients."""

    def __init__(self, config: Config, model: Transformer) -> None:
        mesh = ImaginedMesh(model.tp)
        plain = config.parallel.model_copy(update={"kernels": "inductor"})  # no kernel of ours reads a fake tensor
        config = config.model_copy(update={"parallel": plain})
        Engine.__init__(self, config, mesh, [model], ImaginedPieces([model], mesh), model)


def faked(model: Transformer) -> Transformer:
    """In place, under a FakeTensorMode: a designed model, on the meta device, becomes one of fake CPU tensors.

    `Module.to_empty` would do it but for fake tensors, which it cannot put into the place of others.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model
