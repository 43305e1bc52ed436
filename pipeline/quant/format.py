"""The storage formats: what makes quantized Linears of weights, one class per format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.kernels import registry
from pipeline.kernels.need import Need
from pipeline.kernels.registry import Kernel, choose
from pipeline.quant.bitblas import BitblasFormat, RepackedFormat
from pipeline.quant.bitblas_spec import BitblasSpec
from pipeline.quant.bnb4bit import Bnb4bitFormat
from pipeline.quant.bnb8bit import Bnb8bitFormat
from pipeline.quant.bnb_spec import BnbSpec
from pipeline.quant.gptq import GptqFormat
from pipeline.quant.gptq_spec import GptqSpec
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import QuantSpec, StoredModule


class StorageFormat(Protocol):
    """A way to store a Linear's weight; it owns its tensors' names."""

    @property
    def spec(self) -> QuantSpec: ...

    @property
    def kernel(self) -> Kernel[Any]: ...

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Quantize an unquantized weight in flight, on its device."""
        ...

    def restore(
        self, module: StoredModule, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """Build the Linear from a stored module's tensors, by leaf; raises ConfigError saying what does not fit."""
        ...


def format_of(
    spec: QuantSpec, wanted_kernel: str, needs: Sequence[Need], tuning_cache: Path | None = None
) -> tuple[StorageFormat | None, str]:
    """The format of a spec with its kernel, and why that kernel; None for unquantized weights.

    `needs` are what the kernel will have to run, at least one. `tuning_cache` is where a kernel that is compiled
    for each shape keeps what it compiled, None for a folder of the user's. Raises ConfigError where the kernel
    asked for cannot run them.
    """
    kernels = kernels_of(spec, tuning_cache)
    if not kernels:
        return None, ""
    kernel, reason = choose(kernels, wanted_kernel, needs)
    return _format(spec, kernel), reason


def _format(spec: QuantSpec, kernel: Kernel[Any]) -> StorageFormat:
    if isinstance(spec, BnbSpec):
        return Bnb8bitFormat(spec, kernel) if spec.bits == 8 else Bnb4bitFormat(spec, kernel)
    if isinstance(spec, BitblasSpec):
        return BitblasFormat(spec, kernel)
    assert isinstance(spec, GptqSpec)
    return RepackedFormat(spec, kernel) if spec.repack else GptqFormat(spec, kernel)


def kernels_of(spec: QuantSpec, tuning_cache: Path | None = None) -> Mapping[str, Kernel[Any]]:
    """The registry's kernels for the format of a spec; none for unquantized weights."""
    if isinstance(spec, BnbSpec):
        return registry.BNB_8BIT if spec.bits == 8 else registry.BNB_4BIT
    if isinstance(spec, BitblasSpec) or (isinstance(spec, GptqSpec) and spec.repack):
        return registry.bitblas_kernels(tuning_cache)
    return registry.GPTQ if isinstance(spec, GptqSpec) else {}


def needs_of(
    spec: QuantSpec,
    modules: Sequence[StoredModule],
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
) -> list[Need]:
    """What a kernel will have to run: each kind of stored module once, or what is made in flight."""
    needs = {
        Need(
            device_type=device_type,
            capability=capability,
            dtype=dtype,
            bits=module.bits,
            group_size=module.group_size,
            shape=module.shape,
            zeros_mode=module.zeros_mode,
            scale_dtype=module.scale_dtype,
        )
        for module in modules
    }
    in_flight = Need(device_type=device_type, capability=capability, dtype=dtype, bits=spec.bits, group_size=0)
    return sorted(needs or [in_flight], key=lambda need: (need.bits, need.group_size, need.shape, need.zeros_mode))
