"""Losses that distill a frozen teacher into a student: SEED, CompRess, CRD, SimReg, DisCo, KD, hints and RKD.

Teachers, queues and memories receive no gradient. Rows are those of one rank; means are over the images of all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_not_negative, check_positive, check_same_shape, fail
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_labels, check_matrix, check_pair
from lightning_contrast.losses.predictive import byol_loss
from lightning_contrast.precision import full_precision, normalize

_EPSILON = 1e-7  # of the noise-contrastive estimate, as in the reference implementations of NPID and CRD


def _check_rows(student: Tensor, teacher: Tensor, width: bool = True) -> None:
    """Check one row of each network per image, of the same width if they are compared directly."""
    if width:
        check_pair("student", student, "teacher", teacher, minimum=1)
        return
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    if len(student) != len(teacher):
        shapes = tuple(student.shape), tuple(teacher.shape)
        fail("student", "have one row for each of the teacher", shapes, "Pass features of the same images")


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Give columns where the mask ``(K,)`` is False no weight; without any other column all are alike."""
    if mask is None:
        return logits
    if mask.dtype != torch.bool or mask.shape != logits.shape[1:]:
        got = (mask.dtype, tuple(mask.shape))
        fail("queue_mask", f"be bool ({logits.shape[1]},)", got, "Pass one value per row of the queue")
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


@full_precision
def seed_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    queue_mask: Tensor | None = None,
) -> Tensor:
    """Compute the cross entropy of the student's similarities to a queue with those of the teacher.

    Implements Eq. 5 of SEED (https://arxiv.org/abs/2101.04731): both networks compare an image with the teacher's
    embedding of it and with the queue, as softmax distributions over 1 + K columns. All inputs are L2-normalized here.

    Args:
        student: Embeddings of the student, ``(B, D)``.
        teacher: Embeddings of the teacher, ``(B, D)``.
        queue: The teacher's embeddings of earlier images, ``(K, D)``.
        student_temperature: Divisor of the student's cosine similarities, > 0; 0.2 in the paper.
        teacher_temperature: Divisor of the teacher's, > 0; 0.01 in the paper, 1e-4 in the reference implementation,
            with which the teacher's distribution is practically the first column alone.
        queue_mask: Rows of the queue that count, ``(K,)`` bool; None: all.

    Returns:
        The mean over the images of all ranks, a scalar in nats; 0 without any row in the queue.

    Raises:
        ValueError: If the shapes do not fit or a temperature is not above 0.
        TypeError: If the embeddings are not floating point.
    """
    _check_rows(student, teacher)
    check_matrix("queue", queue, teacher.shape[1])
    check_positive("student_temperature", student_temperature, "SEED uses 0.2")
    check_positive("teacher_temperature", teacher_temperature, "SEED uses 0.01")
    s, t, q = normalize(student), normalize(teacher.detach()), normalize(queue.detach().to(teacher.dtype))
    columns = [(t * t).sum(1, keepdim=True), _masked(t @ q.T / teacher_temperature, queue_mask)]
    target = torch.cat([columns[0] / teacher_temperature, columns[1]], dim=1).softmax(1)  # (B, 1 + K)
    own = (s * t).sum(1, keepdim=True) / student_temperature
    logits = torch.cat([own, _masked(s @ q.T / student_temperature, queue_mask)], dim=1)
    return -global_mean((target.to(logits.dtype) * logits.log_softmax(1)).sum(1))


@full_precision
def compress_loss(
    student: Tensor,
    teacher: Tensor,
    student_queue: Tensor,
    teacher_queue: Tensor,
    *,
    temperature: float,
    queue_mask: Tensor | None = None,
) -> Tensor:
    """Compute the KL divergence of the student's similarities to anchor images from those of the teacher.

    Implements Eq. 3 of CompRess (https://arxiv.org/abs/2010.14713): each network compares an image with its own
    embeddings of the anchors. All inputs are L2-normalized here. With one queue, the teacher's is passed twice.

    Args:
        student: Embeddings of the student, ``(B, D)``.
        teacher: Embeddings of the teacher, ``(B, D')``.
        student_queue: The student's embeddings of the anchors, ``(K, D)``.
        teacher_queue: The teacher's embeddings of the same anchors, ``(K, D')``.
        temperature: Divisor of the cosine similarities of both, > 0; 0.04 in the paper.
        queue_mask: Anchors that count, ``(K,)`` bool; None: all.

    Returns:
        The mean over the images of all ranks, a scalar in nats; 0 without any anchor.

    Raises:
        ValueError: If the shapes do not fit or the temperature is not above 0.
        TypeError: If the embeddings are not floating point.
    """
    _check_rows(student, teacher, width=False)
    check_matrix("student_queue", student_queue, student.shape[1])
    check_matrix("teacher_queue", teacher_queue, teacher.shape[1])
    if len(student_queue) != len(teacher_queue):
        sizes = len(student_queue), len(teacher_queue)
        fail("student_queue", "have the rows of `teacher_queue`", sizes, "Fill both with the same images")
    check_positive("temperature", temperature, "CompRess uses 0.04")
    rows = ((student, student_queue), (teacher.detach(), teacher_queue))
    mine, theirs = (
        _masked(normalize(x) @ normalize(q.detach().to(x.dtype)).T / temperature, queue_mask).log_softmax(1)
        for x, q in rows
    )
    divergence = F.kl_div(mine, theirs.to(mine.dtype), reduction="none", log_target=True)
    return global_mean(divergence.sum(1) if queue_mask is None else divergence.where(queue_mask, 0.0).sum(1))


