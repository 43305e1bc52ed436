"""A saved bitsandbytes weight as its tensors' headers and its JSON state tell of it. No torch here.

Format (bitsandbytes' QuantState.as_dict and Linear8bitLt): of 4 bits "weight" holds the codes in any dtype,
"weight.absmax" the block maxima and "weight.quant_map" the code's values; with double quantization the maxima are
codes into "weight.nested_quant_map", in blocks with the scales "weight.nested_absmax". STATE + "nf4" or "fp4" has the
rest as JSON. Of 8 bits "weight" is int8 and "SCB" has a scale for each row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.quant.spec import TensorHeader

STATE = "weight.quant_state.bitsandbytes__"
"""Begins the name of the tensor that holds a 4-bit weight's other values as JSON bytes; the code's name follows."""
QUANT_TYPES = ("nf4", "fp4")
FLOATS = ("F16", "BF16", "F32", "F64")
NESTED_VALUES = 256


@dataclass(frozen=True, slots=True)
class State4bit:
    """The values of a 4-bit weight [N, K] that are no tensors; `nested_blocksize` 0 without double quantization."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @property
    def blocks(self) -> int:
        """How many block maxima there are."""
        return -(-self.shape[0] * self.shape[1] // self.blocksize)

    @property
    def nested_blocks(self) -> int:
        """How many scales the block maxima have."""
        return -(-self.blocks // self.nested_blocksize) if self.nested_blocksize else 0


def read_state(content: bytes) -> State4bit:
    """From the JSON bytes among the saved tensors; raises ConfigError saying that they are broken."""
    try:
        values = json.loads(content)
        rows, columns = (int(size) for size in values["shape"])
        state = State4bit(
            quant_type=values["quant_type"],
            blocksize=int(values["blocksize"]),
            shape=(rows, columns),
            nested_blocksize=int(values.get("nested_blocksize") or 0),
            nested_offset=float(values.get("nested_offset") or 0.0),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"its bitsandbytes 4-bit statistics are broken ({error!r})") from error
    if state.quant_type not in QUANT_TYPES or state.blocksize < 1 or state.nested_blocksize < 0 or min(state.shape) < 1:
        raise ConfigError(
            f"its bitsandbytes 4-bit statistics name code {state.quant_type}, blocksize {state.blocksize} and shape "
            f"{list(state.shape)}; supported are {' and '.join(QUANT_TYPES)} with sizes above 0"
        )
    return state


def check_4bit(found: Mapping[str, TensorHeader]) -> State4bit:
    """The state of a weight whose tensors, by leaf, are as many and of the kinds that it asks for; else ConfigError."""
    state_leaf = next((leaf for leaf in found if leaf.startswith(STATE)), None)
    if state_leaf is None:
        raise ConfigError(f"its bitsandbytes 4-bit statistics lack {STATE}nf4 or fp4")
    state = read_state(found[state_leaf].read())
    expected = {"weight": 0, "weight.absmax": state.blocks}
    if state.nested_blocksize:
        expected |= {"weight.nested_absmax": state.nested_blocks, "weight.nested_quant_map": NESTED_VALUES}
    for leaf, count in expected.items():
        header = found.get(leaf)
        if header is None:
            raise ConfigError(f"its bitsandbytes 4-bit statistics are there, but {leaf} is missing")
        if count and math.prod(header.shape) != count:
            raise ConfigError(f"its {leaf} has shape {list(header.shape)}, but has to hold {count} {_for(state)}")
    values = state.shape[0] * state.shape[1]
    if found["weight"].num_bytes != -(-values // 2):
        raise ConfigError(f"its weight has {found['weight'].num_bytes} bytes, not two codes in each {_for(state)}")
    maxima = "U8" if state.nested_blocksize else "a floating dtype"
    if (found["weight.absmax"].dtype in FLOATS) == bool(state.nested_blocksize):
        raise ConfigError(f"its weight.absmax is {found['weight.absmax'].dtype}, but has to be {maxima} {_for(state)}")
    return state


def _for(state: State4bit) -> str:
    return f"for a weight of {state.shape[0]} x {state.shape[1]} in blocks of {state.blocksize}"


def check_8bit(found: Mapping[str, TensorHeader]) -> tuple[int, int]:
    """(N, K) of a weight whose tensors, by leaf, fit each other; else ConfigError."""
    missing = [leaf for leaf in ("weight", "SCB") if leaf not in found]
    if missing:
        raise ConfigError(f"its bitsandbytes 8-bit weight lacks {missing[0]}")
    shape, scales = found["weight"].shape, math.prod(found["SCB"].shape)
    row_major = "weight_format" not in found or not any(found["weight_format"].read())
    if found["weight"].dtype != "I8" or len(shape) != 2 or scales != shape[0] or not row_major:
        raise ConfigError("its bitsandbytes 8-bit weight is not int8, row by row, with one scale a row")
    return shape[0], shape[1]
