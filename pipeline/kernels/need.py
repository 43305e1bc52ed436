"""What a kernel is asked to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Hands on what is to be done, one by one, to whoever shows or stops it; `iter` does neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Weights of `bits` bits in groups of `group_size` inputs, on a device, multiplied in a dtype.

    `capability` is CUDA's compute capability, None elsewhere; `shape` is (N, K), outputs and inputs. Few kernels
    ask for `zeros_mode` (none, original, rescale: see `BitblasWeight`) and safetensors' `scale_dtype`.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    bits: int = 4
    group_size: int = 64
    shape: tuple[int, int] = (0, 0)
    zeros_mode: str = "original"
    scale_dtype: str = "F16"
