"""Argument checks of the losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_positive, check_same_shape, fail

Scalar = float | Tensor  # a hyperparameter, or a learned tensor with one element, which is never read on the host


def check_floating(name: str, x: object) -> None:
    """Check that ``x`` is a floating point tensor."""
    if not isinstance(x, Tensor):
        fail(name, "be a tensor", type(x).__name__, "Pass the output of a network", TypeError)
    if not x.is_floating_point():
        hint = "Pass embeddings, or convert integers with `.float()`"
        fail(name, "be a floating point tensor", x.dtype, hint, TypeError)


def check_matrix(name: str, x: Tensor, width: int | None = None) -> None:
    """Check that ``x`` is a floating point tensor ``(rows, width)``."""
    check_floating(name, x)
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        rule = f"have shape (rows, {'dim' if width is None else width})"
        fail(name, rule, tuple(x.shape), "Pass one row per image, with the width of the other embeddings")


def check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor, minimum: int = 2) -> None:
    """Check two floating point tensors of the same shape ``(B, D)`` with at least ``minimum`` rows over all ranks.

    With several ranks the number of rows is checked later, when the sum over ranks is known.
    """
    check_floating(name_a, a)
    check_floating(name_b, b)
    check_same_shape(name_a, a, name_b, b, 2)
    if not distributed.is_distributed():
        check_batch(name_a, len(a), minimum)


def check_views(name: str, views: Sequence[Tensor], minimum: int) -> None:
    """Check a sequence of at least ``minimum`` floating point tensors of the same shape ``(B, K)``."""
    if isinstance(views, Tensor) or len(views) < minimum:
        count = f"one tensor {tuple(views.shape)}" if isinstance(views, Tensor) else len(views)
        fail(name, f"be a list of at least {minimum} tensors", count, "Pass one tensor (B, K) per view")
    for view in views:
        check_matrix(name, view)
        if view.shape != views[0].shape:
            shapes = [tuple(v.shape) for v in views]
            fail(name, "have one shape for all views", shapes, "Pass one row per image in every view")


def check_tile_size(tile_size: int | None) -> None:
    """Check that a tile has at least one row."""
    if tile_size is None:
        return
    if isinstance(tile_size, bool) or not isinstance(tile_size, int):
        fail("tile_size", "be an integer or None", tile_size, "Omit it to have it chosen", TypeError)
    if tile_size < 1:
        fail("tile_size", "be >= 1", tile_size, "Omit it to have it chosen")


def check_scalar(name: str, value: Scalar, hint: str) -> Scalar:
    """Check a number > 0, or a tensor with one element, and return it as float or as a tensor of shape ``()``.

    A tensor is not read on the host, so its sign is not checked.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            fail(name, "have one element", tuple(value.shape), "Pass a number or a tensor with one element")
        return value.reshape(())
    check_positive(name, value, hint)
    return float(value)


def inverse_temperature(temperature: Scalar, name: str = "temperature") -> Scalar:
    """Check a temperature, a number or a tensor of shape ``()`` or ``(1,)``, and return the factor of the cosines."""
    return 1.0 / check_scalar(name, temperature, "Usual values lie between 0.05 and 1")


def check_labels(labels: Tensor, size: int, name: str = "labels") -> None:
    """Check integer labels ``(size,)``."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        fail(name, "be an integer tensor", found, "Pass class indices", TypeError)
    if labels.shape != (size,):
        fail(name, f"have shape ({size},)", tuple(labels.shape), "Pass one class index per row")


def check_groups(groups: Tensor | None, size: int) -> None:
    """Check integer groups ``(size,)``, if there are any."""
    if groups is not None:
        check_labels(groups, size, "groups")


def check_query_groups(groups: Tensor | None, others: Tensor | None, size: int, negatives: Tensor | None) -> None:
    """Check the groups ``(size,)`` of queries and those of negatives ``(K,)``, which must come together."""
    check_groups(groups, size)
    if (others is not None) != (groups is not None and negatives is not None):
        given = "given" if others is not None else "None"
        hint = "Pass both groups with `negatives`, and only `groups` if the other keys are the negatives"
        fail("negatives_groups", "come with `groups` and `negatives`", given, hint)
    if others is not None and negatives is not None:
        check_labels(others, len(negatives), "negatives_groups")


def check_negatives(negatives: Tensor | None, mask: Tensor | None, dim: int) -> None:
    """Check shared negatives ``(K, dim)`` and their mask ``(K,)``."""
    if negatives is None:
        if mask is not None:
            fail("negatives_mask", "come with `negatives`", "negatives=None", "Pass both or neither")
        return
    check_matrix("negatives", negatives, dim)
    if mask is None:
        return
    if mask.dtype != torch.bool:
        fail("negatives_mask", "be a bool tensor", mask.dtype, "Pass True for each row that counts", TypeError)
    if mask.shape != negatives.shape[:1]:
        fail("negatives_mask", f"have shape ({len(negatives)},)", tuple(mask.shape), "Pass one value per negative")


def check_extra_negatives(extra: Tensor, query: Tensor, weighting: str) -> None:
    """Check negatives ``(B, S, D)`` of queries ``(B, D)``, which only uniform weighting supports."""
    check_floating("extra_negatives", extra)
    if extra.ndim != 3 or extra.shape[0] != len(query) or extra.shape[2] != query.shape[1]:
        rule = f"have shape ({len(query)}, S, {query.shape[1]})"
        fail("extra_negatives", rule, tuple(extra.shape), "Pass S negatives per query")
    if weighting != "uniform":
        fail("weighting", "be 'uniform' with `extra_negatives`", weighting, "Omit one of them")
