"""Losses of the DINO family: class tokens, masked patches, and the spread of features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_batch, check_choice, check_positive, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_floating, check_matrix, check_views
from lightning_contrast.losses.clustering import sinkhorn
from lightning_contrast.losses.kernels.tiles import CPU_TILE, split
from lightning_contrast.precision import full_precision

SINKHORN_ITERATIONS = 3  # of DINOv2


@torch.no_grad()
def teacher_probabilities(logits: Tensor, center: Tensor | None, temperature: float, centering: str) -> Tensor:
    """Return the teacher's distributions over the prototypes, ``(B, K)``, without gradient.

    Args:
        logits: The teacher's, ``(B, K)``.
        center: Their running mean, up to leading ones ``(K,)``; None is zero. Not used by ``"sinkhorn"``.
        temperature: Divisor of the logits, > 0.
        centering: ``"mean"`` or ``"sinkhorn"``, which balances the rows of all ranks.
    """
    if centering == "sinkhorn":
        return sinkhorn(logits, epsilon=temperature, iterations=SINKHORN_ITERATIONS)
    moved = logits if center is None else logits - center.reshape(1, -1)
    return (moved / temperature).softmax(1)


def check_teacher(student_temperature: float, teacher_temperature: float, centering: str) -> None:
    """Check both temperatures and the kind of centring."""
    check_positive("student_temperature", student_temperature, "DINO uses 0.1")
    check_positive("teacher_temperature", teacher_temperature, "DINO uses 0.04 to 0.07")
    check_choice("centering", centering, ("mean", "sinkhorn"))


def check_center(center: Tensor | None, width: int) -> None:
    """Check that a centre, if there is one, has a number for each of ``width`` prototypes."""
    if center is not None and center.numel() != width:
        fail("center", f"have {width} numbers", tuple(center.shape), "Give one for each prototype")


@full_precision
def dino_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    *,
    student_temperature: float,
    teacher_temperature: float,
    centering: str = "mean",
) -> Tensor:
    """Return DINO's cross entropy of all student views with the teacher's global views.

    Implements Algorithm 1 of DINO (https://arxiv.org/abs/2104.14294), and with ``centering="sinkhorn"`` the balanced
    targets of DINOv2 (https://arxiv.org/abs/2304.07193). A view is never compared with itself. The teacher receives no
    gradient.

    Args:
        student: Logits, one ``(B, K)`` a view, the global views first and in the teacher's order.
        teacher: Logits of the global views, one ``(B, K)`` a view; at most as many as the student's.
        center: Running mean of the teacher's logits, ``(K,)`` or ``(1, K)``; None is zero.
        student_temperature: Divisor of the student's logits; unitless, > 0; 0.1 in the paper.
        teacher_temperature: Divisor of the teacher's logits; unitless, > 0; 0.04 in the paper.
        centering: ``"mean"`` subtracts the centre; ``"sinkhorn"`` balances the targets over the teacher's views and all
            ranks together instead.

    Returns:
        The mean over all pairs of different views and the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit or a number is out of its range.
        TypeError: If the logits are not floating point.
    """
    check_teacher(student_temperature, teacher_temperature, centering)
    check_views("teacher", teacher, 1)
    check_views("student", student, max(2, len(teacher)))
    if teacher[0].shape != student[0].shape:
        shapes = tuple(teacher[0].shape), tuple(student[0].shape)
        fail("teacher", "have the student's shape", shapes, "Give logits of the same images and prototypes")
    check_center(center, student[0].shape[1])
    predictions = [(view / student_temperature).log_softmax(1) for view in student]
    targets = teacher_probabilities(torch.cat(list(teacher)), center, teacher_temperature, centering)
    terms = []
    for index, target in enumerate(targets.chunk(len(teacher))):
        terms += [-(target * p).sum(1) for other, p in enumerate(predictions) if other != index]
    return global_mean(torch.stack(terms).mean(0))


@full_precision
def ibot_patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    mask: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Return iBOT's cross entropy of the masked patches of one view.

    Implements Eq. 3 of iBOT (https://arxiv.org/abs/2111.07832): a mean over the masked patches of an image, then over
    the images; an image without masked patches counts as 0. The teacher receives no gradient.

    Args:
        student: Logits of the masked view's patches, ``(B, N, K)``.
        teacher: Logits of the same patches of the whole view, ``(B, N, K)``.
        center: Running mean of the teacher's patch logits, ``(K,)`` up to leading ones; None is zero.
        mask: Which patches were masked, ``(B, N)`` bool, or 0 and 1.
        student_temperature: Divisor of the student's logits; unitless, > 0; 0.1 in the paper.
        teacher_temperature: Divisor of the teacher's logits; unitless, > 0; 0.04 in the paper.

    Returns:
        The mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not fit or a number is out of its range.
        TypeError: If the logits are not floating point.
    """
    check_teacher(student_temperature, teacher_temperature, "mean")
    check_floating("student", student)
    check_floating("teacher", teacher)
    if student.ndim != 3 or student.shape != teacher.shape:
        shapes = tuple(student.shape), tuple(teacher.shape)
        fail("student", "have the teacher's shape (B, N, K)", shapes, "Give the logits of all patches of both")
    if mask.shape != student.shape[:2]:
        fail("mask", f"have shape {tuple(student.shape[:2])}", tuple(mask.shape), "Give one value for each patch")
    check_center(center, student.shape[2])
    flat = teacher.detach().flatten(0, 1)
    target = teacher_probabilities(flat, center, teacher_temperature, "mean").view_as(teacher)
    losses = -(target * (student / student_temperature).log_softmax(2)).sum(2)  # (B, N)
    weights = mask.to(losses.dtype)
    return global_mean((losses * weights).sum(1) / weights.sum(1).clamp_min(1))


@full_precision
def koleo_loss(z: Tensor) -> Tensor:
    """Return the Kozachenko-Leonenko regulariser, which spreads features by the distance to the nearest neighbour.

    Implements the KoLeo term of DINOv2 (https://arxiv.org/abs/2304.07193). Inputs are L2-normalised here.
    Differs from it: neighbours are searched over all ranks, as in DINOv3, not on each device alone.

    Args:
        z: Features of one view, ``(B, D)``.

    Returns:
        Minus the mean logarithm of the distances over all ranks, a scalar.

    Raises:
        ValueError: If the shape is wrong or the batch is smaller than 2.
        TypeError: If the features are not floating point.
    """
    check_matrix("z", z)
    if not distributed.is_distributed():
        check_batch("z", len(z))
    unit = F.normalize(z, dim=1, eps=1e-8)
    everyone = distributed.gather_with_gradient(unit)
    nearest = everyone[_nearest(unit.detach(), everyone.detach())]
    distances = F.pairwise_distance(unit, nearest, eps=1e-8)
    return -global_mean((distances + 1e-8).log())


def _nearest(own: Tensor, everyone: Tensor) -> Tensor:
    """Return the index of each own row's most similar other row, ``(B,)``."""
    sizes = distributed.batch_sizes(len(own), own.device)
    check_batch("z", sum(sizes))
    start = sum(sizes[: distributed.rank()])
    found = []
    for rows in split(len(own), CPU_TILE):
        similarities = own[rows] @ everyone.T
        similarities.diagonal(start + rows.start).fill_(-torch.inf)
        found.append(similarities.argmax(1))
    return torch.cat(found)


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
