"""Prints, to torchrun.sh: where this node finds the rendezvous, which the argument hosts, and where it itself is found.

torch takes a node for that host if its own hostname leads to the address, and has others look up its hostname: neither
need be so where hosts are given as addresses, or /etc/hosts has the own name at 127.0.1.1.
"""

import socket
import sys

host = sys.argv[1]
try:
    family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
except socket.gaierror:
    sys.exit()  # not known yet, as a pod's name may be: torch waits for it
with socket.socket(family, socket.SOCK_DGRAM) as probe:
    try:
        probe.bind((address[0], 0))  # which only its own host can
        print("localhost", host)
    except OSError:
        probe.connect(address)  # sends nothing, and chooses the interface that leads there
        print(host, probe.getsockname()[0])
