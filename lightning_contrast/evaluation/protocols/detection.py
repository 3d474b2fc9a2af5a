"""Detection on frozen features: torchvision's Faster R-CNN whose backbone is not trained, and average precision."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_interval, check_positive, fail, require
from lightning_contrast.evaluation.protocols.dense import patch_features
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.seeding import derived_seed, isolated

Boxes = Sequence[Tensor]
"""Boxes of each image, ``(K, 4)``: left, top, right, bottom in pixels."""


class _FrozenMap(nn.Module):
    """Backbone of Faster R-CNN: the map of a frozen network, without gradients.

    Args:
        network: The network; it is no submodule, so that it is neither trained nor put into training mode.
        width: Channels of its map.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.out_channels = width
        self._network = (network,)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map ``(B, F, h, w)`` of images ``(B, C, H, W)``."""
        return patch_features(self._network[0], images)


def frozen_detector(
    model: nn.Module, images: Tensor, *, num_classes: int = 1, anchors: Sequence[int] = (16, 32, 64)
) -> nn.Module:
    """Return torchvision's Faster R-CNN on the map of a frozen network, to be trained on inputs of that network.

    Source: https://arxiv.org/abs/1506.01497, with one map, anchors of three shapes and RoIAlign of 7 x 7. Differs from
    the transfer protocols of MoCo and others: only the region proposals and the box head are trained.

    Args:
        model: The network, see `patch_features`.
        images: Inputs of it as in training, ``(B, C, H, W)``, all of one size.
        num_classes: Kinds of things, without the background, >= 1.
        anchors: Edges of the anchors in pixels.

    Returns:
        A module as `torchvision.models.detection.FasterRCNN`.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    check_at_least("num_classes", num_classes, 1)
    width, sides = patch_features(model, images[:1]).shape[1], images.shape[-2:]
    channels = images.shape[1]
    return FasterRCNN(  # type: ignore[no-any-return]  # torchvision is not typed
        _FrozenMap(model, width),
        num_classes=num_classes + 1,
        rpn_anchor_generator=AnchorGenerator((tuple(anchors),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        min_size=min(sides),
        max_size=max(sides),
        image_mean=[0.0] * channels,  # the inputs are normalized
        image_std=[1.0] * channels,
        size_divisible=1,
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
        box_detections_per_img=20,
    )


def detection_frozen(
    model: nn.Module,
    train: Tensor,
    train_boxes: Boxes,
    test: Tensor,
    test_boxes: Boxes,
    *,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train Faster R-CNN on frozen features to find things of any kind, and return its average precision.

    Args:
        model: The network, see `patch_features`.
        train: Inputs of it, ``(N, C, H, W)`` float.
        train_boxes: N tensors of boxes ``(K, 4)``, in pixels of the inputs; at least one per image.
        test: Inputs ``(M, C, H, W)``.
        test_boxes: M tensors of boxes.
        steps: Steps of AdamW, >= 1; the rate falls as a cosine.
        batch_size: Images per step, >= 1.
        lr: Learning rate at the start, > 0.
        seed: Seed of weights, samples and order, >= 0.

    Returns:
        ``"ap50"`` and ``"ap75"``, see `average_precision`, in 0..1; and ``"proposals"``, detections per image.

    Raises:
        ValueError: If numbers do not match or are out of range, or the network has no map.
    """
    check_at_least("steps", steps, 1)
    check_at_least("batch_size", batch_size, 1)
    check_positive("lr", lr)
    for name, images, boxes in (("train", train, train_boxes), ("test", test, test_boxes)):
        fits = images.ndim == 4 and len(images) == len(boxes) > 0 and all(box.shape[1:] == (4,) for box in boxes)
        hint = "Give boxes (K, 4) for each image"
        require(fits, f"{name}_boxes", f"be {len(images)} tensors (K, 4)", len(boxes), hint)
    with isolated(derived_seed(seed, 5)), torch.enable_grad():
        device = train.device
        detector = frozen_detector(model, train).to(device).train()
        trained = [p for p in detector.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randperm(len(train))[:batch_size].tolist()
            targets = [
                {"boxes": of.float().to(device), "labels": torch.ones(len(of), dtype=torch.long, device=device)}
                for of in (train_boxes[row] for row in rows)
            ]
            losses: dict[str, Tensor] = detector([train[row] for row in rows], targets)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    found: list[dict[str, Any]] = []
    with eval_mode(detector), torch.no_grad():
        for part in torch.split(test, batch_size):
            found += detector(list(part.to(device)))
    boxes, scores = [one["boxes"].cpu() for one in found], [one["scores"].cpu() for one in found]
    values = {f"ap{round(100 * iou)}": average_precision(boxes, scores, test_boxes, iou=iou) for iou in (0.5, 0.75)}
    return values | {"proposals": sum(map(len, boxes)) / len(boxes)}


def average_precision(boxes: Boxes, scores: Sequence[Tensor], truth: Boxes, *, iou: float = 0.5) -> float:
    """Return the average precision of detections of one class, as in Pascal VOC since 2010.

    Detections of all images are sorted by their score. One is right if the true box of its image with which it has the
    largest IoU is not taken by a better one, and that IoU is at least ``iou``. Precision is made to fall with recall,
    and averaged over it. COCO's evaluation interpolates at 101 points instead.

    Args:
        boxes: Detected boxes of each image, ``(K, 4)``: left, top, right, bottom; all tensors on one device.
        scores: Their scores ``(K,)``.
        truth: True boxes of each image ``(T, 4)``.
        iou: Least overlap, in (0, 1].

    Returns:
        In 0..1.

    Raises:
        ValueError: If numbers do not match, or there is no true box.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> average_precision([box, box], [torch.tensor([0.9]), torch.tensor([0.8])], [box, box + 9])
        0.5
    """
    from torchvision.ops import box_iou

    check_interval("iou", iou, "(0, 1]", "0.5 is usual")
    fits = len(boxes) == len(scores) == len(truth) and all(len(b) == len(s) for b, s in zip(boxes, scores, strict=True))
    require(fits, "boxes", "be one tensor per image with a score each", len(boxes), "Give empty ones where none is")
    total = sum(len(of) for of in truth)
    if total == 0:
        fail("truth", "hold at least one box", 0, "Average precision needs things to find")
    ranked = [(float(score), image, row) for image, of in enumerate(scores) for row, score in enumerate(of.tolist())]
    ranked.sort(key=lambda entry: (-entry[0], *entry[1:]))
    taken: set[tuple[int, int]] = set()
    right = []
    for _, image, row in ranked:
        hit = False
        if len(truth[image]):
            overlaps = box_iou(boxes[image][row : row + 1].double(), truth[image].double())[0]
            best = int(overlaps.argmax())
            hit = float(overlaps[best]) >= iou and (image, best) not in taken
            if hit:
                taken.add((image, best))
        right.append(hit)
    hits = torch.tensor(right, dtype=torch.float64).cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0) if right else precision
    return float((envelope * torch.tensor(right, dtype=torch.float64)).sum() / total)
