"""State that is read from or attached to a Trainer; the only package that depends on Lightning's internals."""
