"""Fixed sine-cosine position tables, in patches or in metres on the ground."""

from __future__ import annotations

import torch
from torch import Tensor


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """Positions [N] to [N, dim]: sines, then cosines, of frequencies 10000^(-2i / dim)."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = positions[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(
    dim: int,
    grid: tuple[int, int],
    *,
    resolution: float = 1.0,
    class_token: bool = False,
) -> Tensor:
    """Position of every patch of a grid, row by row.

    The first half of the channels encodes the column, the second the row. With the side of a
    pixel for `resolution`, the same channels mean the same distance on the ground whatever the
    sensor (ScaleMAE); with 1, the default, they count patches (MAE, SatMAE++).

    Parameters
    ----------
    dim : width of a token; a multiple of 4.
    grid : rows and columns of patches.
    resolution : what one column or row counts, in metres.
    class_token : put a zero row first, for the class token.

    Returns
    -------
    float32 [rows * columns (+ 1), dim], computed in float64.

    Raises
    ------
    ValueError : `dim` is no multiple of 4, or `grid` or `resolution` is not positive.

    Source: SpectralX, sections on the tokenizer and on masked reconstruction.
    """
    rows, columns = grid
    if dim < 4 or dim % 4:
        raise ValueError(f"dim: got {dim}, expected a positive multiple of 4")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid: got {rows}x{columns}, expected at least one row and one column")
    if not resolution > 0:
        raise ValueError(f"resolution: got {resolution}, expected a positive number of metres")
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns) * resolution
    column = torch.arange(columns, dtype=torch.float64).repeat(rows) * resolution
    table = torch.cat([_sincos(column, dim // 2), _sincos(row, dim // 2)], dim=1)
    if class_token:
        table = torch.cat([table.new_zeros(1, dim), table])
    return table.float()
