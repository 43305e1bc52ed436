"""BitBLAS' storage: checkpoints that have it, and GPTQ weights repacked for it at load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.packed_bitblas import (
    BitblasWeight,
    ZerosMode,
    pack_codes,
    straighten_ladder,
    unpack_zeros,
)
from pipeline.kernels.packed_gptq import GptqWeight
from pipeline.kernels.registry import Kernel
from pipeline.quant.bitblas_spec import TILE, ZEROS, BitblasSpec
from pipeline.quant.gptq import read_gptq
from pipeline.quant.gptq_spec import GptqSpec
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import StoredModule

BLOCK_WEIGHTS = 1 << 22
"""Weights unpacked at a time: loading takes little memory beside the packed ones."""
SIGN_8BIT = 128
"""Eight-bit codes are stored signed: less this."""


class NotRepackable(ConfigError):
    """A GPTQ weight that BitBLAS' layout cannot hold, though nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class BitblasFormat:
    """How the Linears of a BitBLAS checkpoint come about."""

    spec: BitblasSpec
    kernel: Kernel[BitblasWeight]

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Never asked for: a BitBLAS checkpoint's weights were quantized with calibration data."""
        raise AssertionError("BitBLAS weights are not made in flight")

    def restore(
        self, module: StoredModule, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """From "qweight", "scales" and, if there are any, "zeros" or "qzeros"."""
        return QuantLinear(read_bitblas(module, tensors, self.spec.code_dtype), bias, dtype, self.kernel)


@dataclass(frozen=True, slots=True)
class RepackedFormat:
    """How the Linears of a GPTQ checkpoint come about in BitBLAS' layout."""

    spec: GptqSpec
    kernel: Kernel[BitblasWeight]

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Never asked for: a GPTQ checkpoint's weights were quantized with calibration data."""
        raise AssertionError("GPTQ weights are not made in flight")

    def restore(
        self, module: StoredModule, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """From the tensors of GPTQ; raises NotRepackable for groups of unequal size."""
        weight = repack_gptq(read_gptq(module, tensors, self.spec.zeros_offset))
        return QuantLinear(weight, bias, dtype, self.kernel)


def read_bitblas(module: StoredModule, tensors: Mapping[str, Tensor], code_dtype: str = "") -> BitblasWeight:
    """The weight in a module's tensors, whose shapes `BitblasSpec.stored_modules` has checked.

    Zero points come out as float16, one for each output and group, to be applied as `module.zeros_mode` says.
    """
    unsigned = module.bits == 8 and code_dtype == "uint8"
    codes_NB, zeros_NG = _codes(module, tensors["qweight"]), _zeros(module, tensors, unsigned)
    if unsigned:  # q - z = (q - 128) - (z - 128)
        codes_NB = (codes_NB.view(torch.uint8) ^ SIGN_8BIT).view(torch.int8)
        zeros_NG = None if zeros_NG is None else zeros_NG - SIGN_8BIT
    return BitblasWeight(
        codes_NB=codes_NB,
        scales_NG=tensors["scales"].contiguous(),
        zeros_NG=zeros_NG,
        zeros_mode=cast(ZerosMode, module.zeros_mode),
        order_K=None,
        bits=module.bits,
        group_size=module.group_size,
    )


def _codes(module: StoredModule, stored: Tensor) -> Tensor:
    if stored.dim() == 2:
        return stored.contiguous()
    rows = max(1, BLOCK_WEIGHTS // (TILE * module.shape[1]))
    return torch.cat([straighten_ladder(tiles, module.bits) for tiles in torch.split(stored, rows)])


def _zeros(module: StoredModule, tensors: Mapping[str, Tensor], unsigned: bool) -> Tensor | None:
    stored = next((tensors[leaf] for leaf in ZEROS if leaf in tensors and tensors[leaf].numel()), None)
    if stored is None or stored.is_floating_point():
        return None if stored is None else stored.contiguous()
    zeros_NG = unpack_zeros(stored.view(torch.uint8) if unsigned else stored, module.bits)
    return zeros_NG.to(torch.float16).contiguous()


def repack_gptq(weight: GptqWeight) -> BitblasWeight:
    """The same weight in BitBLAS' layout, exactly: act-order becomes an order of the inputs, zeros become float16.

    Raises NotRepackable where act-order gives groups of unequal size.
    """
    order_K = _group_order(weight) if weight.act_order else None
    shift = SIGN_8BIT if weight.bits == 8 else 0
    packed = [pack_codes(codes_nK - shift, weight.bits) for codes_nK in _codes_by_output(weight, order_K)]
    return BitblasWeight(
        codes_NB=torch.cat(packed),
        scales_NG=weight.scales_GN.T.contiguous(),
        zeros_NG=(weight.zeros_GN.T.to(torch.float16) - shift).contiguous(),
        zeros_mode="original",
        order_K=order_K,
        bits=weight.bits,
        group_size=weight.group_size,
    )


def _codes_by_output(weight: GptqWeight, order_K: Tensor | None) -> Iterator[Tensor]:
    """The codes int16 [n, K] of some outputs at a time, inputs in the order given."""
    inputs = weight.shape[1]
    mask = (1 << weight.bits) - 1
    for words_Wn in torch.split(weight.words_WN, max(1, BLOCK_WEIGHTS // inputs), dim=1):
        bytes_nB = words_Wn.T.contiguous().view(torch.uint8)
        fields = [(bytes_nB >> shift) & mask for shift in range(0, 8, weight.bits)]
        codes_nK = torch.stack(fields, dim=-1).reshape(len(bytes_nB), -1)[:, :inputs]
        yield (codes_nK if order_K is None else codes_nK[:, order_K]).to(torch.int16)


def _group_order(weight: GptqWeight) -> Tensor:
    """The inputs by group, those of a group in their old order."""
    members_G = torch.bincount(weight.group_K.long(), minlength=weight.scales_GN.shape[0])
    unequal = torch.nonzero(members_G != weight.group_size)
    if len(unequal):
        group = int(unequal[0])
        raise NotRepackable(
            f"its g_idx gives group {group} {int(members_G[group])} inputs, and BitBLAS' layout has "
            f"{weight.group_size} in each; use quant=gptq, which runs it as it is"
        )
    return torch.argsort(weight.group_K, stable=True)
