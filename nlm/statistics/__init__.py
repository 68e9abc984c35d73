"""Per-layer statistics: what is recorded in a step, how it is stored in a run, how it is drawn."""
