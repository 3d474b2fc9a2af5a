"""Losses of masked prediction: pixels (MAE, SimMIM) and features of a teacher (data2vec, I-JEPA, V-JEPA)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import (
    check_at_least,
    check_batch,
    check_choice,
    check_not_negative,
    check_positive,
    fail,
    require,
)
from lightning_contrast.distributed import global_mean, is_distributed
from lightning_contrast.losses.checks import check_floating
from lightning_contrast.precision import full_precision, upcast


def patchify(images: Tensor, *, patch_size: int) -> Tensor:
    """Cut images into patches, row by row.

    The order of a patch's values is that of MAE's reference implementation: row in the patch, column, channel.

    Args:
        images: Images ``(B, C, H, W)``.
        patch_size: Edge p of a patch in pixels; divides H and W.

    Returns:
        Patches ``(B, H / p * W / p, p * p * C)``.

    Raises:
        ValueError: If the images have another number of dimensions or edges that are no multiples of the patch.

    Example:
        >>> patchify(torch.zeros(2, 3, 8, 12), patch_size=4).shape
        torch.Size([2, 6, 48])
    """
    check_at_least("patch_size", patch_size, 1)
    fits = images.ndim == 4 and images.shape[2] % patch_size == 0 and images.shape[3] % patch_size == 0
    rule = f"have shape (B, C, H, W) with edges that are multiples of {patch_size}"
    require(fits, "images", rule, tuple(images.shape), "Change the size of the images or the patch")
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], *, patch_size: int) -> Tensor:
    """Put patches together to images; the inverse of `patchify`.

    Args:
        patches: Patches ``(B, N, p * p * C)``, row by row.
        grid: Rows and columns of patches, whose product is N.
        patch_size: Edge p of a patch in pixels.

    Returns:
        Images ``(B, C, rows * p, columns * p)``.

    Raises:
        ValueError: If the patches do not fill the grid or do not hold whole channels.
    """
    fits = patches.ndim == 3 and patches.shape[1] == grid[0] * grid[1] and patches.shape[2] % patch_size**2 == 0
    rule = f"have shape (B, {grid[0] * grid[1]}, {patch_size**2} C)"
    require(fits, "patches", rule, tuple(patches.shape), "Give all patches of the grid")
    images = patches.reshape(len(patches), *grid, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(len(patches), -1, grid[0] * patch_size, grid[1] * patch_size)


def pixel_targets(images: Tensor, *, patch_size: int, normalize_pixels: bool) -> Tensor:
    """Return what MAE predicts: the pixels of each patch.

    Args:
        images: Images ``(B, C, H, W)``.
        patch_size: Edge p of a patch in pixels.
        normalize_pixels: Subtract each patch's mean and divide by the square root of its unbiased variance + 1e-6.

    Returns:
        Targets ``(B, N, p * p * C)``, without gradient.
    """
    target = patchify(images.detach(), patch_size=patch_size)
    if normalize_pixels:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return target


@full_precision
def masked_pixel_loss(
    images: Tensor, prediction: Tensor, mask: Tensor, *, patch_size: int, normalize_pixels: bool
) -> Tensor:
    """Compute MAE's mean squared error of the predicted pixels of the masked patches.

    Implements MAE (https://arxiv.org/abs/2111.06377) as the reference implementation does. The images receive no
    gradient.

    Args:
        images: Images ``(B, C, H, W)``.
        prediction: Predicted patches ``(B, N, p * p * C)``, in the order of `patchify`.
        mask: ``(B, N)``, True or 1 where a patch is masked.
        patch_size: Edge p of a patch in pixels.
        normalize_pixels: Normalize each patch of the images: see `pixel_targets`.

    Returns:
        The mean over the masked patches of all ranks and their pixels, a scalar >= 0.

    Raises:
        ValueError: If the shapes do not fit, or no patch is masked.
        TypeError: If the images or the prediction are not floating point.
    """
    check_floating("images", images)
    check_floating("prediction", prediction)
    target = pixel_targets(images, patch_size=patch_size, normalize_pixels=normalize_pixels)
    if prediction.shape != target.shape:
        rule = f"have shape {tuple(target.shape)}, as `patchify` makes of the images"
        fail("prediction", rule, tuple(prediction.shape), "Predict all values of all patches")
    return _mean_of_masked((prediction - target).square().mean(-1), mask)


@full_precision
def masked_l1_loss(images: Tensor, reconstruction: Tensor, mask: Tensor, *, patch_size: int) -> Tensor:
    """Compute SimMIM's mean absolute error of the pixels of the masked patches.

    Implements SimMIM (https://arxiv.org/abs/2111.09886). Differs from the reference implementation, which adds 1e-5 to
    the number of masked pixels. The images receive no gradient.

    Args:
        images: Images ``(B, C, H, W)``.
        reconstruction: Predicted images ``(B, C, H, W)``.
        mask: ``(B, H / p, W / p)``, True or 1 where a patch is masked.
        patch_size: Edge p of a patch in pixels.

    Returns:
        The mean over the masked pixels of all ranks and their channels, a scalar >= 0.

    Raises:
        ValueError: If the shapes do not fit, or no patch is masked.
        TypeError: If the images or the reconstruction are not floating point.
    """
    check_floating("images", images)
    check_floating("reconstruction", reconstruction)
    if reconstruction.shape != images.shape:
        rule = f"have the shape {tuple(images.shape)} of the images"
        fail("reconstruction", rule, tuple(reconstruction.shape), "Predict all pixels")
    error = patchify((reconstruction - images.detach()).abs(), patch_size=patch_size).mean(-1)  # (B, N)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    if mask.ndim != 3 or tuple(mask.shape[1:]) != grid:
        rule = f"have shape ({len(images)}, {grid[0]}, {grid[1]})"
        fail("mask", rule, tuple(mask.shape), "Give one value for each patch")
    return _mean_of_masked(error, mask.flatten(1))


def _mean_of_masked(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the masked entries of an error ``(B, N)`` over all ranks."""
    if mask.shape != error.shape:
        fail("mask", f"have shape {tuple(error.shape)}", tuple(mask.shape), "Give one value for each patch")
    if mask.device.type == "cpu" and not is_distributed() and not bool((mask > 0).any()):  # no read of a device
        fail("mask", "mask at least one patch", "a mask of zeros", "Give True or 1 where a patch is masked")
    return global_mean(error.flatten(), mask.flatten().to(error.dtype))


@full_precision
def average_layers(
    layers: Tensor | Sequence[Tensor],
    *,
    top_k: int | None = None,
    instance_norm_layers: bool = False,
    layer_norm_layers: bool = True,
    layer_norm_targets: bool = True,
) -> Tensor:
    """Average the outputs of a teacher's last layers: the targets of data2vec.

    Implements data2vec (https://arxiv.org/abs/2202.03555) for images with the defaults, and data2vec 2.0
    (https://arxiv.org/abs/2212.07525) with ``instance_norm_layers=True, layer_norm_layers=False``. All normalizations
    are without affine parameters.

    Args:
        layers: Outputs of L layers in the order of depth, ``(L, B, N, D)`` or a list of ``(B, N, D)``.
        top_k: Number of last layers to average, 1 .. L; None is all.
        instance_norm_layers: Normalize each layer's channels over the patches.
        layer_norm_layers: Normalize each layer's patches over the channels.
        layer_norm_targets: Normalize the average's patches over the channels.

    Returns:
        Targets ``(B, N, D)``, without gradient.

    Raises:
        ValueError: If there are fewer layers than ``top_k``, or their shapes differ.
    """
    require(len(layers) > 0, "layers", "hold at least one", len(layers), "Give the outputs of the teacher's blocks")
    shapes = [tuple(layer.shape) for layer in layers]
    same = len(shapes[0]) == 3 and len(set(shapes)) == 1
    require(same, "layers", "have one shape (B, N, D)", shapes, "Leave out class and register tokens in all of them")
    count = len(layers) if top_k is None else top_k
    check_at_least("top_k", count, 1)
    require(count <= len(layers), "top_k", f"be at most the {len(layers)} layers", count, "Average fewer layers")
    total = torch.zeros((), dtype=torch.float32, device=layers[0].device)
    for layer in list(layers)[-count:]:
        values = upcast(layer.detach())
        if instance_norm_layers:
            values = F.instance_norm(values.transpose(1, 2)).transpose(1, 2)
        if layer_norm_layers:
            values = F.layer_norm(values, values.shape[-1:])
        total = total + values
    average = total / count
    return F.layer_norm(average, average.shape[-1:]) if layer_norm_targets else average


@full_precision
def data2vec_loss(prediction: Tensor, target: Tensor, *, beta: float, reduction: str = "mean") -> Tensor:
    """Compute the smooth L1 distance of predicted and target features of masked patches.

    Implements data2vec (https://arxiv.org/abs/2202.03555) as its vision program does, and with
    ``beta=0, reduction="scaled_sum"`` data2vec 2.0 (https://arxiv.org/abs/2212.07525). The target receives no gradient.

    Args:
        prediction: Predicted features of the masked patches, ``(M, D)``.
        target: Targets of the same patches, ``(M, D)``, from `average_layers`.
        beta: Where the squared error ``0.5 e^2 / beta`` becomes linear, >= 0; 0 for the squared error ``e^2``.
        reduction: Over the D channels: "mean", or "scaled_sum" for the sum divided by the square root of D.

    Returns:
        The mean over the masked patches of all ranks, a scalar >= 0.

    Raises:
        ValueError: If the shapes differ, there is no row, or an argument is out of its range.
        TypeError: If the inputs are not floating point.
    """
    check_not_negative("beta", beta)
    check_choice("reduction", reduction, ("mean", "scaled_sum"))
    check_floating("prediction", prediction)
    check_floating("target", target)
    if prediction.ndim != 2 or prediction.shape != target.shape:
        shapes = tuple(prediction.shape), tuple(target.shape)
        fail("prediction", "have the target's shape (M, D)", shapes, "Pass the features of the same masked patches")
    if not is_distributed():
        require(len(prediction) > 0, "prediction", "have at least one row", len(prediction), "Mask at least one patch")
    target = target.detach()
    if beta > 0:
        error = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")
    else:
        error = (prediction - target).square()
    return global_mean(error.mean(1) if reduction == "mean" else error.sum(1) / error.shape[1] ** 0.5)


def gather_targets(tokens: Tensor, index: Tensor) -> Tensor:
    """Return layer-normalized tokens at an index.

    Args:
        tokens: Output of the target encoder, ``(B, N, D)``.
        index: Patches of each image, ``(B, M)`` int64.

    Returns:
        The normalized tokens ``(B, M, D)``, without gradient.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if tokens.ndim != 3 or index.ndim != 2 or len(index) != len(tokens):
        shapes = tuple(tokens.shape), tuple(index.shape)
        fail("index", "be (B, M) for tokens (B, N, D)", shapes, "Give the patches of each image")
    tokens = F.layer_norm(tokens.detach(), tokens.shape[-1:])
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@full_precision
def jepa_loss(prediction: Tensor, target_tokens: Tensor, target_index: Tensor, *, kind: str = "smooth_l1") -> Tensor:
    """Compute I-JEPA's distance of the predictions of several blocks to the target encoder's tokens.

    `ijepa_loss` of targets that are gathered here, in the order of the reference implementation
    (https://github.com/facebookresearch/ijepa): block by block.

    Args:
        prediction: Predictions of V blocks, ``(V * B, M, D)``, all images of the first block first.
        target_tokens: Output of the target encoder, ``(B, N, D)``; layer-normalized here, without gradient.
        target_index: Patches of each block, ``(V, B, M)`` int64.
        kind: "smooth_l1" with beta 1 as in the reference implementation, or "l2" for the squared error.

    Returns:
        The mean over blocks, images of all ranks, patches and channels, a scalar >= 0.

    Raises:
        ValueError: If the shapes do not fit or the kind is unknown.
        TypeError: If the inputs are not floating point.
    """
    check_choice("kind", kind, ("smooth_l1", "l2"))
    check_floating("prediction", prediction)
    check_floating("target_tokens", target_tokens)
    if target_index.ndim != 3:
        fail("target_index", "have shape (V, B, M)", tuple(target_index.shape), "Give the patches of V blocks")
    target = torch.cat([gather_targets(target_tokens, index) for index in target_index])  # (V B, M, D)
    if prediction.shape != target.shape:
        fail("prediction", f"have shape {tuple(target.shape)}", tuple(prediction.shape), "Predict all blocks in order")
    if kind == "smooth_l1":
        error = F.smooth_l1_loss(prediction, target, reduction="none")
    else:
        error = (prediction - target).square()
    return global_mean(error.flatten(1).mean(1))


@full_precision
def vjepa_loss(
    predictions: Sequence[Tensor], target_tokens: Tensor, indices: Sequence[Tensor], *, exponent: float = 1.0
) -> Tensor:
    """Compute V-JEPA's distance of predictions to the target encoder's tokens, averaged over kinds of masks.

    Implements V-JEPA (https://arxiv.org/abs/2404.08471): ``mean |z - h|^p / p`` of layer-normalized tokens h.

    Args:
        predictions: For each kind of mask, predictions ``(B, K, D)``; K may differ between kinds.
        target_tokens: Output of the target encoder, ``(B, N, D)``; layer-normalized here, without gradient.
        indices: For each kind, the predicted tokens, ``(B, K)`` int64.
        exponent: p, > 0; 1 in the paper.

    Returns:
        The mean over kinds; of each, over images of all ranks, tokens and channels; a scalar >= 0.

    Raises:
        ValueError: If the shapes do not fit, there is no kind, or the exponent is not above 0.
        TypeError: If the inputs are not floating point.
    """
    check_positive("exponent", exponent, "The paper has 1")
    check_floating("target_tokens", target_tokens)
    same = len(predictions) == len(indices) > 0
    hint = "Give predictions and indices of each kind of mask"
    require(same, "predictions", "be as many as `indices`, and at least one", (len(predictions), len(indices)), hint)
    parts = []
    for prediction, index in zip(predictions, indices, strict=True):
        check_floating("predictions", prediction)
        target = gather_targets(target_tokens, index)
        if prediction.shape != target.shape:
            fail("predictions", f"have shape {tuple(target.shape)}", tuple(prediction.shape), "Predict these tokens")
        if not is_distributed():
            check_batch("predictions", len(prediction), 1)
        parts.append(global_mean((prediction - target).abs().pow(exponent).flatten(1).mean(1) / exponent))
    return torch.stack(parts).mean()
