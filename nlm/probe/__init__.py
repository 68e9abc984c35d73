"""The verb `nlm probe`: what the signal does at initialization, and whether that lets a config train."""
