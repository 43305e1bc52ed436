"""Where the model runs, in which dtype, and how the device's memory is shared out."""

from __future__ import annotations

import ctypes
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.plan import (
    CUDA_SLOTS,
    GIB,
    PREFIX_TOKENS,
    ROW_MULTIPLE,
    EnginePlan,
    EngineSettings,
    ModelGeometry,
    largest_pass,
    longest_rows,
    plan_engine,
)
from pipeline.errors import ConfigError
from pipeline.launch.place import ALONE, Place, device_index
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.inventory import list_items
from pipeline.quant.spec import QuantSettings, QuantSpec
from pipeline.settings import ModelSettings

if TYPE_CHECKING:
    import torch

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a value in each dtype that a model may run in."""
AUTO_SHARE = 0.85
"""Share of the memory free at the start that `model.memory=auto` takes."""
CACHE_SHARE = 0.5
"""Share of what weights and passes leave that dequantized weights may take before keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of the device: what is there, and what takes it. the last two are budgets and may stay unused."""

    budget: int
    weights: int
    passes: int
    kv_cache_budget: int
    dequant_cache_budget: int

    def as_dict(self) -> dict[str, Any]:
        """JSON form, in bytes."""
        return asdict(self)


def resolve_device(settings: ModelSettings, place: Place = ALONE) -> torch.device:
    """The device asked for, or CUDA where there is one, by turns; raises ConfigError if it is not there.

    On CUDA, products in float32 are not rounded from then on. In NVIDIA's containers TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    cuts factors to 11 bits, among them positions where transformers multiplies those into RoPE's angles.
    """
    import torch

    wanted = settings.device
    if wanted == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        wanted = f"cuda:{device_index(place, torch.cuda.device_count())}"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device={wanted}, but this machine shows {torch.cuda.device_count()} CUDA devices; "
            "use model.device=cpu or auto"
        )
    if device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    return device


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA's compute capability (9, 0 for an H100); None for other devices."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def dtype_name(settings: ModelSettings, checkpoint: Checkpoint) -> str:
    """The dtype asked for, or the checkpoint's own; raises ConfigError on one the checkpoint misnames."""
    name = settings.dtype
    if name == "auto":
        name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    if name not in ITEMSIZES:
        raise ConfigError(f"model.dtype={settings.dtype}: the checkpoint says {name}; set model.dtype=bfloat16")
    return name


def resolve_dtype(settings: ModelSettings, checkpoint: Checkpoint) -> torch.dtype:
    """torch's dtype of `dtype_name`."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name(settings, checkpoint))
    return dtype


def memory_budget(settings: ModelSettings, device: torch.device, place: Place) -> int:
    """Bytes the process may take: `model.memory`, or a share of what is free now."""
    if settings.memory_gib is not None:
        return int(settings.memory_gib * GIB)
    processes = place.local_count if device.type == "cpu" else 1  # GPUs have one process each
    return int(free_bytes(device) * AUTO_SHARE / processes)


def free_bytes(device: torch.device) -> int:
    """Bytes of the device's memory, or of what this machine or its control group leaves, that nobody uses now."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a model needs to know of its device before its memory is shared out."""

    checkpoint: Checkpoint
    geometry: ModelGeometry
    spec: QuantSpec
    dtype: torch.dtype
    device_type: str
    budget: int
    dense_product: bool = True
    adapter_bytes: int = 0


def plan_shapes(
    place: Placement,
    engine: EngineSettings,
    quant: QuantSettings,
    model_max_len: int | None,
    *,
    stops_at_length: bool = False,
) -> tuple[EnginePlan, MemoryPlan]:
    """The engine's shapes and the shares of memory; raises ConfigError with sizes and remedy if nothing fits.

    `stops_at_length` is what the kernel of attention does at a row's end (see `plan_engine`).

    Where no length is asked for, shorter ones are tried until keys and values fit beside the dequantized weights, and
    then until they fit without them.
    """
    lengths = longest_rows(place.geometry, engine, model_max_len)
    for gives_way in (False, True):
        for longest in lengths:
            try:
                memory, is_short = _share_out(place, engine, quant, longest)
                if is_short and not gives_way:
                    continue
                shapes = plan_engine(
                    place.geometry,
                    engine,
                    longest=longest,
                    device_type=place.device_type,
                    kv_budget_bytes=memory.kv_cache_budget,
                    kv_itemsize=place.dtype.itemsize,
                    stops_at_length=stops_at_length,
                )
            except ConfigError:
                if gives_way and longest == lengths[-1]:
                    raise
                continue
            return shapes, memory
    raise AssertionError("there is at least one length to try")


