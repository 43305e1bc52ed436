"""Where the model runs, in which dtype, and how the device's memory is shared out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.plan import GIB, ModelGeometry
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import Checkpoint
from pipeline.quant.spec import QuantSettings, QuantSpec
from pipeline.settings import ModelSettings

if TYPE_CHECKING:
    import torch

AUTO_SHARE = 0.85
"""Share of the memory free at the start that `model.memory=auto` takes."""
CACHE_SHARE = 0.5
"""Share of what weights and passes leave that dequantized weights may take before keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of the device: what is there, and what takes it. `dequant_cache` is a budget, it may stay unused."""

    budget: int
    weights: int
    passes: int
    kv_cache: int
    dequant_cache: int

    def as_dict(self) -> dict[str, Any]:
        """JSON form, in bytes."""
        return asdict(self)


def resolve_device(settings: ModelSettings) -> torch.device:
    """The device asked for, or CUDA where there is one; raises ConfigError if it is not there."""
    import torch

    wanted = settings.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device={wanted}, but this machine shows {torch.cuda.device_count()} CUDA devices; "
            "use model.device=cpu or auto"
        )
    return device


def resolve_dtype(settings: ModelSettings, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype asked for, or the checkpoint's own; raises ConfigError on one the checkpoint misnames."""
    import torch

    name = settings.dtype
    if name == "auto":
        name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)
    if dtype is None:
        raise ConfigError(f"model.dtype={settings.dtype}: the checkpoint says {name}; set model.dtype=bfloat16")
    return dtype


def memory_budget(settings: ModelSettings, device: torch.device) -> int:
    """Bytes the run may take: `model.memory`, or a share of what is free now."""
    if settings.memory_gib is not None:
        return int(settings.memory_gib * GIB)
    return int(_free_bytes(device) * AUTO_SHARE)


def _free_bytes(device: torch.device) -> int:
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _cgroup_free_bytes())


def _cgroup_free_bytes() -> int:
    """What the control group (a container, a Slurm job) still allows, or no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = Path("/sys/fs/cgroup", limit_name), Path("/sys/fs/cgroup", used_name)
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            return max(0, int(text) - int(used.read_text()))
    return 1 << 62


def plan_memory(
    checkpoint: Checkpoint,
    spec: QuantSpec,
    settings: QuantSettings,
    geometry: ModelGeometry,
    dtype: torch.dtype,
    *,
    budget: int,
    pass_tokens: int,
    logit_rows: int,
) -> MemoryPlan:
    """Share out the budget; raises ConfigError naming both sizes if not even the weights fit.

    `kv_cache` is what keys and values may take: what weights, one pass and dequantized weights leave.
    """
    weights, dense = weight_bytes(checkpoint, spec, dtype)
    passes = pass_bytes(geometry, pass_tokens, logit_rows, dtype)
    rest = budget - weights - passes
    if rest <= 0:
        raise ConfigError(
            f"model.path={checkpoint.name} takes {weights / GIB:.2f} GiB as {spec.describe()} weights and "
            f"{passes / GIB:.2f} GiB for a pass, but the device has {budget / GIB:.2f} GiB (model.memory); "
            "quantize it (quant=bnb), lower engine.prefill_tokens, or take a larger device"
        )
    cache = _cache_budget(settings, dense, rest)
    return MemoryPlan(budget=budget, weights=weights, passes=passes, kv_cache=rest - cache, dequant_cache=cache)


def _cache_budget(settings: QuantSettings, dense: int, rest: int) -> int:
    if settings.dequant_cache_gib is None:
        return min(dense, int(rest * CACHE_SHARE))
    wanted = min(dense, int(settings.dequant_cache_gib * GIB))
    if wanted > rest:
        raise ConfigError(
            f"quant.dequant_cache={settings.dequant_cache_gib} GiB, but only {rest / GIB:.2f} GiB are left; "
            "use quant.dequant_cache=auto or off"
        )
    return wanted


def weight_bytes(checkpoint: Checkpoint, spec: QuantSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights once loaded, and those of the quantized Linears if they were dequantized."""
    total = dense = 0
    for info in checkpoint.tensors.values():
        count = math.prod(info.shape)
        module = info.name.removesuffix(".weight")
        linear = len(info.shape) == 2 and not any(part in module for part in ("embed", "lm_head", "wte"))
        if spec.quantized and linear and not spec.skips(module):
            total += int(count * spec.bytes_per_weight)
            dense += count * dtype.itemsize
        else:
            total += count * dtype.itemsize
    return total, dense


def pass_bytes(geometry: ModelGeometry, tokens: int, logit_rows: int, dtype: torch.dtype) -> int:
    """A generous estimate of what one pass holds at a time: activations of a layer, and float32 logits."""
    activations = tokens * (3 * geometry.intermediate + 8 * geometry.hidden) * dtype.itemsize
    return activations + 3 * logit_rows * geometry.vocab * 4


def peak_bytes(device: torch.device) -> int:
    """The most memory the process has held: of the device on CUDA, resident on CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
