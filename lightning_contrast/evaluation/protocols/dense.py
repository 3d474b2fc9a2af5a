"""Dense protocols on frozen features: segmentation by neighbors and by a linear layer, and attention against masks."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_positive, check_same_shape, fail, require
from lightning_contrast.evaluation.attention import strongest
from lightning_contrast.metrics import nearest_neighbours, neighbour_vote
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.seeding import derived_seed

_QUERIES = 1024  # patches per vote
_IMAGES = 16  # images whose pixels have a number per class at once


class Segmentation(NamedTuple):
    """What a segmentation protocol gives.

    Attributes:
        miou: Mean IoU over the classes that occur in the masks or the predictions, in 0..1.
        iou: IoU of each class ``(C,)``, float64; NaN for those that occur in neither.
        confusion: Pixels of each image by true and predicted class, ``(M, C, C)``, int64.
    """

    miou: float
    iou: Tensor
    confusion: Tensor


@torch.no_grad()
def patch_features(model: nn.Module, images: Tensor, *, layer: str | None = None) -> Tensor:
    """Return the features of the patches of images, as a map.

    Of networks with ``forward_features`` (all of timm), its output, of what layers before it give: the patch tokens of
    a vision transformer without class and register tokens, after the last norm, or the last map of a convolutional
    network. Of other networks, the last map larger than 1 x 1 that a submodule returns. The model runs in eval mode;
    the mode of every submodule is restored.

    Args:
        model: A method of this package, whose ``backbone`` is used, or a network.
        images: Input of the model, ``(B, C, H, W)`` float: ``policy.eval_transform(images)``.
        layer: Name of a submodule of the backbone whose output ``(B, F, h, w)`` is taken instead.

    Returns:
        ``(B, F, h, w)``, float32, on the device of the model.

    Raises:
        ValueError: If there is no such layer, or no map.
    """
    backbone = getattr(model, "backbone", model)
    parameter = next(backbone.parameters(), None)
    given = images if parameter is None else images.to(parameter.device, parameter.dtype)
    modules = dict(backbone.named_modules())
    if layer is not None and layer not in modules:
        names = ", ".join([name for name in modules if name][:12])
        fail("layer", f"be a submodule of {type(backbone).__name__}", layer, f"It has {names}")
    owner = next((m for m in backbone.modules() if callable(getattr(m, "forward_features", None))), None)
    with eval_mode(backbone):
        if layer is None and owner is not None:
            own = given if owner is backbone else _input_of(owner, backbone, given)
            found = _as_map(owner, owner.forward_features(own), own)  # type: ignore[operator]  # callable, see above
        else:
            found = _last_output(backbone, given, [modules[layer]] if layer is not None else None)
    hint = "Name the `layer` that returns a map, or wrap the network in a module whose submodule does"
    if found is None or found.ndim != 4:
        got = "none" if found is None else tuple(found.shape)
        fail("model", f"have a map of patches (B, F, h, w) ({type(backbone).__name__} has not)", got, hint)
    return found.float()


class _ReachedError(Exception):
    """Ends a pass at the network whose input is wanted."""


def _input_of(owner: nn.Module, backbone: nn.Module, images: Tensor) -> Tensor:
    """Return what a network inside of a backbone gets in a pass of images; the images if it is not called."""
    seen: list[Tensor] = []

    def reached(*args: Any, **kwargs: Any) -> None:
        seen.extend(args[:1])
        raise _ReachedError

    own = vars(owner)
    before = own.get("forward_features")
    hook = owner.register_forward_pre_hook(lambda module, args: reached(*args))
    own["forward_features"] = reached  # a backbone may call it without `forward`
    try:
        backbone(images)
    except _ReachedError:
        pass
    finally:
        hook.remove()
        del own["forward_features"]
        if before is not None:
            own["forward_features"] = before
    return seen[0] if seen else images


def _as_map(owner: nn.Module, output: Any, images: Tensor) -> Tensor | None:
    """Return the output of timm's ``forward_features`` as a map ``(B, F, h, w)``, or None."""
    if not isinstance(output, Tensor):
        return None
    width = getattr(owner, "num_features", None)
    if output.ndim == 4 and output.shape[1] != width and output.shape[3] == width:
        return output.permute(0, 3, 1, 2)
    if output.ndim != 3:
        return output
    patch = getattr(getattr(owner, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple):
        return None
    height, width = (-(-side // edge) for side, edge in zip(images.shape[-2:], patch, strict=True))
    tokens = output[:, int(getattr(owner, "num_prefix_tokens", 0)) :]
    return tokens.mT.reshape(*tokens.mT.shape[:2], height, width) if tokens.shape[1] == height * width else None


def _last_output(backbone: nn.Module, images: Tensor, modules: list[nn.Module] | None) -> Tensor | None:
    """Return the last map or tokens that one of some submodules returns, of all if None."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3 and output.shape[2:].numel() > 1:
            seen.append(output)

    with ExitStack() as stack:
        for module in backbone.modules() if modules is None else modules:
            stack.callback(module.register_forward_hook(keep, prepend=True).remove)
        backbone(images)
    return seen[-1] if seen else None


def patch_shares(masks: Tensor, num_classes: int, grid: tuple[int, int]) -> Tensor:
    """Return the share of the labeled pixels of each patch that belong to each class.

    Args:
        masks: Classes of pixels ``(B, H, W)``, integers in 0..C - 1; negative ones and 255 are void.
        num_classes: C.
        grid: Rows and columns of patches h, w, at most those of pixels.

    Returns:
        ``(B, C, h, w)``, float32; zeros for patches that are void.

    Raises:
        ValueError: If a class is out of range.
    """
    classes, known = _classes(masks, num_classes)
    found = []
    for own, labeled in zip(torch.split(classes, _IMAGES), torch.split(known, _IMAGES), strict=True):
        hot = F.one_hot(own, num_classes).permute(0, 3, 1, 2).float() * labeled.unsqueeze(1)
        found.append(F.adaptive_avg_pool2d(hot, grid))
    shares = torch.cat(found)
    total = shares.sum(1, keepdim=True)
    return torch.where(total > 0, shares / total.clamp(min=1e-12), 0.0)


def segmentation_knn(
    train: Tensor,
    train_masks: Tensor,
    test: Tensor,
    test_masks: Tensor,
    *,
    num_classes: int,
    k: int = 30,
    temperature: float = 0.02,
    memory: int | None = None,
    seed: int = 0,
) -> Segmentation:
    """Segment images by the vote of the nearest training patches, each with the shares of the classes in it.

    Source: Hummingbird (https://arxiv.org/abs/2306.01667): nothing is trained; votes are upsampled bilinearly to the
    pixels. Differs: void pixels are left out of the memory, where the open program counts them as class 0, and a
    bounded memory is drawn evenly and not by the frequency of classes.

    Args:
        train: Features of training patches ``(N, F, h, w)``; L2-normalized here.
        train_masks: Their classes by pixel ``(N, H, W)``, integers; negative ones and 255 are void.
        test: Features of test patches ``(M, F, h, w)``.
        test_masks: Their classes ``(M, H, W)``.
        num_classes: C, with the background.
        k: Neighbors, >= 1.
        temperature: Divisor of the cosines, > 0.
        memory: Patches that are kept, >= k; None keeps all.
        seed: Seed of their draw, >= 0.

    Raises:
        ValueError: If shapes do not match, or a number is out of range.
    """
    _check(train, train_masks, test, test_masks)
    check_at_least("k", k, 1)
    check_positive("temperature", temperature)
    grid = (train.shape[2], train.shape[3])
    shares = patch_shares(train_masks, num_classes, grid).permute(0, 2, 3, 1).flatten(0, 2)
    bank = train.permute(0, 2, 3, 1).flatten(0, 2).float()
    known = shares.sum(1) > 0
    bank, shares = bank[known], shares[known]
    if memory is not None and memory < len(bank):
        generator = torch.Generator().manual_seed(derived_seed(seed, 3))
        rows = torch.randperm(len(bank), generator=generator)[:memory].sort().values
        bank, shares = bank[rows], shares[rows]
    require(len(bank) >= k, "k", f"be <= {len(bank)}, the labeled patches of the memory", k, "Decrease `k`")

    def vote(maps: Tensor) -> Tensor:
        """Return the scores of patches of maps (B, F, h, w)."""
        queries = maps.permute(0, 2, 3, 1).flatten(0, 2).float()
        votes = []
        for part in torch.split(queries, _QUERIES):
            _, rows = nearest_neighbours(part, bank, k)
            votes.append(neighbour_vote(part, bank[rows], shares[rows], temperature=temperature))
        return torch.cat(votes).view(len(maps), *maps.shape[2:], num_classes).permute(0, 3, 1, 2)

    return _scored(vote, test, test_masks, num_classes)


def segmentation_linear(
    train: Tensor,
    train_masks: Tensor,
    test: Tensor,
    test_masks: Tensor,
    *,
    num_classes: int,
    steps: int = 40_000,
    batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> Segmentation:
    """Segment images by a BatchNorm and a 1 x 1 convolution on frozen patch features.

    Source: the linear head of DINOv2 (https://arxiv.org/abs/2304.07193, section 7.4): AdamW, cross-entropy on logits
    that are upsampled bilinearly to the pixels. Differs: features are computed once, without random scales and crops,
    and the rate falls as a cosine.

    Args:
        train: Features of training patches ``(N, F, h, w)``.
        train_masks: Their classes by pixel ``(N, H, W)``, integers; negative ones and 255 are void.
        test: Features of test patches ``(M, F, h, w)``.
        test_masks: Their classes ``(M, H, W)``.
        num_classes: C, with the background.
        steps: Steps of the optimizer, >= 1.
        batch_size: Images per step, >= 1.
        lr: Learning rate at the start, > 0.
        weight_decay: Of AdamW.
        seed: Seed of weights and order, >= 0.

    Raises:
        ValueError: If shapes do not match, a number is out of range, or all training pixels are void.
    """
    _check(train, train_masks, test, test_masks)
    check_at_least("steps", steps, 1)
    check_at_least("batch_size", batch_size, 1)
    check_positive("lr", lr)
    classes, known = _classes(train_masks, num_classes)
    require(bool(known.any()), "train_masks", "have labeled pixels", "none", "Negative classes and 255 are void")
    targets = classes.masked_fill(~known, -1)
    generator = torch.Generator().manual_seed(derived_seed(seed, 4))
    weight = 0.01 * torch.randn(num_classes, train.shape[1], 1, 1, generator=generator)
    weight = weight.to(train.device).requires_grad_()
    bias = torch.zeros(num_classes, device=train.device, requires_grad=True)
    norm = nn.BatchNorm2d(train.shape[1]).to(train.device)
    parameters = [weight, bias, *norm.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = min(batch_size, len(train))
    order = torch.randperm(0)
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < size:
                order = torch.randperm(len(train), generator=generator)
            rows, order = order[:size].to(train.device), order[size:]
            logits = F.conv2d(norm(train[rows].float()), weight, bias)
            logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)
            picked = targets[rows]
            loss = F.cross_entropy(logits, picked, ignore_index=-1, reduction="sum") / (picked >= 0).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    norm.eval()
    with torch.no_grad():
        head: Callable[[Tensor], Tensor] = lambda maps: F.conv2d(norm(maps.float()), weight, bias)  # noqa: E731
        return _scored(head, test, test_masks, num_classes)


def segmentation_scores(prediction: Tensor, masks: Tensor, *, num_classes: int) -> Segmentation:
    """Compare predicted classes of pixels with the true ones.

    Args:
        prediction: Predicted classes ``(M, H, W)``, integers in 0..C - 1.
        masks: True classes ``(M, H, W)``; negative ones and 255 are void and not counted.
        num_classes: C, with the background.

    Raises:
        ValueError: If shapes do not match, or a class is out of range.

    Example:
        >>> segmentation_scores(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]]), num_classes=2).iou
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    check_same_shape("prediction", prediction, "masks", masks, 3)
    classes, known = _classes(masks, num_classes)
    predicted = prediction.long()
    ends = (int(predicted.min()), int(predicted.max())) if predicted.numel() else (0, 0)
    require(0 <= ends[0] <= ends[1] < num_classes, "prediction", f"lie in 0..{num_classes - 1}", ends, "Give classes")
    pairs = classes * num_classes + predicted
    images = torch.arange(len(masks), device=masks.device).view(-1, 1, 1) * num_classes**2
    counts = torch.bincount((images + pairs)[known], minlength=len(masks) * num_classes**2)
    confusion = counts.view(len(masks), num_classes, num_classes).cpu()
    iou = class_iou(confusion.sum(0))
    return Segmentation(float(iou.nanmean()), iou, confusion)


def class_iou(confusion: Tensor) -> Tensor:
    """Return the IoU of each class from pixels by true and predicted class.

    Args:
        confusion: Counts ``(..., C, C)``.

    Returns:
        ``(..., C)``, float64; NaN for classes that are neither in the masks nor in the predictions.
    """
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)


def attention_scores(maps: Tensor, masks: Tensor, *, mass: float = 0.6) -> dict[str, Tensor]:
    """Compare attention maps with the foreground of images.

    Jaccard as in DINO (https://arxiv.org/abs/2104.14294, section 4.2.2): for each head the smallest set of patches with
    60 % of the attention, at the size of the image, against the foreground; of each image the best head counts, which
    is chosen with the mask. The pointing game (https://arxiv.org/abs/1608.00507) asks whether the middle of the patch
    with the most attention, of the mean of the heads, lies on the foreground, without a tolerance.

    Args:
        maps: Attention of `attention_maps`, ``(B, heads, h, w)``, not negative.
        masks: Foreground ``(B, H, W)``, bool.
        mass: Share of the attention, in [0, 1].

    Returns:
        ``"jaccard"``, that of the best head of each image ``(B,)``, float64; ``"jaccard_of_heads"`` ``(B, heads)``;
        ``"pointing"`` ``(B,)``, bool; and ``"foreground"``, its share of each image ``(B,)``, which is the pointing
        game by chance.

    Raises:
        ValueError: If shapes do not match.
    """
    fits = maps.ndim == 4 and masks.ndim == 3 and len(maps) == len(masks)
    got = (tuple(maps.shape), tuple(masks.shape))
    require(fits, "masks", "be (B, H, W) where `maps` are (B, heads, h, w)", got, "Give one mask per image")
    truth = masks.to(maps.device, torch.bool)
    chosen = F.interpolate(strongest(maps, mass).float(), size=truth.shape[1:], mode="nearest") > 0.5
    both = (chosen & truth.unsqueeze(1)).sum((2, 3)).double()
    either = (chosen | truth.unsqueeze(1)).sum((2, 3)).double()
    jaccard = both / either.clamp(min=1)
    best = maps.mean(1).flatten(1).argmax(1)
    rows, columns = best // maps.shape[3], best % maps.shape[3]
    tops = ((2 * rows + 1) * truth.shape[1]) // (2 * maps.shape[2])
    lefts = ((2 * columns + 1) * truth.shape[2]) // (2 * maps.shape[3])
    pointing = truth[torch.arange(len(truth), device=truth.device), tops, lefts]
    share = truth.double().mean((1, 2))
    return {"jaccard": jaccard.amax(1), "jaccard_of_heads": jaccard, "pointing": pointing, "foreground": share}


def _scored(logits: Callable[[Tensor], Tensor], maps: Tensor, masks: Tensor, num_classes: int) -> Segmentation:
    """Upsample the logits of maps to the pixels of the masks, and compare."""
    found = []
    for rows in torch.split(torch.arange(len(maps)), _IMAGES):
        large = F.interpolate(logits(maps[rows]), size=masks.shape[1:], mode="bilinear", align_corners=False)
        found.append(large.argmax(1).to(masks.device))
    return segmentation_scores(torch.cat(found), masks, num_classes=num_classes)


def _classes(masks: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return classes ``(B, H, W)``, 0 where void, and which pixels are labeled."""
    check_at_least("num_classes", num_classes, 2)
    whole = masks.ndim == 3 and not masks.is_floating_point() and masks.dtype != torch.bool
    require(whole, "masks", "be integers (B, H, W)", f"{tuple(masks.shape)} {masks.dtype}", "Give classes of pixels")
    classes = masks.long()
    known = (classes >= 0) & (classes != 255)
    classes = classes.masked_fill(~known, 0)
    high = int(classes.max()) if classes.numel() else 0
    require(high < num_classes, "masks", f"hold classes below {num_classes}", high, "Void is 255 or negative")
    return classes, known


def _check(train: Tensor, train_masks: Tensor, test: Tensor, test_masks: Tensor) -> None:
    for name, maps, masks in (("train", train, train_masks), ("test", test, test_masks)):
        fits = maps.ndim == 4 and maps.is_floating_point() and masks.ndim == 3 and len(maps) == len(masks) > 0
        got = (tuple(maps.shape), tuple(masks.shape))
        require(fits, name, "be maps (N, F, h, w) with masks (N, H, W)", got, "Use `patch_features`")
    same = (train.shape[1], test.shape[1])
    require(same[0] == same[1], "test", "be as wide as `train`", same, "Use features of the same layer")
