"""Parts of a report about patches: segmentation, attention and detection on composed scenes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast.data.emoji_module import EmojiDataModule
from lightning_contrast.data.scenes_module import EmojiScenesDataModule
from lightning_contrast.evaluation.attention import attention_maps
from lightning_contrast.evaluation.feature_pass.subjects import Subject, spec_transform
from lightning_contrast.evaluation.protocols.dense import (
    Segmentation,
    attention_scores,
    class_iou,
    patch_features,
    segmentation_knn,
    segmentation_linear,
)
from lightning_contrast.evaluation.protocols.detection import detection_frozen
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean
from lightning_contrast.nn.backbones import check_image_size
from lightning_contrast.seeding import derived_seed

_BATCH = 64
_DRAWS = 1000
_MEMORY = 10_240  # patches
_GRID = 20  # finer maps are averaged, so that a search takes seconds


class _SceneSet(NamedTuple):
    """Inputs of a network ``(N, C, h, w)`` and classes of the pixels of scenes ``(N, H, W)``, and their boxes."""

    inputs: Tensor
    masks: Tensor
    boxes: Tensor


def segmentation(context: Context, model: str) -> Outcome:
    """Segmentation of scenes by patch k-NN and by a linear layer."""
    outcome, subject = Outcome(), context.subjects[model]
    try:
        train, test = (_scenes(context, subject, split) for split in ("train", "test"))
        maps = [_maps(subject, part.inputs) for part in (train, test)]
    except torch.OutOfMemoryError:
        raise  # says nothing about the network
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: of a layer that takes one size only
        return _not_judged(error)
    given = (maps[0], train.masks, maps[1], test.masks)
    classes = 1 + EmojiDataModule.num_classes
    steps = int(context.options["segmentation_steps"])
    linear = segmentation_linear(*given, num_classes=classes, steps=steps, seed=context.seed)
    k = min(30, maps[0][:, 0].numel())
    near = segmentation_knn(*given, num_classes=classes, k=k, memory=max(k, _MEMORY), seed=context.seed)
    for name, found in (("mIoU (linear)", linear), ("mIoU (patch k-NN)", near)):
        outcome.values[name] = found.miou
        outcome.intervals[name] = _interval(found, context.seed)
        add_mean(outcome, name.replace("mIoU", "foreground IoU"), _foreground(found), context.seed)
    rows, columns = maps[0].shape[2:]
    outcome.notes.append(f"{len(test.masks)} scenes, {rows} x {columns} patches; {steps} steps of the linear layer.")
    return outcome


def attention(context: Context, model: str) -> Outcome:
    """Attention of the class token against the things of scenes."""
    outcome, subject = Outcome(), context.subjects[model]
    try:
        test = _scenes(context, subject, "test")
        maps = torch.cat([attention_maps(subject.module, part).cpu() for part in torch.split(test.inputs, _BATCH)])
    except torch.OutOfMemoryError:
        raise  # says nothing about the network
    except (ValueError, TypeError, RuntimeError) as error:
        return _not_judged(error)
    found = attention_scores(maps, test.masks > 0)
    add_mean(outcome, "Jaccard (best head)", found["jaccard"], context.seed)
    add_mean(outcome, "pointing game", found["pointing"], context.seed)
    outcome.values["Jaccard (mean of the heads)"] = float(found["jaccard_of_heads"].mean())
    outcome.values["pointing game of a random place"] = float(found["foreground"].mean())
    outcome.notes.append(
        f"{len(test.masks)} scenes, last layer, {maps.shape[1]} heads. The ground is plain: untrained weights may also "
        "point at things, so compare with them."
    )
    return outcome


def detection(context: Context, model: str) -> Outcome:
    """Detection of the things of scenes by Faster R-CNN on the frozen map."""
    subject, steps = context.subjects[model], int(context.options["detection_steps"])
    try:
        train, test = (_scenes(context, subject, split) for split in ("train", "test"))
        _maps(subject, test.inputs[:1])
    except torch.OutOfMemoryError:
        raise  # says nothing about the network
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: of a layer that takes one size only
        return _not_judged(error)
    boxes = [[of * part.inputs.shape[-1] / part.masks.shape[-1] for of in part.boxes] for part in (train, test)]
    found = detection_frozen(
        subject.module, train.inputs, boxes[0], test.inputs, boxes[1], steps=steps, seed=context.seed
    )
    values = {"AP50": found["ap50"], "AP75": found["ap75"]}
    return Outcome(values=dict(values), notes=[f"{len(test.inputs)} scenes, {steps} steps."])


def _not_judged(error: Exception) -> Outcome:
    """Return an outcome without values, for a network without patches or attention, or of another kind of image."""
    return Outcome(notes=[f"Not judged: {' '.join(str(error).split())}"])


def _scenes(context: Context, subject: Subject, split: Any) -> _SceneSet:
    """Return scenes as the network takes them; their size is kept where it takes any size.

    Raises:
        ValueError: If the network takes images of other channels or ranges.
    """
    key, number = "scenes", int(context.options["scenes"])
    if key not in context.memory:
        context.memory[key] = EmojiScenesDataModule(scenes=number, test_scenes=max(1, number // 2))
    data: EmojiScenesDataModule = context.memory[key]
    images = data.images(split)
    spec, preprocess = subject.input_spec, subject.preprocess
    owner = next((m for m in subject.module.modules() if hasattr(m, "patch_embed")), None)
    embed: Any = getattr(owner, "patch_embed", None)
    if spec is not None and not getattr(embed, "strict_img_size", False):
        if len(spec["mean"] or (0, 0, 0)) != 3 or spec.get("scale") is not None:
            raise ValueError("The scenes are RGB in 0..1.")
        patch = max(getattr(embed, "patch_size", None) or (1,))
        preprocess = spec_transform({**spec, "size": max(1, round(images.shape[-1] / patch)) * patch})
    parameter = next(subject.module.parameters(), None)
    given = images if parameter is None else images.to(parameter.device)
    inputs = torch.cat([preprocess(part) for part in torch.split(given, _BATCH)])
    check_image_size(subject.module if owner is None else owner, inputs)
    return _SceneSet(inputs, data.class_masks(split), data.boxes(split))


def _maps(subject: Subject, inputs: Tensor) -> Tensor:
    """Return the patch features ``(N, F, h, w)`` of inputs ``(N, C, H, W)``, on the CPU, at most 20 x 20."""
    maps = torch.cat([patch_features(subject.module, part).cpu() for part in torch.split(inputs, _BATCH)])
    grid = (min(_GRID, maps.shape[2]), min(_GRID, maps.shape[3]))
    return maps if maps.shape[2:] == grid else F.adaptive_avg_pool2d(maps, grid)


def _foreground(found: Segmentation) -> Tensor:
    """Return the IoU of things of any class against the ground, of each image ``(M,)``."""
    right = found.confusion[:, 1:, 1:].sum((1, 2)).double()
    either = found.confusion.sum((1, 2)) - found.confusion[:, 0, 0]
    return right / either.clamp(min=1)


def _interval(found: Segmentation, seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mIoU over images."""
    number = len(found.confusion)
    generator = torch.Generator().manual_seed(derived_seed(seed, 6))
    drawn = torch.randint(number, (_DRAWS, number), generator=generator)
    counts = torch.zeros(_DRAWS, number, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    sums = (counts @ found.confusion.flatten(1).double()).view(_DRAWS, *found.confusion.shape[1:])
    ends = class_iou(sums).nanmean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
