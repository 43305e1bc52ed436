"""Which kernels exist for which weight format, and why one cannot run; kernels know nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import (
    bitblas_package,
    bnb,
    numba_attention,
    triton_attention,
    triton_bitblas,
    triton_gptq,
    triton_launch,
    triton_prefill,
)
from pipeline.kernels.bitblas_operators import OperatorStore, default_folder
from pipeline.kernels.bitblas_package import BitblasPackage
from pipeline.kernels.cache_attention import (
    AttentionKernel,
    AttentionNeed,
    RowsKernel,
    attend_cached_reference,
    attend_slot_by_slot,
    runs_slot_by_slot,
)
from pipeline.kernels.linear8bit import Int8Weight, dequantize_8bit, linear_8bit_reference, looks_for_outliers
from pipeline.kernels.need import Need, Progress
from pipeline.kernels.packed4bit import Packed4bit, dequantize_4bit_reference
from pipeline.kernels.packed_bitblas import BitblasWeight, dequantize_bitblas_reference
from pipeline.kernels.packed_gptq import GptqWeight, dequantize_gptq_reference


class PackedWeight(Protocol):
    """A quantized weight [N, K] in some format."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def stored_bytes(self) -> int: ...


Weight = TypeVar("Weight", bound=PackedWeight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel(Generic[Weight]):
    """One implementation for one weight format.

    `can_run` answers with the reason why not, or None. `dequantize` gives the weight [N, K] in a dtype, for a
    dense product. A kernel with its own product, x W^T + b for x [M, K], has it as `linear`: it is what runs, with
    `few_rows` in passes of at most so many rows. Which one runs depends on the shape of a pass alone.
    `prepare` is called with the needs and the device before weights are loaded, where there is something to
    compile. `passed_over` says why `auto` does not take a kernel that runs only when asked for, or None, and
    `uncapturable` why a product with a weight cannot be part of a CUDA graph, or None.
    """

    name: str
    can_run: Callable[[Need], str | None]
    dequantize: Callable[[Weight, torch.dtype], Tensor]
    linear: Callable[[Tensor, Weight, Tensor | None], Tensor] | None = None
    few_rows: int | None = None
    prepare: Callable[[Sequence[Need], torch.device, Progress], None] | None = None
    passed_over: Callable[[Need], str | None] | None = None
    uncapturable: Callable[[Weight], str | None] | None = None

    @property
    def dequantizes(self) -> bool:
        """Whether some passes run a dense product."""
        return self.linear is None or self.few_rows is not None


FEW_ROWS = 64
"""Up to which a product with packed weights reads less than a dense one, if the dense weight is not there yet."""


def _anywhere(need: object) -> str | None:
    return None


def _for_few_rows(need: Need) -> str | None:
    return "pays where few rows share a pass and dense weights are not kept; runs only when asked for"


BNB_4BIT: Mapping[str, Kernel[Packed4bit]] = {
    "bitsandbytes": Kernel(name="bitsandbytes", can_run=bnb.can_run, dequantize=bnb.dequantize_4bit),
    "reference": Kernel(name="reference", can_run=_anywhere, dequantize=dequantize_4bit_reference),
}
BNB_8BIT: Mapping[str, Kernel[Int8Weight]] = {
    "bitsandbytes": Kernel(
        name="bitsandbytes",
        can_run=bnb.can_run,
        dequantize=dequantize_8bit,
        linear=bnb.linear_8bit,
        uncapturable=looks_for_outliers,
    ),
    "reference": Kernel(
        name="reference",
        can_run=_anywhere,
        dequantize=dequantize_8bit,
        linear=linear_8bit_reference,
        uncapturable=looks_for_outliers,
    ),
}
GPTQ: Mapping[str, Kernel[GptqWeight]] = {
    "triton": Kernel(
        name="triton",
        can_run=triton_gptq.can_run,
        passed_over=triton_launch.passed_over,
        dequantize=triton_gptq.dequantize,
    ),
    "triton-fused": Kernel(
        name="triton-fused",
        can_run=triton_gptq.can_run_linear,
        passed_over=_for_few_rows,
        dequantize=triton_gptq.dequantize,
        linear=triton_gptq.linear,
        few_rows=FEW_ROWS,
    ),
    "reference": Kernel(name="reference", can_run=_anywhere, dequantize=dequantize_gptq_reference),
}


def _bitblas_package(folder: Path) -> Kernel[BitblasWeight]:
    package = BitblasPackage(OperatorStore(folder))
    return Kernel(
        name="bitblas",
        can_run=package.can_run,
        passed_over=bitblas_package.passed_over,
        dequantize=dequantize_bitblas_reference,
        linear=package.linear,
        prepare=package.prepare,
    )


BITBLAS: Mapping[str, Kernel[BitblasWeight]] = {
    "bitblas": _bitblas_package(default_folder()),
    "triton": Kernel(
        name="triton",
        can_run=triton_bitblas.can_run,
        passed_over=triton_launch.passed_over,
        dequantize=triton_bitblas.dequantize,
    ),
    "triton-fused": Kernel(
        name="triton-fused",
        can_run=triton_bitblas.can_run_linear,
        passed_over=_for_few_rows,
        dequantize=triton_bitblas.dequantize,
        linear=triton_bitblas.linear,
        few_rows=FEW_ROWS,
    ),
    "reference": Kernel(name="reference", can_run=_anywhere, dequantize=dequantize_bitblas_reference),
}
"""Of each format the fastest first: `auto` takes the first that can run."""


CACHE_ATTENTION: Mapping[str, AttentionKernel] = {
    "triton": AttentionKernel(
        name="triton",
        attend=triton_attention.attend_cached,
        can_run=triton_attention.can_run,
        passed_over=triton_attention.passed_over,
        stops_at_length=lambda need: True,
        rows=RowsKernel(attend=triton_prefill.attend_rows, tiles_of=triton_prefill.tiles_of),
    ),
    "numba": AttentionKernel(
        name="numba",
        attend=numba_attention.attend_cached,
        can_run=numba_attention.can_run,
        passed_over=_anywhere,
        stops_at_length=lambda need: True,
        prepare=numba_attention.compile_for,
    ),
    "slotwise": AttentionKernel(
        name="slotwise",
        attend=attend_slot_by_slot,
        can_run=runs_slot_by_slot,
        passed_over=_anywhere,
        stops_at_length=lambda need: not need.float8,
    ),
    "reference": AttentionKernel(
        name="reference",
        attend=attend_cached_reference,
        can_run=_anywhere,
        passed_over=_anywhere,
        stops_at_length=lambda need: False,
    ),
}
"""What reads a static cache, and attends to the rows of a pass, the fastest first."""


def choose_attention(wanted: str, need: AttentionNeed) -> tuple[AttentionKernel, str]:
    """The kernel that reads the cache, and why it; ConfigError where the one asked for cannot run."""
    if wanted != "auto":
        reason = CACHE_ATTENTION[wanted].can_run(need)
        if reason is not None:
            raise ConfigError(f"engine.attention={wanted} cannot run here: {reason}; choose engine.attention=auto")
        return CACHE_ATTENTION[wanted], "asked for"
    passed: list[str] = []
    for kernel in CACHE_ATTENTION.values():
        reason = kernel.passed_over(need) or kernel.can_run(need)
        if reason is None:
            return kernel, "; ".join([f"fastest that runs on {need.device_type}", *passed])
        passed.append(f"{kernel.name}: {reason}")
    raise AssertionError("the reference runs everywhere")


def bitblas_kernels(tuning_cache: Path | None) -> Mapping[str, Kernel[BitblasWeight]]:
    """The kernels of BitBLAS' layout, where the package keeps what it compiles in a folder of the run's."""
    return {**BITBLAS, "bitblas": _bitblas_package(tuning_cache)} if tuning_cache else BITBLAS


def choose(kernels: Mapping[str, Kernel[Weight]], wanted: str, needs: Sequence[Need]) -> tuple[Kernel[Weight], str]:
    """The kernel that runs all of `needs`, and why it was chosen; ConfigError where the one asked for cannot run."""
    if wanted != "auto":
        if wanted not in kernels:
            raise ConfigError(f"quant.kernel={wanted} cannot run this format; choose one of {', '.join(kernels)}")
        reason = obstacle(kernels[wanted], needs)
        if reason is not None:
            raise ConfigError(f"quant.kernel={wanted} cannot run here: {reason}; choose quant.kernel=auto")
        return kernels[wanted], "asked for"
    reasons = reasons_against(kernels, needs)
    name = next(name for name, reason in reasons.items() if reason is None)
    passed = [f"{other}: {reason}" for other, reason in reasons.items() if reason is not None]
    return kernels[name], "; ".join([f"fastest that runs on {needs[0].device_type}", *passed])


def reasons_against(kernels: Mapping[str, Kernel[Weight]], needs: Sequence[Need]) -> dict[str, str | None]:
    """For each kernel why `auto` does not take it, or None."""
    return {
        name: (kernel.passed_over(needs[0]) if kernel.passed_over else None) or obstacle(kernel, needs)
        for name, kernel in kernels.items()
    }


def obstacle(kernel: Kernel[Weight], needs: Sequence[Need]) -> str | None:
    """Why a kernel cannot run one of the needs, or None if it can run them all."""
    return next((reason for reason in map(kernel.can_run, needs) if reason is not None), None)
