"""How a model is run: compile, recompute."""
