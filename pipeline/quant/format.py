"""The storage formats: what makes quantized Linears of weights, one class per format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.kernels.registry import DEQUANTIZE_4BIT, LINEAR_8BIT, Kernel, choose
from pipeline.quant.bnb4bit import Bnb4bitFormat
from pipeline.quant.bnb8bit import Bnb8bitFormat
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import QuantSpec


class StorageFormat(Protocol):
    """A way to store a Linear's weight; it owns its tensors' names."""

    @property
    def spec(self) -> QuantSpec: ...

    @property
    def kernel(self) -> Kernel[Any]: ...

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Quantize an unquantized weight in flight, on its device."""
        ...

    def stored_leaves(self, leaves: Iterable[str]) -> set[str]:
        """Of the tensors under a module's path, those that make up a stored quantized weight, or none."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
        """Build the Linear from stored tensors; raises ConfigError saying what does not fit."""
        ...


def format_of(spec: QuantSpec, wanted_kernel: str, device_type: str) -> tuple[StorageFormat | None, str]:
    """The format of a spec with its kernel, and why that kernel; None for unquantized weights.

    Raises ConfigError where the kernel asked for cannot run.
    """
    if not spec.quantized:
        return None, ""
    if spec.bits == 8:
        kernel8, reason = choose(LINEAR_8BIT, wanted_kernel, device_type)
        return Bnb8bitFormat(spec, kernel8), reason
    kernel4, reason = choose(DEQUANTIZE_4BIT, wanted_kernel, device_type)
    return Bnb4bitFormat(spec, kernel4), reason
