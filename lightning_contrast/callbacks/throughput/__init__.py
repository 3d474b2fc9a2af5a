"""Callback that measures the cost of training steps."""
