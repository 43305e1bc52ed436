"""The Linear whose weight is quantized: what every storage format shares."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantLinear(nn.Module, ABC):
    """y = x W^T + b with W [N, K] kept quantized; x is [..., K] in the model's dtype.

    The weight is dequantized for each pass, or once with `cache_weight`; both give the same bits,
    since the product is the same dense one. A format whose product is another one is not `cacheable`.
    """

    cacheable = True

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self._cached: Tensor | None = None

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight [N, K] in the model's dtype."""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes that the quantized weight and its statistics take."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dequantized weight: what caching it costs."""
        return self.in_features * self.out_features * self.dtype.itemsize

    @property
    def cached_bytes(self) -> int:
        """Bytes that the cached weight takes now."""
        return 0 if self._cached is None else self.dense_bytes

    def cache_weight(self) -> None:
        """Keep the dequantized weight from now on."""
        self._cached = self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        weight_NK = self.dequantize() if self._cached is None else self._cached
        return F.linear(x, weight_NK, self.bias)
