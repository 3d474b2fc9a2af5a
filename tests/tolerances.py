"""How close two numbers must be: the only place in the tests that says so.

Which bound a comparison gets depends on where its two numbers come from, never on how far apart they were on one
processor:

1. **One program, run twice on one machine** (a resumed run and a whole one, with and without a callback, under autocast
   and without where the code leaves autocast, a copy, a cast, a gather): `assert_same_bits`, or ``torch.equal``. The
   kernels, their order and the layout in memory are the same, so nothing can round differently.
2. **Two programs for one quantity** (a loss and the loop that defines it, this package's ViT and timm's, one process
   and two ranks, a batch and its parts, ONNX and torch): a number of roundings, by `f32`, `f64`, `near` or `near64`.
   How they fall depends on the processor: vector width, fused multiply-add, blocks of a matrix product, threads.
3. **Not rounding**: statistics of random draws, 8-bit images, half precision, numbers printed with some decimals. They
   have bounds of their own: 1e-3 or more where the test states them, else a name in this module.

Roundings are counted in units of the machine epsilon of the dtype, 1.2e-7 in float32 and 2.2e-16 in float64. The
classes below are powers of two with a wide margin over what processors do, and far below a fault: a wrong factor for
the number of ranks changes a gradient by a half, a key among its own negatives a loss by some percent, and a batch of a
resumed run that is not the next one the weights by as much as a step.

`torch.testing.assert_close` without bounds is allowed: its defaults are of the same kind, in float32 a relative 11
epsilon and 84 epsilon of 1, in float64 1e-7. ``pytest.approx`` without bounds allows a relative 1e-6, which is right
for Python's floats but only 8 epsilon in float32: numbers out of tensors take `near`. `tests/test_tolerances.py`
enforces this.
"""

import pytest
import torch

ROUNDED = 8
"""The same number after a few operations, such as a rounding to float32 and a product."""

FORMULA = 64
"""A formula written in two ways: dozens of operations, sums of some hundred terms, no long chain of products.

A sum of n terms is off by at most n epsilon of the sum of their sizes and by about sqrt(n) in practice; torch and BLAS
add in blocks, which rounds less.
"""

NETWORK = 1024
"""A network, forward and backward, or a few optimizer steps: some ten layers, each with sums of up to a thousand terms.

Also for one process and two ranks in float32, where each gradient is the mean of two sums instead of one sum.
"""

TRAINING = 8192
"""Several training steps of two programs, each of which continues from its own rounding."""

CANCELLING = 2**20
"""float64 only: gradients that are small differences of large terms (up to 1 / temperature**2 times as large).

float64 is used where the formula is under test and not its rounding. 2**20 epsilon (2e-10) leave 32 of 52 bits that
must agree, which no wrong formula does.
"""

AMPLIFIED = 2**30
"""float64 only: weights after steps of Adam, which divides a gradient by its size even if it is mere rounding."""

FOUR_DIGITS = 1e-4
"""Not rounding: a constant that one of two programs gives with four digits, as the luma of a color."""

CONVERGED = 1e-6
"""Not rounding: what an iteration that ends, or a small number that keeps a logarithm finite, leaves behind."""


def f32(roundings: int, *, size: float = 1.0) -> dict[str, float]:
    """Return ``rtol`` and ``atol`` for two programs in float32.

    Args:
        roundings: One of the classes above: how many epsilon two programs may be apart.
        size: How large the terms are that a value is a sum of; what cancels leaves rounding of this size behind.
    """
    return _bounds(roundings, torch.float32, size)


def f64(roundings: int, *, size: float = 1.0) -> dict[str, float]:
    """Return ``rtol`` and ``atol`` for two programs in float64; see `f32`."""
    return _bounds(roundings, torch.float64, size)


def bound(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """Return how large a share of the terms of a number two programs may be apart; see `f32`."""
    return roundings * torch.finfo(dtype).eps


def near(value, roundings: int = FORMULA, *, size: float = 0.0, nan_ok: bool = False):
    """Return a ``pytest.approx`` of numbers, at least one of the two programs of which computes in float32.

    Args:
        value: A float, or a list or dict of floats.
        roundings: As in `f32`.
        size: As in `f32`; 0: the relative bound alone, for numbers that are no small differences.
        nan_ok: Whether NaN equals NaN.
    """
    return pytest.approx(value, rel=bound(roundings), abs=bound(roundings) * size, nan_ok=nan_ok)


def near64(value, roundings: int = CANCELLING, *, size: float = 0.0):
    """Return a ``pytest.approx`` of numbers that both programs compute in float64; see `near`."""
    return pytest.approx(value, rel=bound(roundings, torch.float64), abs=bound(roundings, torch.float64) * size)


def decimals(count: int) -> float:
    """Return the distance within which a number rounds to a published one with ``count`` decimals.

    It is a fiftieth more than half a unit, since a number in the middle of two may be rounded either way.
    """
    return 0.51 * 10.0**-count


def assert_same_bits(found, expected, what: str = "") -> None:
    """Check that one program, run twice, gave the same bits: tensors, or lists, tuples and dicts of tensors.

    Args:
        found: What the second run gave.
        expected: What the first one gave.
        what: Words for the message.
    """
    torch.testing.assert_close(
        found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: not the same bits. {text}"
    )


def _bounds(roundings: int, dtype: torch.dtype, size: float) -> dict[str, float]:
    return {"rtol": bound(roundings, dtype), "atol": bound(roundings, dtype) * size}
