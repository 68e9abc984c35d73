"""What starting ranks on one machine takes."""

import multiprocessing
import socket

PROCESSES = multiprocessing.get_context("forkserver")
"""Of new processes, forked from one that has imported what takes seconds to import."""
PROCESSES.set_forkserver_preload(["nlm.train", "nlm.parallel.deepspeed"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
