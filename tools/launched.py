"""What a launcher tells a rank, for scripts and tests that start ranks on this machine themselves."""

import socket


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
