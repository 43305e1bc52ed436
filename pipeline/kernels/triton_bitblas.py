"""Weights in BitBLAS' layout in Triton: dequantized for a dense product, or multiplied as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.need import Need
from pipeline.kernels.packed_bitblas import BitblasWeight
from pipeline.kernels.triton_launch import Launch, cover, obstacle, start
from pipeline.kernels.triton_tiles import BLOCK_K, BLOCK_M, BLOCK_N, DENSE_N, DENSE_WARPS, ONE_GROUP, WARPS, linear_tile

BITS = (2, 4, 8)


def can_run(need: Need) -> str | None:
    """Why Triton cannot run weights in BitBLAS' layout here, or None if it can."""
    return obstacle(need, BITS)


def can_run_linear(need: Need) -> str | None:
    """Why Triton cannot multiply weights in BitBLAS' layout as they are, or None if it can."""
    if need.bits in BITS and need.group_size % fields_of(need.bits):
        return (
            f"Triton products with {need.bits} bits need groups of a multiple of {fields_of(need.bits)} inputs, "
            f"not of {need.group_size}"
        )
    return can_run(need)


def dequantize(weight: BitblasWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: the bits of `dequantize_bitblas_reference`."""
    out_NK = torch.empty(weight.shape, dtype=dtype, device=weight.codes_NB.device)
    start(dequantize_launch(weight, out_NK))
    return out_NK


def linear(x_MK: Tensor, weight: BitblasWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, [M, N] in x's dtype, with W rounded to it and sums in float32; for few rows."""
    packed_MK = x_MK if weight.order_K is None else x_MK[:, weight.order_K]
    fields = fields_of(weight.bits)
    x_MFU = packed_MK.reshape(x_MK.shape[0], weight.shape[1] // fields, fields).transpose(1, 2).contiguous()
    out_MN = x_MK.new_empty(x_MK.shape[0], weight.shape[0])
    start(linear_launch(x_MFU, weight, bias_N, out_MN))
    return out_MN


def fields_of(bits: int) -> int:
    """Codes in a unit: in a word, for 8 bits in a byte."""
    return 1 if bits == 8 else 32 // bits


def dequantize_launch(weight: BitblasWeight, out_NK: Tensor) -> Launch:
    """What writes the weight to `out_NK`."""
    from pipeline.kernels.triton_code.bitblas import dequantize_bitblas

    outputs, inputs = weight.shape
    arguments = {**_arguments(weight), "order_ptr": weight.order_K, "out_ptr": out_NK}
    constants = {**_format(weight), "BLOCK_N": DENSE_N, "BLOCK_U": BLOCK_K // fields_of(weight.bits)}
    grid = (cover(inputs, BLOCK_K), cover(outputs, DENSE_N))
    return Launch(function=dequantize_bitblas, arguments=arguments, constants=constants, grid=grid, warps=DENSE_WARPS)


def linear_launch(x_MFU: Tensor, weight: BitblasWeight, bias_N: Tensor | None, out_MN: Tensor) -> Launch:
    """What writes x W^T + b to `out_MN`; x by fields, its inputs in the packed order."""
    from pipeline.kernels.triton_code.bitblas import linear_bitblas

    rows, fields, units = x_MFU.shape
    tile = linear_tile(x_MFU, unit_bytes=fields * weight.bits // 8)
    return Launch(
        function=linear_bitblas,
        arguments={"x_ptr": x_MFU, **_arguments(weight), "bias_ptr": bias_N, "out_ptr": out_MN, "M": rows},
        constants={**_format(weight), **tile.constants(units)},
        grid=(cover(rows, tile.row_tiles * BLOCK_M), cover(weight.shape[0], BLOCK_N)),
        warps=WARPS,
        stages=tile.stages,
    )


def _arguments(weight: BitblasWeight) -> dict[str, Tensor | int | None]:
    codes = weight.codes_NB.view(torch.int8 if weight.bits == 8 else torch.int32)
    return {
        "units_ptr": codes,
        "scales_ptr": weight.scales_NG,
        "zeros_ptr": weight.zeros_NG,
        "N": weight.shape[0],
        "U": codes.shape[1],
        "G": weight.scales_NG.shape[1],
    }


def _format(weight: BitblasWeight) -> dict[str, int | str]:
    """Without zeros codes are centred; signed bytes are read as their code less 128 either way."""
    centred = weight.zeros_NG is None or weight.bits == 8
    return {
        "BITS": weight.bits,
        "FIELDS": fields_of(weight.bits),
        "GROUP_SIZE": ONE_GROUP if weight.scales_NG.shape[1] == 1 else weight.group_size,
        "ZEROS": "none" if weight.zeros_NG is None else weight.zeros_mode,
        "OFFSET": 1 << (weight.bits - 1) if centred else 0,
    }
