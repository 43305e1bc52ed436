"""Which kernels exist for which weight format, and why one cannot run; kernels know nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import bnb
from pipeline.kernels.linear8bit import Int8Weight, linear_8bit_reference
from pipeline.kernels.packed4bit import Packed4bit, dequantize_4bit_reference

Dequantize4bit = Callable[[Packed4bit, torch.dtype], Tensor]
Linear8bit = Callable[[Tensor, Int8Weight, Tensor | None], Tensor]
Run = TypeVar("Run")


@dataclass(frozen=True, slots=True)
class Kernel(Generic[Run]):
    """One implementation of an operation; `can_run(device_type)` answers with the reason why not, or None."""

    name: str
    can_run: Callable[[str], str | None]
    run: Run


def _anywhere(device_type: str) -> str | None:
    return None


DEQUANTIZE_4BIT: Mapping[str, Kernel[Dequantize4bit]] = {
    "bitsandbytes": Kernel("bitsandbytes", bnb.can_run, bnb.dequantize_4bit),
    "reference": Kernel("reference", _anywhere, dequantize_4bit_reference),
}
LINEAR_8BIT: Mapping[str, Kernel[Linear8bit]] = {
    "bitsandbytes": Kernel("bitsandbytes", bnb.can_run, bnb.linear_8bit),
    "reference": Kernel("reference", _anywhere, linear_8bit_reference),
}
"""Of each operation the fastest first: `auto` takes the first that can run."""


def choose(kernels: Mapping[str, Kernel[Run]], wanted: str, device_type: str) -> tuple[Kernel[Run], str]:
    """The kernel and why it was chosen; raises ConfigError where the one asked for cannot run."""
    reasons: dict[str, str | None] = {name: kernel.can_run(device_type) for name, kernel in kernels.items()}
    if wanted != "auto":
        if wanted not in kernels:
            raise ConfigError(f"quant.kernel={wanted} cannot run this format; choose one of {', '.join(kernels)}")
        if reasons[wanted] is not None:
            raise ConfigError(f"quant.kernel={wanted} cannot run here: {reasons[wanted]}; choose quant.kernel=auto")
        return kernels[wanted], "asked for"
    name = next(name for name, reason in reasons.items() if reason is None)
    return kernels[name], f"fastest that runs on {device_type}"
