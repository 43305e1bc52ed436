"""GPTQ's storage: from the tensors of a checkpoint to weights that kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.packed_gptq import WORD_BITS, GptqWeight, unpack_words
from pipeline.kernels.registry import Kernel
from pipeline.quant.gptq_spec import GptqSpec
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import StoredModule


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """How the Linears of a GPTQ checkpoint come about."""

    spec: GptqSpec
    kernel: Kernel[GptqWeight]

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Never asked for: a GPTQ checkpoint's weights were quantized with calibration data."""
        raise AssertionError("GPTQ weights are not made in flight")

    def restore(
        self, module: StoredModule, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """From "qweight", "qzeros", "scales" and, mostly with act-order, "g_idx"; ConfigError on what does not fit."""
        return QuantLinear(read_gptq(module, tensors, self.spec.zeros_offset), bias, dtype, self.kernel)


def read_gptq(module: StoredModule, tensors: Mapping[str, Tensor], zeros_offset: int) -> GptqWeight:
    """The weight in a module's tensors, whose shapes `GptqSpec.stored_modules` has checked.

    Zero points come out true, whichever format version stored them. Raises ConfigError for a group index
    out of range.
    """
    outputs, inputs = module.shape
    words_WN, scales_GN = tensors["qweight"].contiguous(), tensors["scales"].contiguous()
    in_order_K = torch.arange(inputs, dtype=torch.int32, device=words_WN.device) // module.group_size
    group_K = tensors.get("g_idx", in_order_K).to(torch.int32)
    _check_groups(group_K, scales_GN.shape[0])
    return GptqWeight(
        words_WN=words_WN,
        zeros_GN=true_zeros(tensors["qzeros"], module.bits, zeros_offset)[:, :outputs].contiguous(),
        scales_GN=scales_GN,
        group_K=group_K,
        bits=module.bits,
        group_size=module.group_size,
        act_order=not torch.equal(group_K, in_order_K),
    )


def _check_groups(group_K: Tensor, groups: int) -> None:
    wrong_K = group_K[(group_K < 0) | (group_K >= groups)]
    if wrong_K.numel():
        raise ConfigError(f"its g_idx names group {int(wrong_K[0])}, but the groups are 0 to {groups - 1}")


def true_zeros(qzeros_GW: Tensor, bits: int, offset: int) -> Tensor:
    """Zero points uint8 [G, N] from their words [G, N * bits / 32], packed along the outputs.

    Format v1 stores each less one. For 2, 4 and 8 bits its writers subtract that from whole words, so that a
    zero point of 0 borrows from the next field: the same sum is added back before the fields are cut. Three-bit
    fields, which cross words, are shifted one by one.
    """
    words_WG = qzeros_GW.T.to(torch.int64)
    if bits == 3:
        return ((unpack_words(words_WG, bits) + offset) & 7).T.to(torch.uint8)
    ones = sum(1 << start for start in range(0, WORD_BITS, bits))
    return unpack_words(words_WG + offset * ones, bits).T.to(torch.uint8)
