"""Entry point of ``python -m lightning_contrast``; see `lightning_contrast.cli`."""

from lightning_contrast.cli import main

if __name__ == "__main__":
    main()
