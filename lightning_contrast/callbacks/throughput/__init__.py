"""Monitor of the cost of training steps."""
