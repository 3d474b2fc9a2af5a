"""Base class of the view policies and the builder behind all published ones."""

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, check_probability, fail, require
from lightning_contrast.augment.bands import Pairs, append_indices, check_indices
from lightning_contrast.augment.fused.base import Backend, FusedOperation
from lightning_contrast.augment.fused.view import FusedView
from lightning_contrast.augment.images import (
    INTERPOLATIONS,
    PixelRange,
    Size,
    as_float,
    check_input_spec,
    check_policy_input,
    check_scale,
    check_size,
    check_window,
    rescale,
    statistics,
)
from lightning_contrast.augment.view_spec import BLUR_SIGMA, Auto, PreTransform, ViewSpec
from lightning_contrast.augment.whole_images import WholeImages, center_squares
from lightning_contrast.precision import full_precision

_RGB = 3


class ViewPolicy(nn.Module):
    """Map a batch of images to a list of random views, on the device of the images.

    Args:
        views: One module per view, from images ``(B, C, H, W)`` to ``(B, C, h, w)``. A module that occurs several
            times in a row makes its views together on an accelerator, each with its own random numbers.
        size: Edge in pixels, or height and width, of the (global) views and of the result of `eval_transform`.
        channels: Number of channels of the images.
        mean: Subtracted at the end, one number per channel; None for zeros.
        std: Divided by at the end, one number per channel; None for ones.
        interpolation: Resampling of `eval_transform`: ``"bilinear"`` or ``"bicubic"``.
        scale: The values of the images that become 0 and 1, such as ``(0, 65535)``; values outside are clipped. None
            for uint8 in 0..255 and float in 0..1.
        window: The scaled pixels that `eval_transform` maps to 0 and 1, as `FusedWindow` does in the views.
        indices: Index channels that `eval_transform` appends, as the views do; see `append_indices`. ``mean`` and
            ``std`` have numbers for them too.

    Attributes:
        size: As given; a square is one number.
        mean: A list with one number per channel.
        std: A list with one number per channel.
        strength: Share of the policy's strength, in 0..1; see `set_strength`.
        input_spec: The input that a trained backbone expects, as plain values.
    """

    def __init__(
        self,
        views: Sequence[nn.Module],
        *,
        size: Size,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bilinear",
        scale: PixelRange = None,
        window: tuple[float, float] = (0.0, 1.0),
        indices: Pairs = (),
    ) -> None:
        super().__init__()
        self.height, self.width = check_size(size)
        check_at_least("channels", channels, 1)
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        self.views = nn.ModuleList(views)
        self.size: Size = self.height if self.height == self.width else (self.height, self.width)
        self.channels, self.interpolation = channels, interpolation
        check_scale(scale)
        check_window(window)
        self.window = window
        self.scale, self.indices = scale, check_indices(indices, channels)
        self.mean, self.std = statistics(mean, std, channels + len(self.indices))
        self.strength = 1.0

    def set_strength(self, strength: float) -> None:
        """Set the strength of the random views, a share of that of the policy; `eval_transform` has none.

        At 0 a view is the whole image, resized, perhaps flipped, and blurred by the smallest sigma; at 1 it is that of
        the policy, bit for bit. Between them the spreads of the jitter, the largest sigma of the blur, and the ranges
        of the crop's area and aspect ratio are interpolated; of all other operations, such as grayscale, automatic
        augmentation or a rotation, the probability is. Flips, quarter turns and index channels stay as they are.

        Args:
            strength: In 0..1.

        Raises:
            TypeError: If a view of somebody else has no ``set_strength``.
        """
        check_probability("strength", strength, "It is a share of the policy's strength")
        for view in (view for view in self.views if not hasattr(view, "set_strength")):
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
        return ViewPolicy(
            [one] * count,
            size=self.size,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            scale=self.scale,
            window=self.window,
            indices=self.indices,
        )

    @property
    def input_spec(self) -> dict[str, Any]:
        """Return the input that a backbone trained on these views expects, as plain values that fit into JSON.

        ``{"size", "mean", "std"}``: one number or [height, width], and lists with one number per channel of the
        backbone's input. What differs from the defaults follows: "scale", "window", "indices" and "interpolation" as
        given to the policy. A policy made by `from_input_spec` prepares images in the same way.
        """
        size = self.size if isinstance(self.size, int) else list(self.size)
        spec: dict[str, Any] = {"size": size, "mean": list(self.mean), "std": list(self.std)}
        if self.scale is not None:
            spec["scale"] = [float(value) for value in self.scale]
        if self.window != (0.0, 1.0):
            spec["window"] = [float(value) for value in self.window]
        if self.indices:
            spec["indices"] = [list(pair) for pair in self.indices]
        if self.interpolation != "bilinear":
            spec["interpolation"] = self.interpolation
        return spec

    @classmethod
    def from_input_spec(
        cls, spec: Mapping[str, Any], *, channels: int = 3, interpolation: str | None = None
    ) -> "ViewPolicy":
        """Return a policy without views, whose `eval_transform` prepares images as the `input_spec` says.

        Args:
            spec: Of a policy, a checkpoint or an exported backbone: ``load_backbone(path).input_spec``.
            channels: Number of channels of the images, if the mean is None.
            interpolation: "bilinear" or "bicubic"; None is that of the spec, bilinear if it names none.

        Raises:
            ValueError: If an entry is missing, unknown or out of its range.

        Example:
            >>> from lightning_contrast.augment import simclr_views
            >>> policy = ViewPolicy.from_input_spec(simclr_views(32).input_spec)
            >>> tuple(policy.eval_transform(torch.rand(1, 3, 40, 50)).shape)
            (1, 3, 32, 32)
        """
        spec = check_input_spec(spec)
        indices = [(first, second) for first, second in spec.get("indices", [])]
        channels = channels if spec["mean"] is None else len(spec["mean"]) - len(indices)
        scale, (low, high) = spec.get("scale"), spec.get("window", (0.0, 1.0))
        return cls(
            [],
            size=spec["size"],
            channels=channels,
            mean=spec["mean"],
            std=spec["std"],
            interpolation=interpolation or spec.get("interpolation", "bilinear"),
            scale=None if scale is None else (scale[0], scale[1]),
            window=(low, high),
            indices=indices,
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the random views of a batch.

        All random numbers come from torch's global CPU generator.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1, or of any type in the range of ``scale``. Of
                `WholeImages` fused views are crops at the shapes of the images; other views, as with ``fused=False``,
                are made of the pixels.

        Returns:
            One float32 tensor ``(B, C, h, w)`` per view.
        """
        if isinstance(images, WholeImages):
            return self._make_views(images.pixels, images.sizes)
        return self._make_views(images, None)

    @full_precision  # under autocast the matrix products of the resampling would round pixels to 8 bits of mantissa
    def _make_views(self, images: Tensor, sizes: NDArray[np.int64] | None) -> list[Tensor]:
        images = check_policy_input(images, self.channels, self.scale)
        views: list[Tensor] = []
        for view, same in itertools.groupby(self.views):  # equal views are one module
            count = len(list(same))
            if isinstance(view, FusedView):
                views += view.make_views(images, count, sizes)
            else:
                views += [view(images) for _ in range(count)]
        return views

    @full_precision
    def eval_transform(self, images: Tensor) -> Tensor:
        """Apply the deterministic transform of evaluation: resize, center crop and normalize.

        With antialiasing, unless the images have the policy's size already. They are resized as little as their center
        crop allows: of a square size, their shorter side becomes that size.

        Args:
            images: As for `forward`.

        Returns:
            ``(B, C, h, w)``, float32.
        """
        if isinstance(images, WholeImages):
            pixels = check_policy_input(images.pixels, self.channels, self.scale)
            pixels = center_squares(WholeImages(pixels, images.sizes))
        else:
            pixels = as_float(check_policy_input(images, self.channels, self.scale))
        height, width = pixels.shape[-2:]
        scale = max(self.height / height, self.width / width)
        if scale != 1:
            edges = (max(self.height, round(height * scale)), max(self.width, round(width * scale)))
            pixels = F.interpolate(pixels, edges, mode=self.interpolation, antialias=True).clamp_(0, 1)
            height, width = edges
        top, left = (height - self.height) // 2, (width - self.width) // 2
        pixels = pixels[..., top : top + self.height, left : left + self.width]
        if self.window != (0.0, 1.0):
            pixels = rescale(pixels, self.window)
        pixels = append_indices(pixels, self.indices).clone(memory_format=torch.contiguous_format)
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
    pre_transform: PreTransform = None,
    scale: PixelRange = None,
    window: tuple[float, float] = (0.0, 1.0),
    indices: Pairs = (),
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
        pre_transform: See `ViewOptions`.
        scale: See `ViewPolicy`.
        window: See `ViewPolicy`; give the views a `FusedWindow` of it.
        indices: See `ViewPolicy`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.kornia_view import Before, StockView, auto_augment

    check_choice("backend", backend, (None, "cpu", "accelerator"))
    check_choice("auto", auto, (None, "randaugment", "autoaugment", "trivialaugment"))
    check_at_least("channels", channels, 1)
    hint = "Set `color=False`, which skips saturation, hue and grayscale"
    require(channels in (1, _RGB) or not color, "channels", "be 3 (or 1) for the color operations", channels, hint)
    require(channels == _RGB or auto is None, "auto", "be None unless `channels` is 3", auto, "Remove `auto`")
    hint = "Leave `fused` at True: stock Kornia's crops are not recorded"
    require(fused or not locations, "locations", "be False with `fused=False`", locations, hint)
    if pre_transform is not None and not callable(pre_transform):
        hint = "Give a function or module from images (B, C, H, W) to images"
        fail("pre_transform", "be callable", type(pre_transform).__name__, hint, TypeError)
    hint = "A box does not tell where the pixels of such a view are; set `locations=False`"
    free = not (locations and any(spec.moves_pixels for spec in specs))
    require(free, "locations", "be False with turns, vertical flips, rotation and deformations", True, hint)
    indices = check_indices(indices, channels)
    mean, std = statistics(mean, std, channels + len(indices))
    views: list[nn.Module] = []
    for spec, same in itertools.groupby(specs):
        if not color or channels != _RGB:
            brightness, contrast, _, _ = spec.jitter
            gray = spec.gray_p if spec.band_gray and channels > 1 else 0.0
            spec = dataclasses.replace(spec, jitter=(brightness, contrast, 0.0, 0.0), gray_p=gray)  # noqa: PLW2901
        steps = ([] if auto is None else [auto_augment(auto)]) + ([] if pre_transform is None else [pre_transform])
        first = Before(steps) if steps else None
        view: nn.Module
        if fused:
            view = fused_view(spec, mean, std, first, backend, indices)
            view.locates = locations
        else:
            view = StockView(spec, mean, std, first, indices)
        views += [view] * len(list(same))
    return ViewPolicy(
        views,
        size=specs[0].size,
        channels=channels,
        mean=mean,
        std=std,
        interpolation="bicubic" if specs[0].bicubic else "bilinear",
        scale=scale,
        window=window,
        indices=indices,
    )


def fused_view(
    spec: ViewSpec,
    mean: Sequence[float],
    std: Sequence[float],
    pre_transform: nn.Module | None,
    backend: Backend,
    indices: Pairs = (),
) -> FusedView:
    """Build one view of fused operations, without those of probability 0."""
    from lightning_contrast.augment.fused import (
        FusedBandIndex,
        FusedColorJitter,
        FusedDeform,
        FusedErase,
        FusedGaussianBlur,
        FusedGaussianNoise,
        FusedResizedCrop,
        FusedSolarize,
        FusedTurn,
    )

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
        band_gray=spec.band_gray,
    )
    operations: list[FusedOperation] = []
    if spec.vertical_flip > 0 or spec.quarter_turns:
        operations.append(FusedTurn(spec.vertical_flip, quarter_turns=spec.quarter_turns))
    if spec.rotates:
        operations.append(FusedDeform(spec.rotation, 0.0, points=2, p=spec.rotation_p))
    operations += [*copy.deepcopy(spec.first_operations), color]  # each view sets the backend of its own
    if spec.blur_p > 0 and spec.blur_kernel != 1:
        operations.append(FusedGaussianBlur(spec.blur_p, BLUR_SIGMA, kernel_size=spec.blur_kernel))
    if spec.solarize_p > 0:
        operations.append(FusedSolarize(spec.solarize_p))
    if spec.noise_p > 0:
        operations.append(FusedGaussianNoise(spec.noise_p, spec.noise_std))
    operations += [FusedBandIndex(indices)] if indices else []
    operations += copy.deepcopy(spec.last_operations)
    if spec.erase_p > 0:
        operations.append(FusedErase(spec.erase_p, spec.erase_scale, spec.erase_ratio, fill=mean))
    return FusedView(crop, operations, mean, std, pre_transform=pre_transform, backend=backend)
