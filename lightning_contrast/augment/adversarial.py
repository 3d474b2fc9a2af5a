"""Adversarial images: projected gradient ascent (PGD) on a loss, within a maximum distance per pixel."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_not_negative, fail, require
from lightning_contrast.seeding import send


def _check_ball(epsilon: float, step_size: float, low: float, high: float) -> None:
    """Check the numbers of an attack."""
    check_not_negative("epsilon", epsilon, "It is the largest change of a pixel in 0..1, such as 8 / 255")
    check_not_negative("step_size", step_size, "It is the change of a pixel per step in 0..1, such as 2 / 255")
    require(low < high, "low", f"lie below `high` = {high}", low, "Give the range of the pixels, such as 0 and 1")


def _ascend(
    images: Tensor, moved: Tensor, gradient: Tensor, epsilon: float, step_size: float, low: float, high: float
) -> Tensor:
    """Return changed images after one step: along the sign, into the range, then into the ball around the images."""
    moved = (moved + step_size * gradient.sign()).clamp(low, high)
    return torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon)


@torch.no_grad()
def pgd_step(
    images: Tensor,
    gradient: Tensor,
    *,
    start: Tensor,
    epsilon: float,
    step_size: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Return adversarial images after one step of PGD, in the order of RoCL's reference implementation.

    The offset is added and clipped to the range; then comes a step along the sign of the gradient, another clipping,
    and the projection to the L-infinity ball around the images. A pixel whose gradient is 0 stays.

    Args:
        images: Images ``(B, C, H, W)``, with values from ``low`` to ``high``.
        gradient: Gradient of the loss at ``images + start``, ``(B, C, H, W)``.
        start: Offset of the changed images from ``images``, ``(B, C, H, W)``.
        epsilon: Largest change of a pixel, >= 0.
        step_size: Change of a pixel, >= 0.
        low: Smallest value of a pixel.
        high: Largest value of a pixel.

    Returns:
        Images ``(B, C, H, W)``, without gradient.

    Raises:
        ValueError: If a number is out of range or the shapes differ.
    """
    _check_ball(epsilon, step_size, low, high)
    if not images.shape == gradient.shape == start.shape:
        shapes = tuple(images.shape), tuple(gradient.shape), tuple(start.shape)
        fail("images", "have the shape of `gradient` and `start`", shapes, "Pass one value per pixel")
    return _ascend(images, (images + start).clamp(low, high), gradient, epsilon, step_size, low, high)


def pgd_attack(
    loss_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    random_start: bool = False,
    low: float = 0.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images that are changed to maximize a loss, by PGD (https://arxiv.org/abs/1706.06083) in L-infinity.

    Gradients are computed with respect to the images alone: those of weights are neither computed nor changed. The
    networks in ``loss_fn`` are run in the mode that they are in; see `callbacks.AdversarialView` for one in training.

    Args:
        loss_fn: Function of images ``(B, C, H, W)`` that returns a scalar or one value per image, ``(B,)``.
        images: Images ``(B, C, H, W)``, with values from ``low`` to ``high``; 16-bit ones are changed in float32.
        epsilon: Largest change of a pixel, >= 0; in 0..1 for pixels in 0..1, usually 8 / 255.
        step_size: Change of a pixel per step, >= 0; 2.5 epsilon / steps is usual.
        steps: Number of steps, >= 0.
        random_start: Start at an offset that is uniform in [-epsilon, epsilon].
        low: Smallest value of a pixel.
        high: Largest value of a pixel.
        generator: Generator of the CPU for the offset; None is torch's global one.

    Returns:
        Images ``(B, C, H, W)``, without gradient, in the dtype of ``images``.

    Raises:
        ValueError: If a number is out of range, or the loss does not depend on the images.
        TypeError: If ``steps`` is not a whole number, or the images are not floating point.
    """
    _check_ball(epsilon, step_size, low, high)
    check_at_least("steps", steps, 0)
    if not images.is_floating_point():
        fail("images", "be floating point", str(images.dtype), "Divide uint8 images by 255", TypeError)
    clean = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    moved = clean
    if random_start:
        drawn = send(torch.rand(clean.shape, generator=generator, dtype=clean.dtype, device="cpu"), clean.device)
        moved = (clean + epsilon * (2 * drawn - 1)).clamp(low, high)
    for _ in range(steps):
        with torch.enable_grad():
            candidate = moved.requires_grad_() if moved is not clean else clean.clone().requires_grad_()
            loss = loss_fn(candidate.to(images.dtype)).sum()
            hint = "Compute it from the images that the function gets, without `detach` or `no_grad`"
            require(loss.requires_grad, "loss_fn", "depend on the images", "a loss without gradient", hint)
            # The sign does not depend on a factor, which keeps small gradients from vanishing in float16.
            (gradient,) = torch.autograd.grad(loss * len(images), candidate)
        moved = _ascend(clean, candidate.detach(), gradient, epsilon, step_size, low, high)
    return moved.detach().to(images.dtype)
