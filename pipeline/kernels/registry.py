"""Which kernels exist for which weight format, and why one cannot run; kernels know nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import bnb
from pipeline.kernels.packed4bit import Packed4bit, dequantize_4bit_reference


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an operation.

    `can_run(device_type)` answers with the reason why not, or None; `run` dequantizes a packed weight.
    """

    name: str
    can_run: Callable[[str], str | None]
    run: Callable[[Packed4bit, torch.dtype], Tensor]


DEQUANTIZE_4BIT: Mapping[str, Kernel] = {
    "bitsandbytes": Kernel("bitsandbytes", bnb.can_run, bnb.dequantize_4bit),
    "reference": Kernel("reference", lambda device_type: None, dequantize_4bit_reference),
}
"""Fastest first: `auto` takes the first that can run."""


def choose(kernels: Mapping[str, Kernel], wanted: str, device_type: str) -> tuple[Kernel, str]:
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
