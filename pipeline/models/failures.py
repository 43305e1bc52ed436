"""What a device's failures mean to whoever runs the job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pipeline.console import size_text
from pipeline.errors import RunFailed
from pipeline.models.memory import free_bytes

if TYPE_CHECKING:
    from pipeline.models.runtime import Runtime

NO_MEMORY_ON_CPU = "DefaultCPUAllocator"
"""torch raises a plain RuntimeError there, whose message names its allocator."""


@contextmanager
def failing_device(runtime: Runtime) -> Iterator[None]:
    """Turn a device's lack of memory, or its failure, into RunFailed with what to do about it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise RunFailed(_no_memory(runtime, runtime.device)) from error
        if isinstance(error, MemoryError) or NO_MEMORY_ON_CPU in str(error):
            raise RunFailed(_no_memory(runtime, torch.device("cpu"))) from error
        if isinstance(error, torch.AcceleratorError):
            raise RunFailed(
                f"{runtime.device} failed ({_first_line(error)}); what is committed stays: run the same command again, "
                "on another device if it fails again"
            ) from error
        raise


def _no_memory(runtime: Runtime, where: torch.device) -> str:
    """`where` is the model's device, or this machine, which has less to do with the model's shapes."""
    name = "this machine" if where.type == "cpu" else str(where)
    free = f"{name} is out of memory: {size_text(free_bytes(where))} are free there now"
    again = f"let other processes leave {name} and run the same command again (what is committed stays)"
    if where.type != runtime.device.type:
        return f"{free}; {again}, or begin another output.dir with a smaller data.chunk_rows"
    shapes = runtime.shapes
    slots, longest = sum(c.slots for c in shapes.length_classes), shapes.max_len
    remedies = [again]
    if runtime.memory.dequant_cache_budget:
        remedies.append("or add quant.dequant_cache=off, which changes no result")
    remedies.append("or begin another output.dir with a smaller engine.slots or engine.max_len")
    return (
        f"{free}, and keys and values of {slots} slots of up to {longest} tokens alone take "
        f"{size_text(shapes.kv_bytes)}; " + ", ".join(remedies)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
