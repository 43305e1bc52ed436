"""GPTQ weights in Triton: dequantized for a dense product, or multiplied as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.need import Need
from pipeline.kernels.packed_gptq import WORD_BITS, GptqWeight
from pipeline.kernels.triton_launch import Launch, cover, obstacle, start
from pipeline.kernels.triton_tiles import BLOCK_K, BLOCK_M, BLOCK_N, DENSE_N, DENSE_WARPS, ONE_GROUP, WARPS, linear_tile

BITS = (2, 3, 4, 8)
LINEAR_BITS = (2, 4, 8)


def can_run(need: Need) -> str | None:
    """Why Triton cannot dequantize GPTQ weights here, or None if it can."""
    if need.bits == 3 and need.shape[1] % WORD_BITS:
        return f"Triton kernels for 3 bits need inputs in multiples of {WORD_BITS}, not {need.shape[1]}"
    return obstacle(need, BITS)


def can_run_linear(need: Need) -> str | None:
    """Why Triton cannot multiply GPTQ weights as they are, or None if it can; codes of 3 bits cross words."""
    return obstacle(need, LINEAR_BITS)


def dequantize(weight: GptqWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: the bits of `dequantize_gptq_reference`."""
    out_NK = torch.empty(weight.shape, dtype=dtype, device=weight.words_WN.device)
    start(dequantize_launch(weight, out_NK))
    return out_NK


def linear(x_MK: Tensor, weight: GptqWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, [M, N] in x's dtype, with W rounded to it and sums in float32; for few rows."""
    fields = fields_of(weight.bits)
    x_MFU = x_MK.reshape(x_MK.shape[0], weight.shape[1] // fields, fields).transpose(1, 2).contiguous()
    out_MN = x_MK.new_empty(x_MK.shape[0], weight.shape[0])
    start(linear_launch(x_MFU, weight, bias_N, out_MN))
    return out_MN


def fields_of(bits: int) -> int:
    """Codes in a unit: in a word, for 3 bits in three."""
    return WORD_BITS if bits == 3 else WORD_BITS // bits


def dequantize_launch(weight: GptqWeight, out_NK: Tensor) -> Launch:
    """What writes the weight to `out_NK`."""
    from pipeline.kernels.triton_code.gptq import dequantize_gptq

    outputs, inputs = weight.shape
    fields = fields_of(weight.bits)
    arguments = {**_arguments(weight, fields), "out_ptr": out_NK}
    constants = {**_format(weight, fields), "BLOCK_N": DENSE_N, "BLOCK_U": BLOCK_K // fields}
    grid = (cover(inputs, BLOCK_K), cover(outputs, DENSE_N))
    return Launch(function=dequantize_gptq, arguments=arguments, constants=constants, grid=grid, warps=DENSE_WARPS)


def linear_launch(x_MFU: Tensor, weight: GptqWeight, bias_N: Tensor | None, out_MN: Tensor) -> Launch:
    """What writes x W^T + b to `out_MN`; x by fields."""
    from pipeline.kernels.triton_code.gptq import linear_gptq

    rows, fields, units = x_MFU.shape
    tile = linear_tile(x_MFU, unit_bytes=fields * weight.bits // 8)
    half = x_MFU.dtype == weight.scales_GN.dtype == torch.float16
    return Launch(
        function=linear_gptq,
        arguments={"x_ptr": x_MFU, **_arguments(weight, fields), "bias_ptr": bias_N, "out_ptr": out_MN, "M": rows},
        constants={**_format(weight, fields), **tile.constants(units), "HALF": half},
        grid=(cover(rows, tile.row_tiles * BLOCK_M), cover(weight.shape[0], BLOCK_N)),
        warps=WARPS,
        stages=tile.stages,
    )


def _arguments(weight: GptqWeight, fields: int) -> dict[str, Tensor | int | None]:
    """The group of each input is read only where groups are not whole units in order."""
    per_input = weight.act_order or (weight.scales_GN.shape[0] > 1 and weight.group_size % fields)
    return {
        "words_ptr": weight.words_WN,
        "zeros_ptr": weight.zeros_GN,
        "scales_ptr": weight.scales_GN,
        "group_ptr": weight.group_K if per_input else None,
        "N": weight.shape[0],
        "U": weight.shape[1] // fields,
    }


def _format(weight: GptqWeight, fields: int) -> dict[str, int]:
    group_size = ONE_GROUP if weight.scales_GN.shape[0] == 1 else weight.group_size
    return {"BITS": weight.bits, "FIELDS": fields, "GROUP_SIZE": group_size}
