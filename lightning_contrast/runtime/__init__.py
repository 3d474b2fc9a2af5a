"""What is read from a Trainer or attached to one: the only place that knows Lightning's internals."""
