"""A view policy: images in, a list of random views out; and the plain form of the images for evaluation."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, require
from lightning_contrast.augment.images import as_float, check_images, full_precision, statistics
from lightning_contrast.augment.operation import (
    Draw,
    Form,
    FusedOperation,
    Plan,
    to_device,
    wants_accelerator_form,
)
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, ViewRecipe

_RGB = 3


_BLOCK_BYTES = 1 << 23  # of float32 views: smaller blocks pay more starts of operations, larger ones leave the cache


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep the memory of temporary tensors for the next ones, once in a process.

    By default it returns blocks of this size to the system and gets them back page by page, which took a quarter of
    the time of a batch of views. It stops that for all blocks up to the largest, at most 32 MiB, that was ever freed;
    the block freed here is never touched and therefore costs nothing. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class FusedView(nn.Module):
    """One random view of each image by fused operations.

    All random numbers are drawn first, on the host; what the device needs of them goes there in one copy. On a CPU
    the operations run on blocks of images, so that memory stays bounded and near the processor.

    Args:
        crop: Makes the view's pixels from the image; has a ``size``.
        operations: What follows, in order.
        mean: Subtracted at the end, one number a channel.
        std: Divided by at the end, one number a channel.
        front: What the images go through first, as floats.
        form: See `Form`.
    """

    def __init__(
        self,
        crop: FusedOperation,
        operations: Sequence[FusedOperation],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        front: nn.Module | None = None,
        form: Form = None,
    ) -> None:
        super().__init__()
        self.front = front
        self.operations = nn.ModuleList(cast("Sequence[nn.Module]", [crop, *operations]))
        self.form = form
        for operation in self._operations():
            operation.form = form
        self.offset = np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32).reshape(1, -1, 1, 1)
        self.factor = np.array([1 / s for s in std], np.float32).reshape(1, -1, 1, 1)
        self.normalizes = bool((self.offset != 0).any() or (self.factor != 1).any())

    def _operations(self) -> list[FusedOperation]:
        return [cast("FusedOperation", operation) for operation in self.operations]

    def forward(self, images: Tensor) -> Tensor:
        """Return the views ``(B, C, size, size)`` of ``images`` ``(B, C, H, W)``, uint8 or float."""
        if self.front is not None:
            images = self.front(as_float(images)).clamp_(0, 1)
        batch, channels, height, width = images.shape
        size = int(cast("Any", self.operations[0]).size)
        draws = [self._operations()[0].draw(batch, height, width)]
        draws += [operation.draw(batch, size, size) for operation in self._operations()[1:]]
        images = images.float() if images.is_floating_point() else images
        if wants_accelerator_form(self.form, images):
            return self._compute(images, draws)
        keep_freed_memory()
        views = torch.empty(batch, channels, size, size, device=images.device)
        blocks = max(1, round(batch * channels * size * size * 4 / _BLOCK_BYTES))
        block = max(1, -(-batch // blocks))
        for start in range(0, batch, block):
            part = slice(start, start + block)
            self._compute(images[part], [{k: v[part] for k, v in draw.items()} for draw in draws], out=views[part])
        return views

    def _compute(self, images: Tensor, draws: list[Draw], out: Tensor | None = None) -> Tensor:
        """Apply all operations to sorted images, with one transfer of their parameters, and put them back in order."""
        operations = self._operations()
        keys = [operation.sort_key(draw) for operation, draw in zip(operations, draws, strict=True)]
        key = next((key for key in keys if key is not None), np.zeros(len(images)))
        order = key.argsort(kind="stable")
        plan: Plan = {"offset": self.offset, "factor": self.factor, "order": order, "back": order.argsort()}
        for i, (operation, draw) in enumerate(zip(operations, draws, strict=True)):
            sorted_draw = {name: value[order] for name, value in draw.items()}
            plan |= {f"{i}.{name}": value for name, value in operation.prepare(sorted_draw).items()}
        plan = to_device(plan, images.device)
        images = images.index_select(0, plan["order"])
        for i, operation in enumerate(operations):
            prefix = f"{i}."
            mine = {name.removeprefix(prefix): value for name, value in plan.items() if name.startswith(prefix)}
            images = operation.compute_(images, mine)
        if self.normalizes:
            images = torch.addcmul(plan["offset"], images, plan["factor"])
        return torch.index_select(images, 0, plan["back"], out=out)


class ViewPolicy(nn.Module):
    """Make the views of a batch, all on the device of the images.

    Args:
        views: One module a view: images ``(B, C, H, W)`` to ``(B, C, h, w)``.
        size: Edge in pixels of the plain images, and of the (global) views.
        channels: Number of channels of the images.
        mean: Subtracted from every channel at the end; None subtracts nothing.
        std: Every channel is divided by it at the end; None divides by nothing.
        interpolation: How `plain` resizes: ``"bilinear"`` or ``"bicubic"``.

    Attributes:
        size: As given.
        mean: A list of numbers, one a channel.
        std: A list of numbers, one a channel.
        input_spec: ``{"size", "mean", "std"}`` in plain Python: what a backbone that was trained on these views needs.
    """

    def __init__(
        self,
        views: Sequence[nn.Module],
        *,
        size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        check_at_least("size", size, 1)
        check_at_least("channels", channels, 1)
        check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
        self.views = nn.ModuleList(views)
        self.size, self.channels, self.interpolation = size, channels, interpolation
        self.mean, self.std = statistics(mean, std, channels)

    @property
    def input_spec(self) -> dict[str, Any]:
        """What a backbone trained on these views expects: ``{"size", "mean", "std"}``."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the random views of a batch.

        All random numbers come from torch's global CPU generator.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1, at least one pixel.

        Returns:
            One float tensor ``(B, C, h, w)`` a view.
        """
        images = check_images(images, self.channels)
        # inside autocast the matrix products of the resampling would round pixels to 8 bits of mantissa
        with full_precision(images.device):
            return [view(images) for view in self.views]

    @torch.no_grad()
    def plain(self, images: Tensor) -> Tensor:
        """Return the images as evaluation sees them: resized, centre-cropped to the policy's size and normalised.

        The shorter side is resized to the size (antialiased); images of that size already are not resampled.

        Args:
            images: As for `forward`.

        Returns:
            ``(B, C, size, size)``, float.
        """
        images = check_images(images, self.channels)
        pixels = as_float(images)
        height, width = pixels.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            edges = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
            with full_precision(images.device):
                pixels = F.interpolate(pixels, edges, mode=self.interpolation, antialias=True).clamp_(0, 1)
            height, width = edges
        top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        pixels = pixels.clone(memory_format=torch.contiguous_format)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            if (mean, std) != (0.0, 1.0):  # plain numbers: no tensor of them has to reach the device
                pixels[:, channel].sub_(mean).div_(std)
        return pixels


def make_policy(
    recipes: Sequence[ViewRecipe],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    fused: bool = True,
    channels: int = 3,
    color: bool = True,
    auto: Auto | None = None,
    form: Form = None,
) -> ViewPolicy:
    """Build a policy with one view for each recipe; the first gives the policy's size.

    Args:
        recipes: The numbers of each view.
        mean: See `ViewPolicy`.
        std: See `ViewPolicy`.
        fused: See `ViewOptions`, as for the others.
        channels: Number of channels.
        color: Whether to keep saturation, hue and grayscale.
        auto: Automatic augmentation in front.
        form: See `Form`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.kornia_view import StockView, auto_augment

    check_choice("form", form, (None, "cpu", "accelerator"))
    check_choice("auto", auto, (None, "randaugment", "autoaugment", "trivialaugment"))
    check_at_least("channels", channels, 1)
    mend = "Set `color=False`, which leaves out saturation, hue and grayscale"
    require(channels in (1, _RGB) or not color, "channels", "be 3 (or 1) for the colour operations", channels, mend)
    require(channels == _RGB or auto is None, "auto", "be None unless `channels` is 3", auto, "Leave `auto` out")
    mean, std = statistics(mean, std, channels)
    views: list[nn.Module] = []
    for recipe in recipes:
        if not color or channels != _RGB:
            brightness, contrast, _, _ = recipe.jitter
            recipe = dataclasses.replace(recipe, jitter=(brightness, contrast, 0.0, 0.0), gray_p=0.0)  # noqa: PLW2901
        front = None if auto is None else auto_augment(auto)
        if fused:
            views.append(fused_view(recipe, mean, std, front, form))
        else:
            views.append(StockView(recipe, mean, std, front))
    interpolation = "bicubic" if recipes[0].bicubic else "bilinear"
    return ViewPolicy(views, size=recipes[0].size, channels=channels, mean=mean, std=std, interpolation=interpolation)


