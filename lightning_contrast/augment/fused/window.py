"""Random window, gamma and shift of gray intensities."""

import numpy as np
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_interval, check_probability, check_range, require
from lightning_contrast.augment.fused.base import Backend, Draw, FusedOperation, Plan, uniform
from lightning_contrast.augment.images import check_window


class FusedWindow(FusedOperation, IntensityAugmentationBase2D):
    """Map a window of intensities to 0..1, with random limits, gamma and shift, drawn per image.

    ``clip(clip((x - low) / (high - low)) ** gamma + shift)``, where the center of the window moves by
    U(-jitter, jitter) of its width and the width is multiplied by U(1 - jitter, 1 + jitter). An image that is not
    selected has the window without jitter, and neither gamma nor shift. The gamma is Kornia's; Kornia has no window.

    Args:
        window: The values that become 0 and 1; may exceed 0..1.
        jitter: Share of the window's width, in [0, 1).
        gamma: Range of the exponent, above 0; drawn log-uniformly.
        shift: Limit of the amount added, 0..1.
        p: Probability of the random part per image.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(
        self,
        window: tuple[float, float] = (0.0, 1.0),
        *,
        jitter: float = 0.1,
        gamma: tuple[float, float] = (0.7, 1.5),
        shift: float = 0.1,
        p: float = 1.0,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_window(window)
        check_interval("jitter", jitter, "[0, 1)", "Give a share of the window's width, such as 0.1")
        check_range("gamma", gamma, 0.0, float("inf"))
        require(gamma[0] > 0, "gamma", "start above 0", tuple(gamma), "Give the smallest exponent, such as 0.7")
        check_probability("shift", shift)
        check_probability("p", p)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.window, self.jitter, self.gamma, self.shift = tuple(window), jitter, tuple(gamma), shift
        self.probability, self.backend = p, backend
        self.flags = {"probability": p, "window": self.window}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``low``, ``width``, ``gamma`` and ``shift``, each ``(B,)``."""
        numbers = uniform(batch, 5).astype(np.float64)
        chosen = numbers[:, 0] < self.chance
        moved, widened, added = np.where(chosen[:, None], 2 * numbers[:, 1:4] - 1, 0.0).T
        extent = self.window[1] - self.window[0]
        center = (self.window[0] + self.window[1]) / 2 + self.jitter * extent * moved
        wide = extent * (1 + self.jitter * widened)
        least, most = np.log(self.gamma)
        gamma = np.where(chosen, np.exp(least + (most - least) * numbers[:, 4]), 1.0)
        drawn = {"low": center - wide / 2, "width": wide, "gamma": gamma, "shift": self.shift * added}
        return {name: value.astype(np.float32) for name, value in drawn.items()}

    def prepare(self, draw: Draw) -> Plan:
        """Return the numbers of each image as ``(B, 1, 1, 1)``."""
        return {name: value[:, None, None, None] for name, value in draw.items()}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Return the windowed ``images`` ``(B, C, H, W)``."""
        low, width, gamma, shift = (plan[name].to(images.dtype) for name in ("low", "width", "gamma", "shift"))
        return images.sub(low).div_(width).clamp_(0, 1).pow_(gamma).add_(shift).clamp_(0, 1)
