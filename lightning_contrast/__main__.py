"""Entry point of ``python -m lightning_contrast``; see `lightning_contrast.cli`."""

from lightning_contrast.cli import entry_point

if __name__ == "__main__":
    entry_point()
