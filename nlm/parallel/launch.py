from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def process_group(config, device):
    if config.parallel.ranks > 1:
        dist.init_process_group("gloo")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
