"""Losses of the DINO family: class tokens, masked patches, KoLeo, Gram anchoring; and I-JEPA's patch regression."""

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

SINKHORN_ITERATIONS = 3  # as in DINOv2


@torch.no_grad()
def teacher_probabilities(logits: Tensor, center: Tensor | None, temperature: float, centering: str) -> Tensor:
    """Compute the teacher's distributions over the prototypes, without gradient.

    Args:
        logits: Logits of the teacher, ``(B, K)``.
        center: Running mean of the logits, ``(K,)`` up to leading ones; None: zero. Not used by ``"sinkhorn"``.
        temperature: Divisor of the logits; unitless, > 0.
        centering: ``"mean"`` subtracts the center; ``"sinkhorn"`` balances the rows of all ranks.

    Returns:
        Probabilities, ``(B, K)``.
    """
    if centering == "sinkhorn":
        return sinkhorn(logits, epsilon=temperature, iterations=SINKHORN_ITERATIONS)
    centered = logits if center is None else logits - center.reshape(1, -1)
    return (centered / temperature).softmax(1)


def check_teacher(student_temperature: float, teacher_temperature: float, centering: str) -> None:
    """Check both temperatures and the kind of centering."""
    check_positive("student_temperature", student_temperature, "DINO uses 0.1")
    check_positive("teacher_temperature", teacher_temperature, "DINO uses 0.04 to 0.07")
    check_choice("centering", centering, ("mean", "sinkhorn"))


def check_center(center: Tensor | None, width: int) -> None:
    """Check that a center, if there is one, has the elements of ``(width,)``, one per prototype."""
    if center is not None and center.numel() != width:
        fail("center", f"have {width} numbers", tuple(center.shape), "Pass one per prototype")


@full_precision
def dino_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None = None,
    *,
    student_temperature: float,
    teacher_temperature: float | None = None,
    centering: str = "mean",
    ignore_diagonal: bool = True,
) -> Tensor:
    """Compute the cross entropy of DINO between all student views and the teacher's global views.

    Implements Algorithm 1 of DINO (https://arxiv.org/abs/2104.14294), and with ``centering="sinkhorn"`` the balanced
    targets of DINOv2 (https://arxiv.org/abs/2304.07193). The teacher receives no gradient.

    Args:
        student: Logits, one ``(B, K)`` per view, the global views first and in the teacher's order; or ``(V, B, K)``.
        teacher: Logits of the global views, one ``(B, K)`` per view; at most as many as the student has.
        center: Running mean of the teacher's logits, ``(K,)`` or ``(1, K)``; None: zero.
        student_temperature: Divisor of the student's logits; unitless, > 0; 0.1 in the paper.
        teacher_temperature: Divisor of the teacher's logits; unitless, > 0; 0.04 in the paper. None: ``teacher`` holds
            probabilities instead of logits.
        centering: ``"mean"`` subtracts the center; ``"sinkhorn"`` instead balances the targets over the teacher's views
            and all ranks together.
        ignore_diagonal: Compare no view with itself.

    Returns:
        The mean over all these pairs of views and the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the logits are not floating point.
    """
    check_teacher(student_temperature, 1.0 if teacher_temperature is None else teacher_temperature, centering)
    student, teacher = (list(views) if getattr(views, "ndim", 0) == 3 else views for views in (student, teacher))
    check_views("teacher", teacher, 1)
    check_views("student", student, max(2, len(teacher)))
    if teacher[0].shape != student[0].shape:
        shapes = tuple(teacher[0].shape), tuple(student[0].shape)
        fail("teacher", "have the student's shape", shapes, "Pass logits of the same images and prototypes")
    check_center(center, student[0].shape[1])
    predictions = [(view / student_temperature).log_softmax(1) for view in student]
    if teacher_temperature is None:
        targets = torch.cat(list(teacher)).detach()
    else:
        targets = teacher_probabilities(torch.cat(list(teacher)), center, teacher_temperature, centering)
    terms = []
    for index, target in enumerate(targets.chunk(len(teacher))):
        pairs = [p for other, p in enumerate(predictions) if other != index or not ignore_diagonal]
        terms += [-(target * p).sum(1) for p in pairs]
    return global_mean(torch.stack(terms).mean(0))


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
    """Compute iBOT's cross entropy of masked patches, given the logits of those patches only.

    Implements Eq. 3 of iBOT (https://arxiv.org/abs/2111.07832), and with ``centering="sinkhorn"`` the patch term of
    DINOv2 (https://arxiv.org/abs/2304.07193): a mean over the masked patches of an image, then over the images; an
    image without masked patches counts as 0. The teacher receives no gradient.

    Args:
        student: Logits of masked patches, ``(M, K)``; M may be 0.
        teacher: Logits of the same patches of the unmasked images, ``(M, K)``.
        center: Running mean of the teacher's patch logits, ``(K,)`` up to leading ones; None: zero.
        images: Index of the image of each patch, ``(M,)`` integers in 0 .. count - 1.
        count: Number of images of this rank, including those without masked patches; >= 1, or 0 on some of several
            ranks.
        student_temperature: Divisor of the student's logits; unitless, > 0; 0.1 in the papers.
        teacher_temperature: Divisor of the teacher's logits; unitless, > 0; 0.04 to 0.07 in the papers.
        centering: ``"mean"`` subtracts the center; ``"sinkhorn"`` instead balances the targets over all ranks.

    Returns:
        The mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the logits are not floating point.
    """
    check_teacher(student_temperature, teacher_temperature, centering)
    check_matrix("student", student)
    check_matrix("teacher", teacher, student.shape[1])
    check_at_least("count", count, 0 if distributed.is_distributed() else 1)
    if not len(student) == len(teacher) == images.numel():
        shapes = tuple(student.shape), tuple(teacher.shape), tuple(images.shape)
        fail("student", "have one row for each of the teacher and of `images`", shapes, "Pass the same patches of all")
    check_center(center, student.shape[1])
    target = teacher_probabilities(teacher.detach(), center, teacher_temperature, centering)
    losses = -(target * (student / student_temperature).log_softmax(1)).sum(1)  # (M,)
    sums = losses.new_zeros(count).index_add(0, images, losses)
    patches = losses.new_zeros(count).index_add(0, images, losses.new_ones(len(losses)))
    return global_mean(sums / patches.clamp_min(1))


