"""Random resized crop and horizontal flip in one resampling."""

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from kornia.augmentation import GeometricAugmentationBase2D
from kornia.constants import Resample
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_choice, check_probability, check_range, require
from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    towards,
    uniform,
    uses_accelerator_backend,
)
from lightning_contrast.augment.fused.resample import Interpolation, apply_weights, resize_weights
from lightning_contrast.augment.images import Size, check_size

_TRIES = 10
_SMALL = 64  # largest edge in pixels at which two matrix products are faster than a loop over images on a CPU


class FusedResizedCrop(FusedOperation, GeometricAugmentationBase2D):
    """Crop a random box, resize it and flip it with probability ``flip``, in one resampling.

    The box is drawn as in torchvision's ``RandomResizedCrop``: up to ten pairs of area and aspect ratio, of which the
    first that fits is used, else the largest centered box of an allowed aspect ratio. With ``fit="clamp"`` one pair is
    drawn and its sides are clipped to the image, as in BYOL's reference implementation.

    On a CPU large images are resized one by one with ``interpolate`` (uint8 input is resampled as uint8 and rounded to
    8 bits, as in Pillow); small images, and all images on an accelerator, with two matrix products. Overshoots of the
    bicubic kernel are clipped to 0..1.

    Args:
        size: Edge of the square result in pixels, or its height and width; >= 1, may exceed those of the images.
        scale: Range of the box's share of the image area, in (0, 1].
        ratio: Range of width / height; drawn log-uniformly.
        flip: Probability of a horizontal flip.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        antialias: Apply an antialiasing filter when downscaling.
        fit: Treatment of boxes that do not fit: ``"retry"`` or ``"clamp"``.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: input ``(B, C, H, W)``; result ``(B, C, h, w)``, float.
    """

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        *,
        flip: float = 0.5,
        interpolation: Interpolation = "bilinear",
        antialias: bool = True,
        fit: Literal["retry", "clamp"] = "retry",
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        shape = check_size(size)
        check_range("scale", scale, 0.0, 1.0)
        require(scale[0] > 0, "scale", "start above 0", scale, "Give the smallest share of the area, such as 0.08")
        check_range("ratio", ratio, 0.0, math.inf)
        require(ratio[0] > 0, "ratio", "start above 0", ratio, "Give width / height, such as (3/4, 4/3)")
        check_probability("flip", flip)
        check_choice("interpolation", interpolation, ("nearest", "bilinear", "bicubic"))
        check_choice("fit", fit, ("retry", "clamp"))
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.size, self.shape = size, shape
        self.scale, self.ratio, self.flip = tuple(scale), tuple(ratio), flip
        self.interpolation, self.antialias, self.fit, self.backend = interpolation, antialias, fit, backend
        self.flags = {"size": shape, "resample": Resample.get(interpolation), "antialias": antialias}

    def draw(self, batch: int, height: int, width: int, *, sizes: NDArray[np.int64] | None = None) -> Draw:
        """Draw ``box`` ``(B, 4)``, which holds top, left, height and width in pixels, and ``flip`` ``(B,)``.

        Args:
            batch: Number of images.
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            sizes: Height and width of each image before it was stretched to ``height x width``, ``(B, 2)``. The box is
                drawn in that image; its edges are then rounded to pixels of the stretched one.
        """
        wanted = np.broadcast_to(np.array([height, width]), (batch, 2)) if sizes is None else sizes
        box, flip = self._draw_boxes(wanted[:, :1], wanted[:, 1:])
        if sizes is not None:
            shape = np.array([height, width])
            start, length = box[:, :2] * (shape / sizes), box[:, 2:] * (shape / sizes)
            first = np.minimum(np.rint(start), shape - 1)
            box = np.concatenate([first, np.maximum(np.rint(start + length) - first, 1)], axis=1)
        return {"box": box.astype(np.float32), "flip": flip}

    def _draw_boxes(
        self, height: NDArray[np.int64], width: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Draw a box ``(B, 4)`` and a flip ``(B,)`` for images of heights ``(B, 1)`` and widths ``(B, 1)``."""
        batch = len(height)
        tries = _TRIES if self.fit == "retry" else 1
        numbers = uniform(batch, 2 * tries + 3).astype(np.float64)
        least, most = (towards(share, 1.0, self.share) for share in self.scale)
        area = height * width * (least + (most - least) * numbers[:, :tries])
        low, high = (towards(math.log(ratio), 0.0, self.share) for ratio in self.ratio)
        aspect = np.exp(low + (high - low) * numbers[:, tries : 2 * tries])
        box_h, box_w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        allowed = (box_h >= 1) & (box_h <= height) & (box_w >= 1) & (box_w <= width)
        fallback_h, fallback_w = self._largest(height[:, 0], width[:, 0])
        height, width = height[:, 0], width[:, 0]
        if self.fit == "clamp":
            h, w = np.clip(box_h[:, 0], 1, height), np.clip(box_w[:, 0], 1, width)
            fits = np.ones(batch, dtype=bool)
        else:
            first = allowed.argmax(1)
            chosen = np.arange(batch)
            fits = allowed[chosen, first]
            h = np.where(fits, box_h[chosen, first], fallback_h)
            w = np.where(fits, box_w[chosen, first], fallback_w)
        # a number just below 1 times (room + 1) may round up to room + 1
        top = np.minimum(np.floor(numbers[:, -3] * (height - h + 1)), height - h)
        left = np.minimum(np.floor(numbers[:, -2] * (width - w + 1)), width - w)
        top = np.where(fits, top, (height - h) // 2)
        left = np.where(fits, left, (width - w) // 2)
        return np.stack([top, left, h, w], axis=1), numbers[:, -1] < self.flip

    def _largest(
        self, height: NDArray[np.int64], width: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return heights and widths ``(B,)`` of the largest boxes of an allowed aspect ratio."""
        narrow, wide = width / height < self.ratio[0], width / height > self.ratio[1]
        shorter_h = np.clip(np.rint(width / self.ratio[0]), 1, height)
        shorter_w = np.clip(np.rint(height * self.ratio[1]), 1, width)
        return np.where(narrow, shorter_h, height), np.where(wide, shorter_w, width)

    def prepare(self, draw: Draw) -> Plan:
        """Return the draw and a copy of it as Python values, by which the CPU backend slices."""
        boxes = draw["box"].astype(np.int64)
        longest = tuple(boxes[:, 2:].max(axis=0).tolist())
        return {**draw, "boxes": boxes.tolist(), "flips": draw["flip"].tolist(), "longest": longest}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Resample uint8 or float images ``(B, C, H, W)`` to ``(B, C, h, w)``, float."""
        return self.resample(images, plan, self.interpolation, self.antialias)

    def resample(self, images: Tensor, plan: Plan, interpolation: Interpolation, antialias: bool) -> Tensor:
        """Return the boxes of ``images`` ``(B, C, H, W)``, resized to ``(B, C, h, w)``, float in 0..1."""
        small = max(*images.shape[-2:], *self.shape) <= _SMALL
        if small or interpolation == "nearest" or uses_accelerator_backend(self.backend, images):
            return self._by_products(images, plan, interpolation, antialias)
        return self._one_by_one(images, plan, interpolation, antialias)

    def _by_products(self, images: Tensor, plan: Plan, interpolation: Interpolation, antialias: bool) -> Tensor:
        dtype = images.dtype if images.is_floating_point() else torch.float32
        batch, _, rows, columns = images.shape
        start, length = plan["box"].to(dtype).view(batch, 2, 2).permute(1, 2, 0).flatten(1)  # of rows, then of columns
        flip = torch.cat([torch.zeros_like(plan["flip"]), plan["flip"]])

        def weights_of(axes: slice, edge: int) -> Tensor:
            return resize_weights(
                start[axes],
                length[axes],
                max(rows, columns),
                edge,
                interpolation=interpolation,
                antialias=antialias,
                flip=flip[axes],
                longest=max(plan["longest"]),
                tabulated=dtype == torch.float32 and not uses_accelerator_backend(self.backend, images),
            )

        height, width = self.shape
        both = weights_of(slice(None), height) if height == width else None
        down = weights_of(slice(batch), height) if both is None else both[:batch]
        across = weights_of(slice(batch, None), width) if both is None else both[batch:]
        down, across = down[..., :rows], across[..., :columns]  # weights outside of the crop are 0
        if not images.is_floating_point():
            across = across.div_(255)
        views = apply_weights(images.to(dtype), down, across)
        return views.clamp_(0, 1) if interpolation == "bicubic" else views

    def _one_by_one(self, images: Tensor, plan: Plan, interpolation: Interpolation, antialias: bool) -> Tensor:
        dtype = images.dtype if images.is_floating_point() else torch.float32
        views = torch.empty((*images.shape[:2], *self.shape), dtype=dtype, device=images.device)
        for i, ((top, left, height, width), flip) in enumerate(zip(plan["boxes"], plan["flips"], strict=True)):
            crop = images[i : i + 1, :, top : top + height, left : left + width]
            view = F.interpolate(crop, self.shape, mode=interpolation, antialias=antialias)[0]
            views[i] = view.flip(-1) if flip else view
        if not images.is_floating_point():
            return views.mul_(1 / 255)
        return views.clamp_(0, 1) if interpolation == "bicubic" else views

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Resample ``input`` ``(B, C, H, W)`` (a hook of Kornia, which passes masks with nearest resampling)."""
        plan = self.prepare({"box": params["box"].numpy(), "flip": params["flip"].numpy()})
        plan = {**plan, "box": params["box"].to(input.device), "flip": params["flip"].to(input.device)}
        return self.resample(input, plan, flags["resample"].name.lower(), flags["antialias"])

    def compute_transformation(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]) -> Tensor:
        """Return the matrices ``(B, 3, 3)`` from image to view coordinates in pixels (a hook of Kornia)."""
        top, left, height, width = params["box"].to(input).unbind(1)
        scale_x, scale_y = self.shape[1] / width, self.shape[0] / height
        mirrored = params["flip"].to(input.device)
        shift_x = (0.5 - left) * scale_x - 0.5
        matrix = torch.zeros(len(top), 3, 3, dtype=input.dtype, device=input.device)
        matrix[:, 0, 0] = torch.where(mirrored, -scale_x, scale_x)
        matrix[:, 0, 2] = torch.where(mirrored, self.shape[1] - 1 - shift_x, shift_x)
        matrix[:, 1, 1], matrix[:, 1, 2], matrix[:, 2, 2] = scale_y, (0.5 - top) * scale_y - 0.5, 1
        return matrix
