"""Before a run: whether ranks, hosts and links can carry it. `torchrun … launch/preflight.py CONFIG key=value`, started
as the run will be; the same as `nlm preflight`. Exit code 0: all is well."""

import sys

from nlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
