"""Losses of contrastive predictive coding (CPC): vectors further down an image, or later in time, are told from others.

Paper: https://arxiv.org/abs/1807.03748 (v1), https://arxiv.org/abs/1905.09272 (v2).
"""

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_positive, check_same_shape, fail, require
from lightning_contrast.distributed import global_mean
from lightning_contrast.losses.checks import check_floating
from lightning_contrast.losses.kernels.logsumexp import NegativeMask, rows_lse
from lightning_contrast.precision import full_precision
from lightning_contrast.seeding import send

_EPSILON = 1e-11  # inside the logarithm, as in Greedy InfoMax


@full_precision
def cpc_loss(
    predictions: Tensor, targets: Tensor, *, offset: int, scale: float = 0.1, tile_size: int | None = None
) -> Tensor:
    """Compute CPC's loss for one row offset: each patch below is told from all patches of the global batch.

    Implements the form of appendix A of CPC v2 (https://arxiv.org/abs/1905.09272), as lightning-bolts does: the
    prediction made at row i and column j is compared with the targets of all positions of all images of all ranks; the
    right one is row i + offset, column j of the same image, and the others, of the same image too, are negatives.
    Nothing is normalized. The logits are never materialized.

    Args:
        predictions: Predictions made at each position, ``(B, C, H, W)``; those of the last ``offset`` rows are unused.
        targets: Target vectors, ``(B, C, H, W)``.
        offset: How many rows below, in 1..H - 1.
        scale: Multiplier of the dot products, > 0.
        tile_size: Largest edge of the tiles of the similarity matrix; None chooses it.

    Returns:
        The mean over all predictions of all ranks, a scalar in nats; ``ln(B H W)`` where all targets are alike.

    Raises:
        ValueError: If shapes differ or a number is out of range.
        TypeError: If the inputs are not floating point, or ``offset`` is no whole number.
    """
    check_floating("predictions", predictions)
    check_floating("targets", targets)
    check_same_shape("predictions", predictions, "targets", targets, 4)
    check_positive("scale", scale)
    check_at_least("offset", offset, 1)
    rows = targets.shape[2]
    require(offset < rows, "offset", f"be < {rows}, the number of rows", offset, "Predict fewer rows, or cut more")
    made = _vectors(predictions[:, :, :-offset])  # (B (H - offset) W, C)
    positive = (made * _vectors(targets[:, :, offset:])).sum(1) * scale
    lse = rows_lse(made, _vectors(targets), scale, NegativeMask(tile_size=tile_size))  # with the positive
    return global_mean(lse - positive)


@full_precision
def cpc_sampled_loss(
    context: Tensor, z: Tensor, predictors: Tensor, negative_index: Tensor, *, negatives: int, skip: int = 1
) -> Tensor:
    """Compute CPC's loss with drawn negatives for K row offsets.

    Equation 4 of CPC (https://arxiv.org/abs/1807.03748) as Greedy InfoMax computes it for images. Step k of 1..K
    predicts the row ``k + skip`` below: context c and target z have the score c . W_k z. Its pool are the z of all
    images from that row on, in the order (row, column, image), and so are its anchors, which begin at row 0. Negatives
    are drawn from the pool, and may be the positive. Nothing is normalized.

    Args:
        context: Context vectors, ``(B, D, H, W)``.
        z: Target vectors, ``(B, C, H, W)``.
        predictors: The matrices W_k, ``(K, D, C)``.
        negative_index: ``(K, n)`` integers: entry ``m * negatives + j`` of row k - 1 is the place in the pool of the
            j-th negative of anchor m; more entries are ignored. See `draw_row_negatives`.
        negatives: Number of negatives per anchor, >= 1.
        skip: Rows between the context and the first predicted one, >= 0; 1 since patches overlap by half.

    Returns:
        The mean over the steps of the mean over the anchors of all ranks, a scalar in nats; ``ln(1 + negatives)`` where
        all are alike. Pools are those of each rank.

    Raises:
        ValueError: If shapes do not fit or a number is out of range.
        TypeError: If inputs are not floating point, or indices or numbers no whole numbers.
    """
    for name, value, dims in (("context", context, 4), ("z", z, 4), ("predictors", predictors, 3)):
        check_floating(name, value)
        require(value.ndim == dims, name, f"have {dims} dimensions", tuple(value.shape), "Give one map per image")
    check_at_least("negatives", negatives, 1)
    check_at_least("skip", skip, 0)
    expected = (z.shape[0], context.shape[1], *z.shape[2:])
    require(context.shape == expected, "context", f"have shape {expected}", tuple(context.shape), "Give one per target")
    widths, steps = (context.shape[1], z.shape[1]), len(predictors)
    hint = "Map targets to the width of the context"
    require(predictors.shape[1:] == widths, "predictors", f"be (K, {widths[0]}, {widths[1]})", predictors.shape, hint)
    batch, _, rows, columns = z.shape
    require(
        steps > 0 and steps + skip < rows, "predictors", f"be 1 to {rows - skip - 1} matrices", steps, "Cut more rows"
    )
    needed = (rows - 1 - skip) * columns * batch * negatives
    check_index("negative_index", negative_index, 2)
    fits = negative_index.shape[0] == steps and negative_index.shape[1] >= needed
    hint = "Draw them with `draw_row_negatives`"
    require(fits, "negative_index", f"be ({steps}, >= {needed})", tuple(negative_index.shape), hint)
    losses = []
    for k, predictor in enumerate(predictors):
        offset = k + 1 + skip
        anchors = _by_place(context[:, :, : rows - offset])  # (M, D)
        pool = _by_place(z[:, :, offset:]) @ predictor.T  # (M, D)
        drawn = pool[negative_index[k, : len(anchors) * negatives]].view(len(anchors), negatives, -1)
        positive = (anchors * pool).sum(1, keepdim=True)  # (M, 1)
        scores = torch.cat([positive, torch.einsum("md,mnd->mn", anchors, drawn)], dim=1)
        losses.append(global_mean(-(scores.softmax(1)[:, 0] + _EPSILON).log()))
    return torch.stack(losses).mean()


