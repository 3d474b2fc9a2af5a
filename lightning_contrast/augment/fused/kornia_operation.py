"""Kornia's own operations as steps of a view."""

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability, fail, require
from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    is_empty,
    put_,
    rows_where,
    take,
    uniform,
)


class KorniaOperation(FusedOperation, IntensityAugmentationBase2D):
    """Apply an operation of Kornia on intensities, with probability ``p`` per image.

    Its parameters are drawn on the host by Kornia's generator; only the selected images are computed, and the result
    is clipped to 0..1. For ``first_operations`` and ``last_operations`` of a `ViewSpec`.

    Args:
        operation: Such as ``kornia.augmentation.RandomSnow()``; its own probability is not used. Its parameters must be
            some numbers per image: operations that draw a number for each pixel, or another number of parameters in
            each call, and geometric ones, can be the ``pre_transform`` of a policy.
        p: Probability per image.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Raises:
        TypeError: If it is no operation of Kornia on intensities.
        ValueError: If its parameters have other shapes than some numbers per image.

    Shapes: ``(B, C, H, W)`` in 0..1, with the channels that the operation takes.
    """

    def __init__(
        self,
        operation: IntensityAugmentationBase2D,
        p: float = 0.5,
        *,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_probability("p", p)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        hint = "Give it to the policy as `pre_transform`"
        if not isinstance(operation, IntensityAugmentationBase2D):
            fail("operation", "be an intensity operation of Kornia", type(operation).__name__, hint, TypeError)
        super().__init__(p=1.0, keepdim=keepdim)
        self.operation, self.probability, self.backend = operation, p, backend
        self.flags = {"probability": p}
        with torch.random.fork_rng(devices=[]):
            found = [operation.generate_parameters((2, channels, 32, 48)) for channels in (1, 1, 3)]
        shapes = [{name: tuple(value.shape) for name, value in params.items()} for params in found]
        fixed = all(other == shapes[0] for other in shapes[1:])
        require(fixed, "operation", "draw some numbers per image", type(operation).__name__, hint)
        self.names = [name for name, shape in shapes[0].items() if shape[:1] == (2,)]  # others are for the whole batch

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``chosen`` ``(B,)`` and the parameters of the operation, each ``(B, ...)``."""
        chosen = uniform(batch, 1)[:, 0] < self.chance
        params = self.operation.generate_parameters((batch, 1, height, width))
        return {"chosen": chosen} | {name: params[name].numpy() for name in self.names}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and their parameters ``(n, ...)``, on the host, as Kornia expects them."""
        chosen = draw["chosen"]
        params = {name: torch.from_numpy(draw[name][chosen]) for name in self.names}
        return {"rows": rows_where(chosen), "params": params}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Change rows of ``images`` ``(B, C, H, W)`` in place."""
        if not is_empty(plan["rows"]):
            result = self.operation.apply_transform(
                take(images, plan["rows"]), plan["params"], self.operation.flags, None
            )
            put_(images, plan["rows"], result.to(images.dtype).clamp(0, 1))
        return images
