"""Fixed sine-cosine positions of patches and of tubelets."""

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, require


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed sine-cosine positions of MAE and I-JEPA: first those of the column, then of the row.

    Implements the positions of the reference implementations (https://arxiv.org/abs/2111.06377 and 2301.08243):
    frequencies decrease from 1 to nearly 1 / 10,000.

    Args:
        width: Length of a position, a multiple of 4.
        grid: Rows and columns of patches.

    Returns:
        One position for each patch in raster order, ``(rows * columns, width)``, float32 in [-1, 1].

    Raises:
        ValueError: If the width is no multiple of 4.
    """
    check_at_least("width", width, 4)
    require(width % 4 == 0, "width", "be a multiple of 4", width, "Half of it is for rows, half of that for sines")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([_waves(columns, width // 2), _waves(rows, width // 2)], dim=1).float()


def sincos_positions_2d(dim: int, grid_size: int | tuple[int, int], class_token: bool = True) -> Tensor:
    """Return `sincos_positions` with a row of zeros for the class token, as MAE's encoder has them.

    Args:
        dim: Length of a position, a multiple of 4.
        grid_size: Rows and columns of patches; one number for a square.
        class_token: Put a row of zeros first.

    Returns:
        ``(1 + rows * columns, dim)``, or without the first row; float32 in [-1, 1].

    Raises:
        ValueError: If the width is no multiple of 4.

    Example:
        >>> sincos_positions_2d(8, 3).shape
        torch.Size([10, 8])
    """
    grid = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    positions = sincos_positions(dim, grid)
    return torch.cat([torch.zeros(1, dim), positions]) if class_token else positions


def sincos_positions_3d(
    dim: int, grid_size: int | tuple[int, int], grid_depth: int, uniform_power: bool = False
) -> Tensor:
    """Return the fixed sine-cosine positions of V-JEPA: those of the time, the row, then the column.

    Source: https://github.com/facebookresearch/jepa (``pos_embs.py``).

    Args:
        dim: Length of a position: a multiple of 8, or of 2 with ``uniform_power``.
        grid_size: Rows and columns of tubelets; one number for a square.
        grid_depth: Tubelets over time.
        uniform_power: Give time, row and column a third of the channels each (rounded up to an even number, and cut at
            the end), instead of a half, a quarter and a quarter.

    Returns:
        One position for each tubelet, time by time and row by row, ``(depth * rows * columns, dim)``, float32 in
        [-1, 1].

    Raises:
        ValueError: If the width is not such a multiple.

    Example:
        >>> sincos_positions_3d(16, 2, 3, uniform_power=True).shape
        torch.Size([12, 16])
    """
    multiple = 2 if uniform_power else 8
    check_at_least("dim", dim, multiple)
    require(dim % multiple == 0, "dim", f"be a multiple of {multiple}", dim, "Each wave has a sine and a cosine")
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    axes = torch.meshgrid(torch.arange(grid_depth), torch.arange(height), torch.arange(width), indexing="ij")
    third = 2 * -(-dim // 6)
    widths = (third, third, third) if uniform_power else (dim // 2, dim // 4, dim // 4)
    return torch.cat([_waves(axis, share) for axis, share in zip(axes, widths, strict=True)], dim=1)[:, :dim].float()


def _waves(places: Tensor, width: int) -> Tensor:
    """Return sines and then cosines of places, float64 ``(N, width)``."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))  # (width / 2,)
    angles = places.reshape(-1, 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
