"""Random draws of a batch, one generator per image, so that a batch and its images give the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_contrast.seeding import derived_seed, send


class ImageDraws:
    """Random numbers per image, drawn on the CPU in float64 and sent to the device.

    Args:
        seeds: One tuple of integers per image of the batch.
        device: Device of the results.
    """

    def __init__(self, seeds: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(derived_seed(*seed)) for seed in seeds]
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, ``(B, *shape)``."""
        return self._each(lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw uniform numbers in low..high, ``(B, *shape)``."""
        draw = self._each(lambda generator: torch.rand(shape, generator=generator, dtype=torch.float64))
        return low + (high - low) * draw

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw integers in low..high - 1, ``(B, *shape)``."""
        return self._each(lambda generator: torch.randint(low, high, shape, generator=generator))

    def poisson(self, rates: Tensor) -> Tensor:
        """Draw Poisson numbers with the given rates, ``(B, ...)``, which are read on the CPU."""
        rows = zip(rates.cpu(), self.generators, strict=True)
        return send(torch.stack([torch.poisson(row, generator=generator) for row, generator in rows]), self.device)

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return send(torch.stack([draw(generator) for generator in self.generators]), self.device)
