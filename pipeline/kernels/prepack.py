"""Dense weights in the layout that oneDNN multiplies by, so that a CPU does not rearrange them in every pass.

For a product in bfloat16 torch has oneDNN lay out the weight anew each time, which for few rows takes about as long as
the product itself; float32 it gives to another library. The operators here are those of torch's own compiler for
weights that do not change. Where a weight is sometimes laid out and sometimes not (dequantized ones, as memory allows),
that both give the same bits is tried out for each size, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_TRIED_ROWS = 1024
"""Larger products are not tried out: it would take seconds, and in them the layout's share is small."""
USUAL_ROWS = 64


@dataclass(frozen=True, slots=True)
class PrepackedWeight:
    """A weight [N, K] that only oneDNN can read, and for how many rows its product has the bits of the plain one."""

    packed: Tensor
    rows: frozenset[int]

    def product(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """x W^T + b for x [..., K], the bits of `torch.nn.functional.linear`."""
        if x.numel() // x.shape[-1] in self.rows:
            return multiply(x, self.packed, bias_N)
        return F.linear(x, self.dense(), bias_N)

    def dense(self) -> Tensor:
        """The weight as it was."""
        return self.packed.to_dense()


class Prepacker:
    """Lays out the weights of one model, which runs passes of so many rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = [count for count in sorted(set(rows)) if count <= MOST_TRIED_ROWS]
        self._proven: dict[tuple[int, int, bool], frozenset[int]] = {}

    def __call__(self, weight_NK: Tensor, bias_N: Tensor | None) -> PrepackedWeight | None:
        """The weight laid out, or None where that cannot be done, or for no number of rows gives the same bits."""
        if not self._rows or weight_NK.dtype != torch.bfloat16 or not can_multiply(weight_NK):
            return None
        packed = lay_out(weight_NK, self._rows[0])
        case = (*weight_NK.shape, bias_N is None)
        if case not in self._proven:
            self._proven[case] = frozenset(n for n in self._rows if same_bits(weight_NK, packed, bias_N, n))
        return PrepackedWeight(packed, self._proven[case]) if self._proven[case] else None


def can_multiply(weight_NK: Tensor) -> bool:
    """Whether oneDNN multiplies this weight: on a CPU, in float32, or in bfloat16 if that has instructions there."""
    if weight_NK.device.type != "cpu" or weight_NK.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    return weight_NK.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def lay_out(weight_NK: Tensor, rows: int = USUAL_ROWS) -> Tensor:
    """A copy of the weight as oneDNN wants it for products of about so many rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, rows)
    return packed


def multiply(x: Tensor, packed: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + b with a W that oneDNN has laid out."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias_N, "none", [], "")
    return out


def same_bits(weight_NK: Tensor, packed: Tensor, bias_N: Tensor | None, rows: int) -> bool:
    """Whether both products of so many random rows agree in every bit.

    Another order of summation would show in one of thousands of sums.
    """
    draws = torch.Generator().manual_seed(0)
    x_MK = torch.randn(rows, weight_NK.shape[1], generator=draws).to(weight_NK.dtype)
    return torch.equal(F.linear(x_MK, weight_NK, bias_N), multiply(x_MK, packed, bias_N))
