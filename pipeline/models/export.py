"""A checkpoint quantized and written again, tensor by tensor: what bitsandbytes and transformers would save."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.kernels.need import Progress
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.loader import (
    Load,
    build_skeleton,
    is_quantized_in_flight,
    plan_loads,
    read_weight,
    unused_tensors,
)
from pipeline.models.memory import give_back_freed_memory
from pipeline.models.shards import ShardWriter, entry_bytes
from pipeline.quant.bnb_save import saved_config, saved_tensors
from pipeline.quant.bnb_spec import BnbSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pipeline.quant.format import StorageFormat

LONGEST_LEAF = "weight.quant_state.bitsandbytes__nf4"
MOST_LEAVES = 6


def write_quantized(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    quant: StorageFormat,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    *,
    trust_remote_code: bool = False,
    progress: Progress = iter,
    shard_bytes: int,
) -> tuple[str, ...]:
    """Quantize on the device and write weights and config.json to an empty folder.

    The Linears that `load_model` would quantize in flight come out as it would have them. Holds a tensor at a time.
    Returns the names of tensors that the model has no place for, which are left out. Raises ConfigError on a bad
    checkpoint.
    """
    assert isinstance(quant.spec, BnbSpec)
    model = build_skeleton(config, dtype, trust_remote_code)
    loads = plan_loads(checkpoint, model, None)
    _refuse_holes(checkpoint, model, loads)
    room = sum(entry_bytes(f"{load.path}.{LONGEST_LEAF}") * MOST_LEAVES for load in loads)
    with ShardWriter(folder, room, shard_bytes) as writer:
        for load in progress(loads):
            for name, tensor in _converted(load, model, quant, dtype, device):
                writer.add(name, tensor)
            give_back_freed_memory()
    _write_config(checkpoint, saved_config(quant.spec, dtype, _unquantized(model, quant.spec)), dtype, folder)
    return unused_tensors(checkpoint, loads)


def _converted(
    load: Load, model: nn.Module, quant: StorageFormat, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """A load's tensors as they are stored: quantized, or as they are in the model's dtype."""
    leaf, weight = read_weight(load, model, dtype, device)
    if leaf == "weight" and is_quantized_in_flight(model, load.path, quant.spec):
        packed = quant.quantize(weight, None).weight
        for name, tensor in saved_tensors(packed, dtype).items():  # type: ignore[arg-type]  # bitsandbytes' two kinds
            yield f"{load.path}.{name}", tensor
    else:
        yield f"{load.path}.{leaf}", weight


def _refuse_holes(checkpoint: Checkpoint, model: nn.Module, loads: list[Load]) -> None:
    model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    there = {f"{load.path}.{leaf}" for load in loads for leaf in load.tensors}
    parameters: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    missing = [names[0] for names in parameters.values() if there.isdisjoint(names)]
    if missing:
        raise ConfigError(f"model.path={checkpoint.name} lacks tensor {missing[0]}; fetch the checkpoint again")


def _unquantized(model: nn.Module, spec: BnbSpec) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_quantized_in_flight(model, name, spec)
    ]


def _write_config(checkpoint: Checkpoint, quantization: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    names = [name for name in ("dtype", "torch_dtype") if name in checkpoint.config] or ["dtype"]
    config = {**checkpoint.config, **dict.fromkeys(names, str(dtype).removeprefix("torch."))}
    content = json.dumps({**config, "quantization_config": quantization}, indent=2)
    (folder / "config.json").write_text(content + "\n", encoding="utf-8")
