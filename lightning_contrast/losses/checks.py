"""What every loss does before and after its own formula: checks, full precision, the mean over all ranks."""

from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_positive, check_same_shape, fail

Scalar = float | Tensor  # a hyper-parameter, or a learned tensor with one element, which is never read on the host


def check_floating(name: str, x: object) -> None:
    """Check that ``x`` is a floating tensor."""
    if not isinstance(x, Tensor):
        fail(name, "be a tensor", type(x).__name__, "Give the output of a network", TypeError)
    if not x.is_floating_point():
        hint = "Give embeddings, or convert integers with `.float()`"
        fail(name, "be a floating point tensor", x.dtype, hint, TypeError)


def check_matrix(name: str, x: Tensor, width: int | None = None) -> None:
    """Check that ``x`` is a floating tensor ``(rows, width)``."""
    check_floating(name, x)
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        rule = f"have shape (rows, {'dim' if width is None else width})"
        fail(name, rule, tuple(x.shape), "Give one row for each image, as wide as the others")


def check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor, minimum: int = 2) -> None:
    """Check two floating tensors of one shape ``(B, D)`` with at least ``minimum`` rows over all ranks.

    With several ranks only an empty share is an error here: the sum over ranks is checked where it is known.
    """
    check_floating(name_a, a)
    check_floating(name_b, b)
    check_same_shape(name_a, a, name_b, b, 2)
    if not distributed.is_distributed():
        check_batch(name_a, len(a), minimum)


def check_tile_size(tile_size: int | None) -> None:
    """Check that a tile has at least one row."""
    if tile_size is None:
        return
    if isinstance(tile_size, bool) or not isinstance(tile_size, int):
        fail("tile_size", "be a whole number or None", tile_size, "Leave it out to have it chosen", TypeError)
    if tile_size < 1:
        fail("tile_size", "be >= 1", tile_size, "Leave it out to have it chosen")


def check_scalar(name: str, value: Scalar, hint: str) -> Scalar:
    """Check a number > 0, or a tensor with one element, which is returned without dimensions and not read."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            fail(name, "have one element", tuple(value.shape), "Give a number or a tensor of one number")
        return value.reshape(())
    check_positive(name, value, hint)
    return float(value)


def inverse_temperature(temperature: Scalar, name: str = "temperature") -> Scalar:
    """Check a temperature and return the factor of the cosine similarities."""
    return 1.0 / check_scalar(name, temperature, "Usual values lie between 0.05 and 1")
