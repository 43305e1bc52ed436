"""What a kernel is asked to run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Weights of `bits` bits in groups of `group_size` inputs, on a device, multiplied in a dtype.

    `capability` is CUDA's compute capability, None elsewhere; `shape` is (N, K), outputs and inputs.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    bits: int = 4
    group_size: int = 64
    shape: tuple[int, int] = (0, 0)
