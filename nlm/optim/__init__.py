"""Training the weights: groups and AdamW, learning-rate schedules, clipping, projection."""

from nlm.optim.adamw import adamw, leave_out, set_lr
from nlm.optim.clip import clip_gradients
from nlm.optim.project import projection
from nlm.optim.schedule import learning_rate

__all__ = ["adamw", "clip_gradients", "learning_rate", "leave_out", "projection", "set_lr"]