@full_precision
def cpc_time_loss(
    context: Tensor, z: Tensor, predictors: Tensor, negative_batch: Tensor, negative_time: Tensor
) -> Tensor:
    """Compute CPC's loss over time with drawn negatives for K steps ahead.

    Equation 4 of CPC (https://arxiv.org/abs/1807.03748) as CPC_audio computes it: P_k c_t is compared with z_(t + k)
    and N drawn z, the same for all k, by the mean over channels of their product. Nothing is normalized.

    Args:
        context: Context of each time, of which no later time is part, ``(B, S, A)``.
        z: Vectors of each time, ``(B, S, D)``.
        predictors: The matrices P_k, ``(K, D, A)`` with K < S.
        negative_batch: Sequence of each negative, ``(B, N, S - K)`` integers in 0..B - 1.
        negative_time: Time of each negative relative to that of its context, ``(B, N, S - K)`` integers: negative n at
            time t is ``z[negative_batch, (negative_time + t) mod S]``. See `draw_time_negatives`.

    Returns:
        The mean over steps, times and sequences of all ranks, a scalar in nats; ``ln(1 + N)`` where all are alike.
        Negatives are those of each rank.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If inputs are not floating point, or indices no integers.
    """
    steps, times = _check_times(context, z, predictors)
    check_index("negative_batch", negative_batch, 3)
    check_index("negative_time", negative_time, 3)
    window = times - steps
    fits = negative_batch.shape == negative_time.shape and negative_batch.shape[::2] == (len(z), window)
    rule = f"have shape ({len(z)}, N, {window}) like `negative_time`"
    require(fits, "negative_batch", rule, tuple(negative_batch.shape), "Draw them with `draw_time_negatives`")
    time = (negative_time + torch.arange(window, device=z.device)) % times
    drawn = z[negative_batch, time]  # (B, N, S - K, D)
    predicted = torch.einsum("kda,bta->kbtd", predictors, context[:, :window])
    negative = torch.einsum("kbtd,bntd->kbtn", predicted, drawn)
    targets = torch.stack([z[:, k + 1 : k + 1 + window] for k in range(steps)])  # (K, B, S - K, D)
    positive = (predicted * targets).sum(3, keepdim=True)
    scores = torch.cat([positive, negative], dim=3) / z.shape[2]
    each = scores.logsumexp(3) - scores[..., 0]  # (K, B, S - K)
    return global_mean(each.mean((0, 2)))