def ibot_patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    mask: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Compute iBOT's cross entropy of masked patches, given the logits of all patches.

    Implements Eq. 3 of iBOT (https://arxiv.org/abs/2111.07832): the special case of `masked_patch_loss` that selects
    the masked patches itself, for which the mask is read on the host.

    Args:
        student: Logits of all patches of the masked view, ``(B, N, K)``.
        teacher: Logits of the same patches of the unmasked view, ``(B, N, K)``; without gradient.
        center: Running mean of the teacher's patch logits, ``(K,)`` up to leading ones; None: zero.
        mask: Which patches are masked, ``(B, N)`` bool, or 0 and 1.
        student_temperature: Divisor of the student's logits; unitless, > 0; 0.1 in the paper.
        teacher_temperature: Divisor of the teacher's logits; unitless, > 0; 0.04 in the paper.

    Returns:
        The mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If shapes do not match or a number is out of range.
        TypeError: If the logits are not floating point.
    """
    check_floating("student", student)
    check_floating("teacher", teacher)
    if student.ndim != 3 or student.shape != teacher.shape:
        shapes = tuple(student.shape), tuple(teacher.shape)
        fail("student", "have the teacher's shape (B, N, K)", shapes, "Pass the logits of all patches of both")
    if mask.shape != student.shape[:2]:
        fail("mask", f"have shape {tuple(student.shape[:2])}", tuple(mask.shape), "Pass one value per patch")
    masked = mask.bool()
    images = masked.nonzero()[:, 0]  # (M,)
    return masked_patch_loss(
        student[masked], teacher[masked], center, images, count=len(mask),
        student_temperature=student_temperature, teacher_temperature=teacher_temperature,
    )  # fmt: skip


@full_precision
def koleo_loss(z: Tensor, *, neighbours: int = 1) -> Tensor:
    """Compute the KoLeo regularizer, the negative mean log distance of features to their nearest neighbors.

    Implements the KoLeo term of DINOv2 (https://arxiv.org/abs/2304.07193). Inputs are L2-normalized here.
    Differs from it: nearest neighbors are searched over all ranks, as in DINOv3, not on each device.

    Args:
        z: Features of one view, ``(B, D)``.
        neighbours: Number of nearest neighbors of each feature, >= 1 and less than the images of all ranks.

    Returns:
        The negative mean logarithm of the distances over all ranks, a scalar.

    Raises:
        ValueError: If the shape is wrong or the batch is smaller than 2 or not larger than ``neighbours``.
        TypeError: If the features are not floating point.
    """
    check_matrix("z", z)
    check_at_least("neighbours", neighbours, 1)
    if not distributed.is_distributed():
        check_batch("z", len(z), neighbours + 1)
    unit = F.normalize(z, dim=1, eps=1e-8)
    gathered = distributed.gather_with_gradient(unit)
    nearest = gathered[_nearest(unit.detach(), gathered.detach(), neighbours)]  # (B, k, D)
    distances = F.pairwise_distance(unit[:, None], nearest, eps=1e-8)
    return -global_mean((distances + 1e-8).log().mean(1))


@full_precision
def gram_loss(student: Tensor, teacher: Tensor, *, clip_negative: bool = False, per_image: bool = True) -> Tensor:
    """Compute the mean squared difference of the patch similarities of a student and a Gram teacher.

    Implements the Gram anchoring of DINOv3 (https://arxiv.org/abs/2508.10104): the matrices of the cosine similarities
    of all pairs of patches. Patches are L2-normalized here. The teacher receives no gradient.
    Differs from it: no option clips the similarities of the teacher alone, which the reference implementation has.

    Args:
        student: Patches, ``(B, P, D)``.
        teacher: Patches of the same places, ``(B, P, D')``; the width may differ.
        clip_negative: Set negative similarities of both to 0.
        per_image: Compare the patches of each image with each other; False: the patches of all images of all ranks.

    Returns:
        The mean over the pairs of patches, and over the images of all ranks, a scalar.

    Raises:
        ValueError: If the shapes do not match.
        TypeError: If the patches are not floating point.
    """
    check_floating("student", student)
    check_floating("teacher", teacher)
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2] or teacher.ndim != 3:
        shapes = tuple(student.shape), tuple(teacher.shape)
        fail("student", "have the patches (B, P) of the teacher", shapes, "Pass (B, P, D) of the same images")
    x, y = F.normalize(student, dim=2), F.normalize(teacher.detach(), dim=2)
    if not per_image:
        x, y = distributed.gather_with_gradient(x).flatten(0, 1), distributed.gather(y).flatten(0, 1)
    mine, theirs = x @ x.mT, y @ y.mT
    if clip_negative:
        mine, theirs = mine.clamp_min(0), theirs.clamp_min(0)
    squares = (mine - theirs).square()
    return global_mean(squares.mean((1, 2))) if per_image else squares.mean()


def _nearest(own: Tensor, gathered: Tensor, count: int) -> Tensor:
    """Find the indices ``(B, count)`` of the most similar other rows of each row of this rank, a few rows at a time."""
    sizes = distributed.batch_sizes(len(own), own.device)
    check_batch("z", sum(sizes), count + 1)
    start = sum(sizes[: distributed.rank()])
    found = []
    for rows in split(len(own), CPU_TILE):
        similarities = own[rows] @ gathered.T
        similarities.diagonal(start + rows.start).fill_(-torch.inf)
        found.append(similarities.topk(count, dim=1).indices)
    return torch.cat(found)


@full_precision
def ijepa_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the smooth L1 distance of predicted patch features to those of the target encoder.

    Implements the loss of I-JEPA (https://arxiv.org/abs/2301.08243) as the reference implementation does: smooth L1
    with beta 1, to targets that are layer-normalized here without affine parameters. The target receives no gradient.
    Differs from the paper, which has an L2 distance.

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
        fail("prediction", "have the target's shape (B, ..., D)", shapes, "Pass the features of the same patches")
    normalized = F.layer_norm(target.detach(), target.shape[-1:])
    return global_mean(F.smooth_l1_loss(prediction, normalized, reduction="none").flatten(1).mean(1))