def plan_memory(place: Placement, engine: EngineSettings, quant: QuantSettings, longest: int) -> MemoryPlan:
    """Share out the budget; raises ConfigError naming both sizes if not even the weights fit.

    `kv_cache_budget` is what keys and values may take: what weights, one pass and dequantized weights leave; on CUDA
    also a decode step, which keeps its memory once it is captured. Dequantized weights only save time: unless they are
    asked for, the fewest slots, or those that are asked for, come first.
    """
    return _share_out(place, engine, quant, longest)[0]


def _share_out(place: Placement, engine: EngineSettings, quant: QuantSettings, longest: int) -> tuple[MemoryPlan, bool]:
    """See `plan_memory`; and whether there is so little memory that dequantized weights had to give way."""
    weights, dense = weight_bytes(
        place.checkpoint, place.spec, place.dtype, place.device_type, dense_product=place.dense_product
    )
    tokens, logits = largest_pass(engine, longest, place.device_type)
    passes = pass_bytes(place.geometry, tokens, logits, place.dtype)
    if engine.share_prefix is not None:
        passes += PREFIX_TOKENS * place.geometry.kv_bytes_per_token(place.dtype.itemsize)
    if place.device_type == "cuda":
        slots = engine.slots or CUDA_SLOTS
        passes += pass_bytes(place.geometry, slots, slots, place.dtype)
    if place.adapter_bytes:
        weights += place.adapter_bytes
        passes += adapter_pass_bytes(place.geometry, tokens, logits)
    rest = place.budget - weights - passes
    if rest <= 0:
        raise ConfigError(
            f"model.path={place.checkpoint.name} takes {weights / GIB:.2f} GiB as {place.spec.describe()} weights and "
            f"{passes / GIB:.2f} GiB for a pass, but the device has {place.budget / GIB:.2f} GiB (model.memory); "
            "quantize it (quant=bnb), lower engine.prefill_tokens, or take a larger device"
        )
    cache = _cache_budget(quant, dense, rest)
    least = _least_kv_bytes(place, engine, longest)
    is_short = quant.dequant_cache_gib is None and rest - cache < least
    if is_short:
        cache = max(0, min(cache, rest - least))
    plan = MemoryPlan(
        budget=place.budget, weights=weights, passes=passes, kv_cache_budget=rest - cache, dequant_cache_budget=cache
    )
    return plan, is_short


def _least_kv_bytes(place: Placement, engine: EngineSettings, longest: int) -> int:
    """Bytes of the keys and values of as few slots as rows of that length can do with, or of those asked for."""
    fewest = replace(engine, slots=engine.slots or ROW_MULTIPLE)
    itemsize, anything = place.dtype.itemsize, 1 << 62
    return plan_engine(
        place.geometry,
        fewest,
        longest=longest,
        device_type=place.device_type,
        kv_budget_bytes=anything,
        kv_itemsize=itemsize,
    ).kv_bytes


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


def weight_bytes(
    checkpoint: Checkpoint, spec: QuantSpec, dtype: torch.dtype, device_type: str, *, dense_product: bool = True
) -> tuple[int, int]:
    """Bytes of the weights once loaded, and those of the quantized Linears if they were dequantized.

    Without a `dense_product` dequantized weights would not be used, and count nothing.
    """
    items = list_items(checkpoint, spec, dtype.itemsize)
    total = sum(item.resident_bytes for item in items)
    dense = sum(item.values for item in items if item.quantized)
    dense_bytes = dense * dtype.itemsize if dense_product else 0
    return total + _head_copy_bytes(checkpoint, dtype, device_type), dense_bytes


def _head_copy_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device_type: str) -> int:
    """The float32 copy of the output head (or of the embedding it is tied to) that a CPU keeps."""
    if device_type != "cpu" or dtype.itemsize == 4:
        return 0
    heads = [i for i in checkpoint.tensors.values() if len(i.shape) == 2 and ("embed" in i.name or "head" in i.name)]
    return max((math.prod(info.shape) * 4 for info in heads), default=0)


def pass_bytes(geometry: ModelGeometry, tokens: int, logit_rows: int, dtype: torch.dtype) -> int:
    """A generous estimate of what one pass holds at a time: activations of a layer, and float32 logits."""
    activations = tokens * (3 * geometry.intermediate + 8 * geometry.hidden) * dtype.itemsize
    return activations + 3 * logit_rows * geometry.vocab * 4


def adapter_pass_bytes(geometry: ModelGeometry, tokens: int, logit_rows: int) -> int:
    """What an adapter's float32 copy of a Linear's inputs, its update and their sum add to a pass."""
    return 4 * (tokens * (geometry.hidden + 2 * geometry.intermediate) + 2 * logit_rows * geometry.vocab)


def give_back_freed_memory() -> None:
    """Let the C library return to the system what has been freed to it, where it can (glibc).

    Loading frees many large temporaries between weights that stay; without this their holes would add up.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(device: torch.device) -> int:
    """The most memory the process has held: of the device on CUDA, resident on CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
