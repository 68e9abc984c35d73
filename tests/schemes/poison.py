"""NaN poison: init leaves no parameter or buffer as the memory was."""

import copy

import torch

from nlm import build_model
from nlm.build import calibration
from nlm.config import Config
from nlm.init import init


def assert_init_fills_everything(config: Config) -> None:
    model = build_model(config)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    init(model, config.train.seed, calibration(config, config.train.seed))
    for (name, ours), theirs in zip(
        (*model.named_parameters(), *model.named_buffers()),
        (*expected.parameters(), *expected.buffers()),
        strict=True,
    ):
        assert torch.equal(ours, theirs), name
        assert ours.isfinite().all(), name
