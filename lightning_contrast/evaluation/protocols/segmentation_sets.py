"""Images and masks of torchvision's segmentation datasets, for the dense protocols."""

from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, fail

_VOID = 255


def read_segmentation(dataset: Any, *, size: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Read a segmentation dataset of torchvision into memory, resized to squares.

    ``VOCSegmentation`` has 21 classes with the ground, and 255 for void. The masks of ``Cityscapes`` with
    ``mode="fine"`` and ``target_type="semantic"`` hold 34 label ids, of which the 19 that the benchmark evaluates
    become its train ids and the others 255. Datasets that yield the same, a PIL image and a PIL mask of classes, are
    read as VOC.

    Args:
        dataset: The dataset, without transforms.
        size: Edge S in pixels, >= 1. Images are resized bilinearly with antialiasing, masks by the nearest pixel; the
            aspect ratio is not kept, as in Hummingbird.
        limit: Images at most, at equal distances, >= 1; None reads all.

    Returns:
        Images ``(N, 3, S, S)``, uint8, and classes of pixels ``(N, S, S)``, int64.

    Raises:
        TypeError: If an item is not an image with a mask.
        ValueError: If there are none.

    Example:
        >>> train = torchvision.datasets.VOCSegmentation("data", image_set="train")  # doctest: +SKIP
        >>> images, masks = read_segmentation(train, size=512)  # doctest: +SKIP
        >>> maps = patch_features(network, policy.eval_transform(images))  # doctest: +SKIP
    """
    from PIL import Image

    check_at_least("size", size, 1)
    if limit is not None:
        check_at_least("limit", limit, 1)
    number = len(dataset) if isinstance(dataset, Sized) else 0
    if number == 0:
        fail("dataset", "hold at least one image", number, "Check its folder and split")
    ids = _train_ids(dataset)
    count = number if limit is None else min(limit, number)
    images, masks = [], []
    for place in range(count):
        item = dataset[place * number // count]
        fits = isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, Image.Image) for part in item)
        if not fits:
            hint = 'Use VOCSegmentation, or Cityscapes with target_type="semantic", without transforms'
            fail("dataset", "yield a PIL image and a PIL mask", type(item).__name__, hint, TypeError)
        image, mask = item
        pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        masks.append(torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST))).long())
    classes = torch.stack(masks)
    return torch.stack(images), classes if ids is None else ids[classes]


def _train_ids(dataset: Any) -> Tensor | None:
    """Return the train id of each label id of Cityscapes ``(256,)``, 255 for void; None for other datasets."""
    from torchvision.datasets import Cityscapes

    if not isinstance(dataset, Cityscapes):
        return None
    found = torch.full((256,), _VOID)
    for of in dataset.classes:
        if of.id >= 0 and not of.ignore_in_eval:
            found[of.id] = of.train_id
    return found
