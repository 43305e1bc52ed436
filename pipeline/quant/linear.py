"""The Linear whose weight is quantized, in whichever format."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.prepack import PrepackedWeight, Prepacker
from pipeline.kernels.registry import Kernel, PackedWeight


class QuantLinear(nn.Module):
    """y = x W^T + b with W [N, K] kept quantized; x is [..., K] in the model's dtype.

    A kernel with a product of its own runs that, some kernels only in passes of few rows. For the others the weight
    is dequantized for each pass, or once with `cache_weight`; both give the same bits, since the product is the same
    dense one. `multiplies_only` is for others to unset who take `dense_weight` in every pass.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, kernel: Kernel[Any]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.weight = weight
        self.kernel = kernel
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.multiplies_only = True
        self._cached: Tensor | PrepackedWeight | None = None

    @property
    def cacheable(self) -> bool:
        """Whether a dequantized copy would be used."""
        return self.kernel.linear is None

    @property
    def computed_by(self) -> Hashable:
        """What decides on how the product is computed, besides its size."""
        laid_out = self._cached.rows if isinstance(self._cached, PrepackedWeight) else None
        return self.kernel.name, self._cached is None, laid_out

    @property
    def stored_bytes(self) -> int:
        """Bytes that the quantized weight and its statistics take."""
        return self.weight.stored_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dequantized weight: what caching it costs."""
        return self.in_features * self.out_features * self.dtype.itemsize

    @property
    def cached_bytes(self) -> int:
        """Bytes that the cached weight takes now."""
        return 0 if self._cached is None else self.dense_bytes

    def dequantize(self) -> Tensor:
        """The weight [N, K] in the model's dtype."""
        dense: Tensor = self.kernel.dequantize(self.weight, self.dtype)
        return dense

    def cache_weight(self, prepack: Prepacker | None = None) -> None:
        """Keep the dequantized weight from now on, laid out by `prepack` where it can be."""
        dense = self.dequantize()
        laid_out = prepack(dense, self.bias) if prepack is not None and self.multiplies_only else None
        self._cached = dense if laid_out is None else laid_out

    def drop_cached(self) -> int:
        """Dequantize anew for each pass from now on; returns the bytes that this frees."""
        freed, self._cached = self.cached_bytes, None
        return freed

    def dense_weight(self) -> Tensor:
        """The weight [N, K] in the model's dtype, cached or dequantized now."""
        if isinstance(self._cached, PrepackedWeight):
            return self._cached.dense()
        return self.dequantize() if self._cached is None else self._cached

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        x_MK = x.reshape(-1, self.in_features)
        if self.kernel.linear is not None and x_MK.shape[0] <= (self.kernel.few_rows or x_MK.shape[0]):
            out: Tensor = self.kernel.linear(x_MK, self.weight, self.bias)
            return out.reshape(*x.shape[:-1], self.out_features)
        if isinstance(self._cached, PrepackedWeight):
            return self._cached.product(x, self.bias)
        return F.linear(x, self.dense_weight(), self.bias)