def fused_view(
    recipe: ViewRecipe, mean: Sequence[float], std: Sequence[float], front: nn.Module | None, form: Form
) -> FusedView:
    """Build one view of fused operations; what a recipe never does is left out."""
    from lightning_contrast.augment.fused import FusedColorJitter, FusedGaussianBlur, FusedResizedCrop, FusedSolarize
    from lightning_contrast.augment.operation import FusedOperation

    crop = FusedResizedCrop(
        recipe.size,
        recipe.scale,
        flip=recipe.flip,
        interpolation="bicubic" if recipe.bicubic else "bilinear",
        fit="clamp" if recipe.clamp else "retry",
    )
    color = FusedColorJitter(
        *recipe.jitter,
        p=recipe.jitter_p,
        grayscale=recipe.gray_p,
        additive_brightness=recipe.additive_brightness,
        gray_first=recipe.gray_first,
    )
    operations: list[FusedOperation] = [color]
    if recipe.blur_p > 0 and recipe.blur_kernel != 1:
        operations.append(FusedGaussianBlur(recipe.blur_p, BLUR_SIGMA, kernel_size=recipe.blur_kernel))
    if recipe.solarize_p > 0:
        operations.append(FusedSolarize(recipe.solarize_p))
    return FusedView(crop, operations, mean, std, front=front, form=form)