@full_precision
def cpc_all_times_loss(context: Tensor, z: Tensor, predictors: Tensor) -> Tensor:
    """Compute CPC's loss over time for K steps ahead, with all times of all sequences of all ranks as negatives.

    `cpc_loss` of a grid with one column: P_k c_t is compared with z_(t + k) and every other z by the mean over channels
    of their product, as in `cpc_time_loss`, but nothing is drawn. Nothing is normalized.

    Args:
        context: Context of each time, of which no later time is part, ``(B, S, A)``.
        z: Vectors of each time, ``(B, S, D)``.
        predictors: The matrices P_k, ``(K, D, A)`` with K < S.

    Returns:
        The mean over steps of the mean over all times that have a target, of all ranks, a scalar in nats; ``ln(B S)``
        where all are alike.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If the inputs are not floating point.
    """
    _check_times(context, z, predictors)
    targets = z.transpose(1, 2)[..., None]  # (B, D, S, 1)
    predicted = torch.einsum("kda,bta->kbdt", predictors, context)[..., None]
    each = [cpc_loss(made, targets, offset=k + 1, scale=1 / z.shape[2]) for k, made in enumerate(predicted)]
    return torch.stack(each).mean()


def draw_row_negatives(
    z: Tensor, *, steps: int, negatives: int, skip: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the ``negative_index`` of `cpc_sampled_loss`, uniformly and with replacement.

    Args:
        z: Target vectors, ``(B, C, H, W)``, of which only the shape and the device are used.
        steps: K, number of row offsets, >= 1.
        negatives: Number of negatives per anchor, >= 1.
        skip: As in `cpc_sampled_loss`.
        generator: Generator of the CPU; None is torch's global one.

    Returns:
        Integers ``(K, n)`` on the device of ``z``.
    """
    batch, _, rows, columns = z.shape
    sizes = [max(rows - k - skip, 0) * columns * batch for k in range(1, steps + 1)]
    index = torch.zeros(steps, sizes[0] * negatives, dtype=torch.int64)
    for row, size in zip(index, sizes, strict=True):
        if size:
            row[: size * negatives] = torch.randint(size, (size * negatives,), generator=generator)
    return send(index, z.device)


def draw_time_negatives(
    z: Tensor, *, steps: int, negatives: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the negatives of `cpc_time_loss`: any sequence, and any time but that of the context.

    As in CPC_audio, the relative time is uniform in 1..S - 1, so that a predicted step itself may be drawn.

    Args:
        z: Vectors of each time, ``(B, S, D)``, of which only the shape and the device are used.
        steps: K, number of steps ahead, in 1..S - 1.
        negatives: N, number of negatives per time, >= 1.
        generator: Generator of the CPU; None is torch's global one.

    Returns:
        ``negative_batch`` and ``negative_time``, integers ``(B, N, S - K)`` on the device of ``z``.
    """
    batch, times, _ = z.shape
    shape = (batch, negatives, times - steps)
    chosen = torch.randint(batch, shape, generator=generator)
    time = torch.randint(1, times, shape, generator=generator)
    return send(chosen, z.device), send(time, z.device)


def _check_times(context: Tensor, z: Tensor, predictors: Tensor) -> tuple[int, int]:
    """Check contexts (B, S, A), vectors (B, S, D) and matrices (K, D, A), and return K and S."""
    for name, value in (("context", context), ("z", z), ("predictors", predictors)):
        check_floating(name, value)
        require(value.ndim == 3, name, "have 3 dimensions", tuple(value.shape), "Give one vector per time")
    require(context.shape[:2] == z.shape[:2], "context", f"be {tuple(z.shape[:2])}", context.shape, "Give one per time")
    widths, steps, times = (z.shape[2], context.shape[2]), len(predictors), z.shape[1]
    hint = "Map contexts to the width of the targets"
    require(predictors.shape[1:] == widths, "predictors", f"be (K, {widths[0]}, {widths[1]})", predictors.shape, hint)
    require(
        0 < steps < times, "predictors", f"be 1 to {times - 1} matrices", steps, "Take longer clips, or fewer steps"
    )
    return steps, times


def check_index(name: str, value: object, dims: int) -> None:
    """Check an integer tensor with ``dims`` dimensions."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        fail(name, "be an integer tensor", found, "Pass indices", TypeError)
    require(value.ndim == dims, name, f"have {dims} dimensions", tuple(value.shape), "Pass one index per negative")


def _vectors(x: Tensor) -> Tensor:
    """Return the vectors of all places of maps (B, C, H, W), (B H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _by_place(x: Tensor) -> Tensor:
    """Return the vectors of maps (B, C, H, W) in the order (row, column, image), (H W B, C)."""
    return x.permute(2, 3, 0, 1).reshape(-1, x.shape[1])
