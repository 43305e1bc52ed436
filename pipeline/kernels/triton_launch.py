"""One call of a Triton function, and where Triton can run. Triton is imported only once a kernel is asked for."""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.need import Need

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A call of `function`: its `arguments` and compile-time `constants` by name, and its grid.

    `warps` and `stages` are Triton's num_warps and num_stages: threads by 32, and loads under way at a time.
    """

    function: Any
    arguments: Mapping[str, Tensor | int | None]
    constants: Mapping[str, int | float | bool | str]
    grid: tuple[int, ...]
    warps: int
    stages: int = 1


def start(launch: Launch) -> None:
    """Run it on the device of its tensors.

    Products and sums are not fused into one rounding, so that the arithmetic is the references', bit for bit.
    """
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.function[launch.grid](
            **launch.arguments,
            **launch.constants,
            INTERPRETED=interpreting(),
            num_warps=launch.warps,
            num_stages=launch.stages,
            enable_fp_fusion=False,
        )


def interpreting() -> bool:
    """Whether Triton's interpreter, slow and on any device, takes the place of its compiler."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(need: Need, bits: tuple[int, ...]) -> str | None:
    """Why no Triton kernel of these bits can run, or None."""
    reason = place_obstacle(need.device_type, need.capability, need.dtype)
    if reason is None and need.bits not in bits:
        reason = f"there are Triton kernels for {', '.join(map(str, bits))} bits, not for {need.bits}"
    return reason or import_obstacle()


def place_obstacle(device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run on the device in the dtype, or None."""
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"Triton kernels run on cuda devices, not on {device_type}"
    if capability is not None and capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return f"Triton kernels need compute capability {least}, this device has {found}"
    if dtype not in DTYPES:
        return f"Triton kernels compute in float16, bfloat16 and float32, not in {dtype}".replace("torch.", "")
    return None


def import_obstacle() -> str | None:
    """Why Triton cannot be imported, or not compile, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the triton package cannot be imported ({error})"
    return None if interpreting() else build_obstacle()


def build_obstacle() -> str | None:
    """Why Triton cannot build the C code that starts its kernels, which it does on first use, or None.

    Images that are made to run programs only lack what it takes, and it would be noticed after the weights are loaded.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton starts its kernels by way of C code, and there is no compiler for it; install gcc or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own, as Triton takes it
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not (header.is_file() or os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")):
        return f"Triton starts its kernels by way of C code, which includes {header}; install Python's headers"
    return None


def passed_over(need: Need) -> str | None:
    """Why `auto` passes Triton kernels over although they could run, or None."""
    return "Triton's interpreter is slow, so it has to be asked for" if interpreting() else None


def cover(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)
