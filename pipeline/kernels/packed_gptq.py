"""Weights as GPTQ checkpoints pack them, and their dequantization in plain torch.

Format: W[n, k] = scales[group[k], n] * (code[k, n] - zero[group[k], n]), where the codes of an output n
are a little-endian bit stream along the inputs, cut into 32-bit words; 3-bit codes cross words, the
others do not. (Frantar et al., "GPTQ", 2022; the layout is that of AutoGPTQ and GPTQModel.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class GptqWeight:
    """`words_WN` int32 [W, N]; true `zeros_GN` uint8 and floating `scales_GN` [G, N], G groups of inputs.

    W is K * bits / 32, rounded up to whole words or to whole blocks of 32 codes. `group_K` int32 is the group of
    each input; without `act_order` it is k // group_size.
    """

    words_WN: Tensor
    zeros_GN: Tensor
    scales_GN: Tensor
    group_K: Tensor
    bits: int
    group_size: int
    act_order: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): outputs and inputs."""
        return self.words_WN.shape[1], self.group_K.shape[0]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, zero points, scales and group indices."""
        tensors = (self.words_WN, self.zeros_GN, self.scales_GN, self.group_K)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def unpack_words(words_WN: Tensor, bits: int) -> Tensor:
    """The codes int32 [W * 32 / bits, N] of little-endian bit streams along dimension 0 of int32 words [W, N]."""
    count = words_WN.shape[0] * WORD_BITS // bits
    start = torch.arange(count, device=words_WN.device) * bits
    word, shift = start // WORD_BITS, (start % WORD_BITS)[:, None]
    wide_WN = words_WN.to(torch.int64) & 0xFFFFFFFF
    low_KN = wide_WN[word] >> shift
    following = torch.clamp(word + 1, max=words_WN.shape[0] - 1)
    high_KN = torch.where(shift + bits > WORD_BITS, wide_WN[following] << (WORD_BITS - shift), 0)
    return ((low_KN | high_KN) & ((1 << bits) - 1)).to(torch.int32)


def dequantize_gptq_reference(weight: GptqWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: scale times (code - zero) in float32, rounded once."""
    codes_KN = unpack_words(weight.words_WN, weight.bits)[: weight.shape[1]]
    group_K = weight.group_K.long()
    values_KN = (codes_KN - weight.zeros_GN[group_K].to(torch.int32)).float() * weight.scales_GN[group_K].float()
    return values_KN.to(dtype).T.contiguous()
