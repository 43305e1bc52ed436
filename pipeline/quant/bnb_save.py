"""bitsandbytes weights as tensors of a checkpoint, the way bitsandbytes and transformers save them (`bnb_state.py`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.linear8bit import Int8Weight
from pipeline.kernels.packed4bit import CODES, Packed4bit
from pipeline.quant.bnb_spec import BnbSpec
from pipeline.quant.bnb_state import STATE
from pipeline.quant.spec import DEFAULT_THRESHOLD

ALIGNMENT = 8


def saved_tensors(weight: Packed4bit | Int8Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight quantized from `dtype`, by what follows the module's path."""
    if isinstance(weight, Int8Weight):
        row_major = torch.zeros((), dtype=torch.uint8)
        return {"weight": weight.codes_NK, "SCB": weight.scales_N, "weight_format": row_major}
    leaves = {
        "weight": weight.packed.reshape(-1, 1),
        "weight.absmax": weight.absmax,
        "weight.quant_map": torch.tensor(CODES[weight.quant_type], dtype=torch.float32),
    }
    if weight.nested is not None:
        leaves |= {"weight.nested_absmax": weight.nested.absmax, "weight.nested_quant_map": weight.nested.code}
    return leaves | {f"{STATE}{weight.quant_type}": _state(weight, dtype)}


def _state(weight: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The values that are no tensors as JSON bytes, uint8; blanks at its end keep what follows in a file aligned."""
    values: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested is not None:
        values |= {
            "nested_blocksize": weight.nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": float(weight.nested.offset),
        }
    content = json.dumps(values).encode()
    return torch.tensor(list(content.ljust(-(-len(content) // ALIGNMENT) * ALIGNMENT)), dtype=torch.uint8)


def saved_config(spec: BnbSpec, dtype: torch.dtype, unquantized: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of transformers' BitsAndBytesConfig; `unquantized` are the paths of the other Linears.

    Whole paths mean the same modules to every reader, whichever way it matches names.
    """
    return {
        "_load_in_4bit": spec.bits == 4,
        "_load_in_8bit": spec.bits == 8,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": spec.quant_type or "fp4",
        "bnb_4bit_use_double_quant": spec.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(unquantized),
        "llm_int8_threshold": spec.int8_threshold if spec.bits == 8 else DEFAULT_THRESHOLD,
        "load_in_4bit": spec.bits == 4,
        "load_in_8bit": spec.bits == 8,
        "quant_method": "bitsandbytes",
    }
