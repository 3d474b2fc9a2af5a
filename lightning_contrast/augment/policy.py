"""Base class of the view policies and the builder behind all published ones."""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, check_probability, fail, require
from lightning_contrast.augment.fused.base import Backend, FusedOperation
from lightning_contrast.augment.fused.view import FusedView
from lightning_contrast.augment.images import as_float, check_policy_input, statistics
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, ViewSpec
from lightning_contrast.augment.whole_images import WholeImages, center_squares
from lightning_contrast.precision import full_precision

_RGB = 3


class ViewPolicy(nn.Module):
    """Map a batch of images to a list of random views, on the device of the images.

    Args:
        views: One module per view, from images ``(B, C, H, W)`` to ``(B, C, h, w)``. A module that occurs several
            times in a row makes its views together on an accelerator, each with its own random numbers.
        size: Edge in pixels of the (global) views and of the result of `eval_transform`.
        channels: Number of channels of the images.
        mean: Subtracted at the end, one number per channel; None for zeros.
        std: Divided by at the end, one number per channel; None for ones.
        interpolation: Resampling of `eval_transform`: ``"bilinear"`` or ``"bicubic"``.

    Attributes:
        size: As given.
        mean: A list with one number per channel.
        std: A list with one number per channel.
        strength: Share of the policy's strength, in 0..1; see `set_strength`.
        input_spec: ``{"size", "mean", "std"}`` as plain Python values: the input that a trained backbone expects.
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
        self.strength = 1.0

    def set_strength(self, strength: float) -> None:
        """Set the strength of the random views, a share of that of the policy; `eval_transform` has none.

        At 0 a view is the whole image, resized, perhaps flipped, and blurred by the smallest sigma; at 1 it is that of
        the policy, bit for bit. Between them the spreads of the jitter, the largest sigma of the blur, and the ranges
        of the crop's area and aspect ratio are interpolated; of grayscale, solarization and automatic augmentation,
        which have no strength, the probability is.

        Args:
            strength: In 0..1.

        Raises:
            TypeError: If a view of somebody else has no ``set_strength``.
        """
        check_probability("strength", strength, "It is a share of the policy's strength")
        for view in self.views:
            if not hasattr(view, "set_strength"):
                hint = "Define `set_strength(strength)` on it, or leave the strength out"
                fail("views", "have a strength", type(view).__name__, hint, TypeError)
        for view in dict.fromkeys(self.views):
            view.set_strength(strength)  # type: ignore[operator]  # checked above
        self.strength = strength

    def candidates(self, view: int, count: int, min_area: float) -> "ViewPolicy":
        """Return a policy of several views that are like one of this policy, without small crops.

        Args:
            view: Index of the view.
            count: Number of views, >= 1.
            min_area: Smallest share of the image area that a crop is drawn with, in 0..1.

        Raises:
            ValueError: If there is no such view, or all of its crops are smaller.
            TypeError: If it is no view of this package.
        """
        hint = "Give the index of a view"
        require(0 <= view < len(self.views), "view", f"be one of the policy's {len(self.views)}", view, hint)
        one: Any = copy.deepcopy(self.views[view])
        if not hasattr(one, "set_min_area"):
            hint = "Use a policy of this package"
            fail("policy", "have views with `set_min_area`", type(one).__name__, hint, TypeError)
        one.set_min_area(min_area)
        return ViewPolicy([one] * count, size=self.size, channels=self.channels, mean=self.mean, std=self.std)

    @property
    def input_spec(self) -> dict[str, Any]:
        """Return the input that a backbone trained on these views expects: ``{"size", "mean", "std"}``."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the random views of a batch.

        All random numbers come from torch's global CPU generator.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1, at least one pixel. Of `WholeImages` fused views
                are crops at the shapes of the images; other views, as with ``fused=False``, are made of the pixels.

        Returns:
            One float32 tensor ``(B, C, h, w)`` per view.
        """
        if isinstance(images, WholeImages):
            return self._make_views(images.pixels, images.sizes)
        return self._make_views(images, None)

    @full_precision  # under autocast the matrix products of the resampling would round pixels to 8 bits of mantissa
    def _make_views(self, images: Tensor, sizes: NDArray[np.int64] | None) -> list[Tensor]:
        images = check_policy_input(images, self.channels)
        views: list[Tensor] = []
        for view, same in itertools.groupby(self.views):  # equal views are one module
            count = len(list(same))
            if isinstance(view, FusedView):
                views += view.make_views(images, count, sizes)
            else:
                views += [view(images) for _ in range(count)]
        return views

    @torch.no_grad()
    @full_precision
    def eval_transform(self, images: Tensor) -> Tensor:
        """Apply the deterministic transform of evaluation: resize, center crop and normalize.

        The shorter side is resized to the policy's size with antialiasing, unless it has that size already.

        Args:
            images: As for `forward`.

        Returns:
            ``(B, C, size, size)``, float32.
        """
        squares = center_squares(images) if isinstance(images, WholeImages) else images
        pixels = as_float(check_policy_input(squares, self.channels))
        height, width = pixels.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            edges = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
            pixels = F.interpolate(pixels, edges, mode=self.interpolation, antialias=True).clamp_(0, 1)
            height, width = edges
        top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        pixels = pixels.clone(memory_format=torch.contiguous_format)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            if (mean, std) != (0.0, 1.0):  # plain numbers need no transfer to the device
                pixels[:, channel].sub_(mean).div_(std)
        return pixels


def make_policy(
    specs: Sequence[ViewSpec],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fused: bool = True,
    channels: int = 3,
    color: bool = True,
    auto: Auto | None = None,
    backend: Backend = None,
    locations: bool = False,
) -> ViewPolicy:
    """Build a policy with one view per spec.

    Args:
        specs: Parameters of each view; the first defines the policy's size and the resampling of `eval_transform`.
        mean: See `ViewPolicy`.
        std: See `ViewPolicy`.
        fused: See `ViewOptions`, as for the following arguments.
        channels: Number of channels.
        color: Apply saturation, hue and grayscale.
        auto: Automatic augmentation before each view.
        backend: See `Backend`.
        locations: See `ViewOptions`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.kornia_view import StockView, auto_augment

    check_choice("backend", backend, (None, "cpu", "accelerator"))
    check_choice("auto", auto, (None, "randaugment", "autoaugment", "trivialaugment"))
    check_at_least("channels", channels, 1)
    hint = "Set `color=False`, which skips saturation, hue and grayscale"
    require(channels in (1, _RGB) or not color, "channels", "be 3 (or 1) for the color operations", channels, hint)
    require(channels == _RGB or auto is None, "auto", "be None unless `channels` is 3", auto, "Remove `auto`")
    hint = "Leave `fused` at True: stock Kornia's crops are not recorded"
    require(fused or not locations, "locations", "be False with `fused=False`", locations, hint)
    mean, std = statistics(mean, std, channels)
    views: list[nn.Module] = []
    for spec, same in itertools.groupby(specs):
        if not color or channels != _RGB:
            brightness, contrast, _, _ = spec.jitter
            spec = dataclasses.replace(spec, jitter=(brightness, contrast, 0.0, 0.0), gray_p=0.0)  # noqa: PLW2901
        pre_transform = None if auto is None else auto_augment(auto)
        view: nn.Module
        if fused:
            view = fused_view(spec, mean, std, pre_transform, backend)
            view.locates = locations
        else:
            view = StockView(spec, mean, std, pre_transform)
        views += [view] * len(list(same))
    interpolation = "bicubic" if specs[0].bicubic else "bilinear"
    return ViewPolicy(views, size=specs[0].size, channels=channels, mean=mean, std=std, interpolation=interpolation)


def fused_view(
    spec: ViewSpec, mean: Sequence[float], std: Sequence[float], pre_transform: nn.Module | None, backend: Backend
) -> FusedView:
    """Build one view of fused operations, without those of probability 0."""
    from lightning_contrast.augment.fused import FusedColorJitter, FusedGaussianBlur, FusedResizedCrop, FusedSolarize

    crop = FusedResizedCrop(
        spec.size,
        spec.scale,
        spec.ratio,
        flip=spec.flip,
        interpolation="bicubic" if spec.bicubic else "bilinear",
        fit="clamp" if spec.clamp else "retry",
    )
    color = FusedColorJitter(
        *spec.jitter,
        p=spec.jitter_p,
        grayscale=spec.gray_p,
        additive_brightness=spec.additive_brightness,
        gray_first=spec.gray_first,
    )
    operations: list[FusedOperation] = [color]
    if spec.blur_p > 0 and spec.blur_kernel != 1:
        operations.append(FusedGaussianBlur(spec.blur_p, BLUR_SIGMA, kernel_size=spec.blur_kernel))
    if spec.solarize_p > 0:
        operations.append(FusedSolarize(spec.solarize_p))
    return FusedView(crop, operations, mean, std, pre_transform=pre_transform, backend=backend)