@full_precision
def noise_contrastive_loss(probabilities: Tensor, num_samples: int) -> Tensor:
    """Compute the noise-contrastive estimate of a softmax over all training images.

    Implements Eq. 7 of NPID (https://arxiv.org/abs/1805.01978), which CRD uses too.

    Args:
        probabilities: Those of the image itself, then of the K negatives, ``(B, 1 + K)``.
        num_samples: Number N of images; negatives are drawn uniformly.

    Returns:
        The mean over the images of all ranks, a scalar in nats.
    """
    check_at_least("num_samples", num_samples, 1)
    noise = (probabilities.shape[1] - 1) / num_samples
    own, drawn = probabilities[:, 0], probabilities[:, 1:]
    data_terms = (own / (own + noise + _EPSILON)).log()
    noise_terms = (noise / (drawn + noise + _EPSILON)).log().sum(1)
    return -global_mean(data_terms + noise_terms)


def _crd_odds(
    student: Tensor, teacher: Tensor, memories: tuple[Tensor, Tensor], columns: Tensor, t: float
) -> list[Tensor]:
    """Return ``exp(cos / t)`` of each network with the memory of the other, ``(B, 1 + K)``, the student first."""
    pairs = ((student, memories[1]), (teacher, memories[0]))
    return [
        ((memory.detach()[columns].to(x.dtype) @ normalize(x).unsqueeze(2)).squeeze(2) / t).exp() for x, memory in pairs
    ]


