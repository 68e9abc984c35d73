"""Before a run: whether the ranks, their hosts, and what joins them can carry it. One file a check."""

from nlm.preflight.run import Unfit, preflight

__all__ = ["Unfit", "preflight"]
