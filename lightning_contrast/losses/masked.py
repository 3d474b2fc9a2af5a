"""Losses that predict the representation of masked parts of an image."""

import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import check_at_least, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses._prepare import check_floating, check_matrix
from lightning_contrast.losses.distillation import check_center, check_teacher, teacher_probabilities
from lightning_contrast.precision import full_precision


@full_precision
def ijepa_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the smooth L1 distance of predicted patch features to the teacher's.

    Implements the loss of I-JEPA (https://arxiv.org/abs/2301.08243) as in the authors' program: smooth L1 with beta 1,
    to targets that are layer-normalised here without affine parameters. The target receives no gradient.
    Differs from it: the paper writes an L2 distance.

    Args:
        prediction: Output of the predictor at the target blocks, ``(B, ..., D)``.
        target: Output of the target encoder at the same patches, ``(B, ..., D)``.

    Returns:
        The mean over images of all ranks, patches and features, a scalar.

    Raises:
        ValueError: If the shapes differ or there is no feature dimension.
        TypeError: If the inputs are not floating point.
    """
    check_floating("prediction", prediction)
    check_floating("target", target)
    if prediction.ndim < 2 or prediction.shape != target.shape:
        shapes = tuple(prediction.shape), tuple(target.shape)
        fail("prediction", "have the target's shape (B, ..., D)", shapes, "Give the features of the same patches")
    goal = F.layer_norm(target.detach(), target.shape[-1:])
    return global_mean(F.smooth_l1_loss(prediction, goal, reduction="none").flatten(1).mean(1))


@full_precision
def masked_patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    images: Tensor,
    *,
    count: int,
    student_temperature: float,
    teacher_temperature: float,
    centering: str = "mean",
) -> Tensor:
    """Return iBOT's cross entropy of masked patches, given the logits of those patches only.

    The value of `ibot_patch_loss` without the logits of patches that are not masked, which it would leave out: a mean
    over the masked patches of an image, then over the images; an image without masked patches counts as 0. With
    ``centering="sinkhorn"`` the patch term of DINOv2 (https://arxiv.org/abs/2304.07193). The teacher receives no
    gradient.

    Args:
        student: Logits of masked patches, ``(M, K)``; M may be 0.
        teacher: Logits of the same patches of the whole images, ``(M, K)``.
        center: Running mean of the teacher's patch logits, ``(K,)`` up to leading ones; None is zero.
        images: The image of each patch, ``(M,)`` int in 0 .. count - 1.
        count: Number of images of this rank, those without masked patches included; >= 1.
        student_temperature: Divisor of the student's logits; unitless, > 0; 0.1 in the papers.
        teacher_temperature: Divisor of the teacher's logits; unitless, > 0; 0.04 to 0.07 in the papers.
        centering: ``"mean"`` subtracts the centre, ``"sinkhorn"`` balances the targets over all ranks instead.

    Returns:
        The mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit or a number is out of its range.
        TypeError: If the logits are not floating point.
    """
    check_teacher(student_temperature, teacher_temperature, centering)
    check_matrix("student", student)
    check_matrix("teacher", teacher, student.shape[1])
    check_at_least("count", count, 1)
    if not len(student) == len(teacher) == images.numel():
        shapes = tuple(student.shape), tuple(teacher.shape), tuple(images.shape)
        fail("student", "have one row for each of the teacher and of `images`", shapes, "Give the same patches of all")
    check_center(center, student.shape[1])
    target = teacher_probabilities(teacher.detach(), center, teacher_temperature, centering)
    losses = -(target * (student / student_temperature).log_softmax(1)).sum(1)  # (M,)
    sums = losses.new_zeros(count).index_add(0, images, losses)
    patches = losses.new_zeros(count).index_add(0, images, losses.new_ones(len(losses)))
    return global_mean(sums / patches.clamp_min(1))
