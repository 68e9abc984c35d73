"""What computes several operations at once, or one in parts, each beside the plain way that it replaces."""
