"""The storage formats: what makes quantized Linears of weights, one class per format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.kernels import registry
from pipeline.kernels.need import Need
from pipeline.kernels.registry import Kernel, choose
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


def format_of(spec: QuantSpec, wanted_kernel: str, needs: Sequence[Need]) -> tuple[StorageFormat | None, str]:
    """The format of a spec with its kernel, and why that kernel; None for unquantized weights.

    `needs` are what the kernel will have to run, at least one. Raises ConfigError where the kernel asked for
    cannot run them.
    """
    if isinstance(spec, BnbSpec) and spec.bits == 8:
        kernel8, reason = choose(registry.BNB_8BIT, wanted_kernel, needs)
        return Bnb8bitFormat(spec, kernel8), reason
    if isinstance(spec, BnbSpec):
        kernel4, reason = choose(registry.BNB_4BIT, wanted_kernel, needs)
        return Bnb4bitFormat(spec, kernel4), reason
    if isinstance(spec, GptqSpec):
        kernel, reason = choose(registry.GPTQ, wanted_kernel, needs)
        return GptqFormat(spec, kernel), reason
    return None, ""


def kernels_of(spec: QuantSpec) -> Mapping[str, Kernel[Any]]:
    """The registry's kernels for the format of a spec; none for unquantized weights."""
    if isinstance(spec, BnbSpec):
        return registry.BNB_8BIT if spec.bits == 8 else registry.BNB_4BIT
    return registry.GPTQ if isinstance(spec, GptqSpec) else {}


def needs_of(
    spec: QuantSpec,
    modules: Sequence[StoredModule],
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
) -> list[Need]:
    """What a kernel will have to run: each kind of stored module once, or what is made in flight."""
    kinds = {(module.bits, module.group_size, module.shape) for module in modules} or {(spec.bits, 0, (0, 0))}
    return [
        Need(device_type=device_type, capability=capability, dtype=dtype, bits=bits, group_size=group_size, shape=shape)
        for bits, group_size, shape in sorted(kinds)
    ]
