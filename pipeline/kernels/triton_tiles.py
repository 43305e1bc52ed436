"""How a product with packed weights is cut into programs.

Every output is the same chain of products of 16 inputs, whatever the number of rows: that only says how many tiles
of rows a program takes. So the bits of a row depend neither on the other rows nor on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BLOCK_M = 16
"""Rows of activations that share a product."""
BLOCK_N = 32
"""Outputs of a program: a warp takes 16, which is what a tensor core instruction takes."""
LEAST_INPUTS = 16
"""Inputs of a product: what a tensor core instruction takes in 16 bits, and the least that Triton 3.6 takes in 32."""
WARPS = 2
BLOCK_K = 128
"""Inputs, of DENSE_N outputs, that a program dequantizes for a dense product."""
DENSE_N = 64
DENSE_WARPS = 8
ONE_GROUP = 1 << 30
"""The size of a group that has all inputs, as the kernels take it: any block of inputs divides it."""
PREFETCH_BYTES = 64 << 10
"""Shared memory that a program may fill ahead; GPUs from compute capability 8.0 on have 99 KiB or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTile:
    """A program's share: `row_tiles` tiles of BLOCK_M rows, `block_u` units at a time, with loads `stages` deep."""

    row_tiles: int
    block_u: int
    stages: int

    def constants(self, units: int) -> dict[str, int | bool]:
        """As the kernels take them, for weights of `units` units along K."""
        return {
            "ROW_TILES": self.row_tiles,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": BLOCK_N,
            "BLOCK_U": self.block_u,
            "EVEN": units % self.block_u == 0,
        }


def linear_tile(x_MFU: Tensor, unit_bytes: int) -> LinearTile:
    """The tile for activations [M, F, U] and weights whose units are `unit_bytes` bytes.

    A tensor core takes 16 inputs at a time, of one field each. More tiles of rows would not fit in registers.
    """
    rows, fields = x_MFU.shape[:2]
    itemsize = x_MFU.element_size()
    block_u = max(LEAST_INPUTS, 64 // fields)
    row_tiles = 2 if rows > BLOCK_M and itemsize == 2 and fields <= 8 else 1
    stage_bytes = block_u * (row_tiles * BLOCK_M * fields * itemsize + BLOCK_N * unit_bytes)
    return LinearTile(row_tiles=row_tiles, block_u=block_u, stages=1 + min(3, PREFETCH_BYTES // stage_bytes))
