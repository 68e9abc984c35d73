"""gloo's process groups, with one thread each.

Of torch's two (2.13, `ProcessGroupGloo::runLoop`), each writes down the name of the collective that it has just ended,
and nothing keeps the other from doing so at the same moment. A name of more than 15 letters, such as that of
FSDP2's reduce-scatter, is then freed twice, and the process crashes there or, worse, some time later.
"""

import os
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store  # torch.distributed has it, unknown to mypy
from torch.distributed import distributed_c10d


class OneThread(distributed_c10d.ProcessGroupGloo):
    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options: Any = self._Options()  # type: ignore[attr-defined]
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        options._devices = [self.create_device(interface=name) for name in interfaces] or [self.create_default_device()]
        options._threads, options._timeout = 1, timeout
        super().__init__(store, rank, size, options)


def one_thread_each() -> None:
    """For all groups made from here on. torch's own class has to make way: nothing hands it the number."""
    distributed_c10d.ProcessGroupGloo = OneThread  # type: ignore[misc]
