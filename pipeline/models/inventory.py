"""What a checkpoint consists of, Linear by Linear and tensor by tensor, from its headers alone. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.models.checkpoint import Checkpoint, TensorInfo
from pipeline.quant.spec import QuantSpec

NOT_QUANTIZED = ("embed", "lm_head", "wte")
"""Parts of the names of matrices that are never quantized in flight: embeddings and the output head."""
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A quantized Linear by its path, or another tensor by its name.

    `values` are its weights; `disk_bytes` what its tensors take on disk and `resident_bytes` once loaded.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    quantized: bool
    disk_bytes: int
    resident_bytes: int

    @property
    def values(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Items that differ in nothing but the layer; bytes are those of all of them."""

    name: str
    count: int
    format: str
    shape: tuple[int, ...]
    disk_bytes: int
    resident_bytes: int


def list_items(checkpoint: Checkpoint, spec: QuantSpec, itemsize: int) -> list[Item]:
    """Everything the checkpoint holds, as `spec` has it loaded in a dtype of so many bytes; in the order of the files.

    Raises ConfigError on a broken checkpoint.
    """
    modules = {
        f"{module.path}.{leaf}": module for module in spec.stored_modules(checkpoint.tensors) for leaf in module.leaves
    }
    items: dict[str, Item] = {}
    for info in checkpoint.tensors.values():
        module = modules.get(info.name)
        if module is None:
            items[info.name] = _of_tensor(info, spec, itemsize)
        elif module.path not in items:
            items[module.path] = Item(
                name=module.path,
                format=spec.describe_module(module),
                shape=module.shape,
                quantized=True,
                disk_bytes=sum(checkpoint.tensors[f"{module.path}.{leaf}"].num_bytes for leaf in module.leaves),
                resident_bytes=module.num_bytes,
            )
    return list(items.values())


def _of_tensor(info: TensorInfo, spec: QuantSpec, itemsize: int) -> Item:
    """An unquantized tensor; matrices that are Linears' by their name are quantized in flight."""
    path = info.name.removesuffix(".weight")
    linear = len(info.shape) == 2 and not any(part in path for part in NOT_QUANTIZED)
    in_flight = spec.quantized and not spec.stored and linear and not spec.skips(path)
    return Item(
        name=path if in_flight else info.name,
        format=spec.describe_in_flight() if in_flight else DTYPES.get(info.dtype, info.dtype),
        shape=info.shape,
        quantized=in_flight,
        disk_bytes=info.num_bytes,
        resident_bytes=spec.in_flight_bytes(info.shape) if in_flight else math.prod(info.shape) * itemsize,
    )


def group_by_kind(items: Sequence[Item]) -> list[Kind]:
    """Items alike but for their layer's number, which becomes * or, where a name has several kinds, its ranges."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Item]] = {}
    for item in items:
        groups.setdefault((NUMBER.sub("*", item.name), item.format, item.shape), []).append(item)
    names = [key[0] for key in groups]
    return [
        Kind(
            name=_ranged(pattern, found) if names.count(pattern) > 1 or len(found) == 1 else pattern,
            count=len(found),
            format=text,
            shape=shape,
            disk_bytes=sum(item.disk_bytes for item in found),
            resident_bytes=sum(item.resident_bytes for item in found),
        )
        for (pattern, text, shape), found in groups.items()
    ]


def _ranged(pattern: str, items: Sequence[Item]) -> str:
    """The pattern with the layers it stands for, as in model.layers.[0-3,7].mlp.up_proj."""
    if pattern.count("*") != 1:
        return items[0].name if len(items) == 1 else pattern
    numbers = sorted(int(match[0]) for item in items if (match := NUMBER.search(item.name)))
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    runs = [(numbers[first], numbers[end - 1]) for first, end in pairwise(breaks)]
    text = ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
    return pattern.replace("*", text if len(numbers) == 1 else f"[{text}]")