@full_precision
def crd_normalizers(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    indices: Tensor,
    negative_indices: Tensor,
    *,
    temperature: float,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Estimate the constants Z of `crd_loss` from a batch: N times the mean of ``exp(cos / temperature)``.

    Args:
        student: As in `crd_loss`, ``(B, D)``.
        teacher: As in `crd_loss`, ``(B, D)``.
        student_memory: As in `crd_loss`, ``(N, D)``.
        teacher_memory: As in `crd_loss`, ``(N, D)``.
        indices: As in `crd_loss`, ``(B,)``.
        negative_indices: As in `crd_loss`, ``(B, K)``.
        temperature: As in `crd_loss`.
        samples: As in `crd_loss`.

    Returns:
        The constant of the student's similarities with the teacher's memory, and that of the reverse, both scalars
        over the images of all ranks, without gradient.
    """
    columns = torch.cat([indices[:, None], negative_indices], dim=1)
    odds = _crd_odds(student.detach(), teacher.detach(), (student_memory, teacher_memory), columns, temperature)
    first, second = (samples * global_mean(values.mean(1)) for values in odds)
    return first, second


@full_precision
def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    indices: Tensor,
    negative_indices: Tensor,
    *,
    temperature: float,
    samples: int,
    normalisers: tuple[Tensor | float, Tensor | float] | None = None,
) -> Tensor:
    """Compute the contrastive representation distillation of CRD: noise-contrastive estimates in both directions.

    Implements Eq. 17 of CRD (https://arxiv.org/abs/1910.10699) as its reference implementation: the student is compared
    with the teacher's memory and the teacher's embedding with the student's memory; the positive is the memory's row of
    the image itself. Both embeddings are trained and are L2-normalized here, the memories are used as they are.
    Differs from it: the sum over K is that of the given negatives, which the reference draws with the labels.

    Args:
        student: Embeddings of the student, ``(B, D)``.
        teacher: Embeddings of the teacher, ``(B, D)``, by a trained layer.
        student_memory: Earlier embeddings of the student for all N images, ``(N, D)``.
        teacher_memory: Those of the teacher, ``(N, D)``.
        indices: Which image each row is, ``(B,)`` integers in 0 .. N - 1.
        negative_indices: Images to tell it apart from, ``(B, K)`` integers.
        temperature: Divisor of the similarities, > 0; 0.07 in the paper.
        samples: Number N of training images.
        normalisers: The constants Z of `crd_normalizers`; None computes them from this batch.

    Returns:
        The sum of both directions, each a mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If the shapes do not fit or a number is out of range.
        TypeError: If embeddings are not floating point, or indices not integers.
    """
    _check_rows(student, teacher)
    check_same_shape("student_memory", student_memory, "teacher_memory", teacher_memory, 2)
    check_matrix("student_memory", student_memory, student.shape[1])
    check_labels(indices, len(student), "indices")
    if negative_indices.ndim != 2 or len(negative_indices) != len(student):
        shape = tuple(negative_indices.shape)
        fail("negative_indices", f"have shape ({len(student)}, K)", shape, "Pass the negatives of each image")
    check_positive("temperature", temperature, "CRD uses 0.07")
    check_at_least("samples", samples, 1)
    memories = student_memory, teacher_memory
    if normalisers is None:
        normalisers = crd_normalizers(
            student, teacher, *memories, indices, negative_indices, temperature=temperature, samples=samples
        )
    columns = torch.cat([indices[:, None], negative_indices], dim=1)
    odds = _crd_odds(student, teacher, memories, columns, temperature)
    first, second = (noise_contrastive_loss(values / z, samples) for values, z in zip(odds, normalisers, strict=True))
    return first + second


def simreg_loss(prediction: Tensor, teacher: Tensor) -> Tensor:
    """Compute SimReg's regression of the teacher's features, ``2 - 2 cos``.

    Implements Eq. 1 of SimReg (https://arxiv.org/abs/2201.05131), which is `byol_loss` with a frozen target.

    Args:
        prediction: Output of the student's predictor, ``(B, D)``.
        teacher: Features of the teacher, ``(B, D)``.

    Returns:
        The mean over the images of all ranks, a scalar in [0, 4].

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the inputs are not floating point.
    """
    return byol_loss(prediction, teacher)


def disco_loss(student_a: Tensor, student_b: Tensor, teacher_a: Tensor, teacher_b: Tensor) -> Tensor:
    """Compute the distillation term of DisCo: squared distances of unit embeddings of two views.

    Implements Eq. 2 of DisCo (https://arxiv.org/abs/2104.09124) as its reference implementation: a SUM over the images,
    so that it grows with the batch, and over both views. Inputs are L2-normalized here.
    Differs from it: the sum is over the images of all ranks and not of each; the reference has 32 images per rank.

    Args:
        student_a: Embeddings of the student for the first view, ``(B, D)``.
        student_b: Those for the second view, ``(B, D)``.
        teacher_a: Embeddings of the teacher for the first view, ``(B, D)``.
        teacher_b: Those for the second view, ``(B, D)``.

    Returns:
        The sum, a scalar in [0, 8 B].

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the inputs are not floating point.
    """
    count = distributed.all_reduce_sum(torch.ones(len(student_a), device=student_a.device).sum())
    return count * (byol_loss(student_a, teacher_a) + byol_loss(student_b, teacher_b))


@full_precision
def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Compute Hinton's distillation of logits, ``T^2 KL(softmax(teacher / T) || softmax(student / T))``.

    Source: https://arxiv.org/abs/1503.02531; reference implementation: HobbitLong/RepDistiller.

    Args:
        student: Logits of the student, ``(B, C)``.
        teacher: Logits of the teacher, ``(B, C)``.
        temperature: T, > 0; 4 in the reference implementation.

    Returns:
        The mean over the images of all ranks, a scalar in nats.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
        TypeError: If the logits are not floating point.
    """
    _check_rows(student, teacher)
    check_positive("temperature", temperature, "The reference implementation uses 4")
    mine, theirs = ((x / temperature).log_softmax(1) for x in (student, teacher.detach()))
    divergence = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(1)
    return temperature**2 * global_mean(divergence)


@full_precision
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of features, the hints of FitNets (https://arxiv.org/abs/1412.6550).

    Args:
        student: Features of the student, after a regressor to the teacher's width, ``(B, D)``.
        teacher: Features of the teacher, ``(B, D)``.

    Returns:
        The mean over features and the images of all ranks, a scalar.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the inputs are not floating point.
    """
    _check_rows(student, teacher)
    return global_mean((student - teacher.detach()).square().mean(1))


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances ``(B, B)`` as shares of their mean, and cosines of angles ``(B, B, B)`` between differences."""
    differences = x[None] - x[:, None]  # (B, B, D)
    distances = torch.linalg.vector_norm(differences, dim=2)
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    unit = F.normalize(differences, dim=2)
    return distances / mean.clamp_min(1e-12), unit @ unit.mT


@full_precision
def rkd_loss(student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """Compute relational knowledge distillation: distances of pairs and angles of triplets of images.

    Implements Eqs. 6 and 9 of RKD (https://arxiv.org/abs/1904.05068) as HobbitLong/RepDistiller: smooth L1 of distances
    that are divided by their mean, and of cosines; both means include the zeros of an image with itself. The batch is
    that of all ranks, and memory grows with its cube: 256 images take 67 MB per network in float32.

    Args:
        student: Features of the student, ``(B, D)``.
        teacher: Features of the teacher, ``(B, D')``; the width may differ.
        distance_weight: Weight of the distances, >= 0; 25 in the reference implementation.
        angle_weight: Weight of the angles, >= 0; 50 in the reference implementation.

    Returns:
        The weighted sum, a scalar.

    Raises:
        ValueError: If the numbers of rows differ or a weight is negative.
        TypeError: If the features are not floating point.
    """
    _check_rows(student, teacher, width=False)
    check_not_negative("distance_weight", distance_weight)
    check_not_negative("angle_weight", angle_weight)
    mine = _relations(distributed.gather_with_gradient(student))
    theirs = _relations(distributed.gather(teacher.to(student.dtype)))
    distance, angle = (F.smooth_l1_loss(a, b) for a, b in zip(mine, theirs, strict=True))
    return distance_weight * distance + angle_weight * angle
