"""Weights in the layout of BitBLAS' kernels, and their dequantization in plain torch.

Format: codes of `bits` bits packed along the inputs into bytes, little-endian; for 2 and 4 bits the fields of
each 4-byte word are then interleaved, so that a GPU can turn two of them into float16 at a time: field p
lies at bit 16 (p mod 2) + 4 floor(p / 2) for 4 bits, and for 2 bits at bit
16 floor(p / 8) + 8 ((p mod 8) mod 2) + 2 floor((p mod 8) / 2). (BitBLAS' "LOP3" weight transformation.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ZerosMode = Literal["none", "original", "rescale"]


@dataclass(frozen=True, slots=True)
class BitblasWeight:
    """`codes_NB` int8 [N, K * bits / 8] packed and interleaved; floating `scales_NG` [N, G], G groups along K.

    The weight is (q - z) * s with `zeros_NG` in mode "original", q * s - z in mode "rescale"; without zeros
    z is 2 ** (bits - 1), and 0 for 8 bits, whose codes are signed bytes. With `order_K` (int64, from act-order)
    the packed input k is the model's input order_K[k].
    """

    codes_NB: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    zeros_mode: ZerosMode
    order_K: Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): outputs and inputs."""
        return self.codes_NB.shape[0], self.codes_NB.shape[1] * 8 // self.bits

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales, zeros and input order."""
        tensors = (self.codes_NB, self.scales_NG, self.zeros_NG, self.order_K)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def field_shifts(bits: int) -> list[int]:
    """Where field p of an interleaved 32-bit word begins."""
    if bits == 4:
        return [16 * (p % 2) + 4 * (p // 2) for p in range(8)]
    if bits == 2:
        return [16 * (p // 8) + 8 * (p % 8 % 2) + 2 * (p % 8 // 2) for p in range(16)]
    return [0, 8, 16, 24]


def unpack_codes(codes_NB: Tensor, bits: int) -> Tensor:
    """The codes int32 [N, K]: 0 to 2 ** bits - 1, for 8 bits the signed byte."""
    if bits == 8:
        return codes_NB.view(torch.int8).to(torch.int32)
    bytes_NWB = codes_NB.contiguous().view(torch.uint8).reshape(codes_NB.shape[0], -1, 4)
    mask = (1 << bits) - 1
    fields = [(bytes_NWB[:, :, shift // 8] >> shift % 8) & mask for shift in field_shifts(bits)]
    return torch.stack(fields, dim=-1).reshape(codes_NB.shape[0], -1).to(torch.int32)


def pack_codes(codes_NK: Tensor, bits: int) -> Tensor:
    """Codes (integers [N, K]) to int8 [N, K * bits / 8]: what `unpack_codes` undoes; K a multiple of 32 / bits."""
    if bits == 8:
        return codes_NK.to(torch.int8)
    fields_NWP = codes_NK.to(torch.uint8).reshape(codes_NK.shape[0], -1, 32 // bits)
    bytes_NWB = fields_NWP.new_zeros((*fields_NWP.shape[:2], 4))
    for p, shift in enumerate(field_shifts(bits)):
        bytes_NWB[:, :, shift // 8] |= fields_NWP[:, :, p] << shift % 8
    return bytes_NWB.reshape(codes_NK.shape[0], -1).view(torch.int8)


def straighten_ladder(tiles: Tensor, bits: int) -> Tensor:
    """Codes int8 [N, K * bits / 8] of the ladder layout int8 [N / 16, K / 16, 16, 2 * bits].

    In it each 16 x 16 tile is stored as a tensor core loads it: position t = 8 u + e of a tile holds row
    u div 4 + 8 (e div 4), column 2 (u mod 4) + e mod 2 + 8 ((e div 2) mod 2). (BitBLAS' "ldmatrix" transformation.)
    """
    rows, columns = tiles.shape[:2]
    codes_RCT = unpack_codes(tiles.reshape(rows * columns, -1), bits).reshape(rows, columns, 256)
    t_T = torch.arange(256, device=tiles.device)
    u_T, e_T = t_T // 8, t_T % 8
    place_T = 16 * (u_T // 4 + 8 * (e_T // 4)) + 2 * (u_T % 4) + e_T % 2 + 8 * (e_T // 2 % 2)
    straight_RCT = torch.empty_like(codes_RCT)
    straight_RCT[:, :, place_T] = codes_RCT
    codes_RxCx = straight_RCT.reshape(rows, columns, 16, 16).transpose(1, 2)
    return pack_codes(codes_RxCx.reshape(rows * 16, columns * 16), bits)


def unpack_zeros(zeros_GB: Tensor, bits: int) -> Tensor:
    """Zero points [N, G] of bytes [G, N * bits / 8], packed along the outputs; for 8 bits the signed byte."""
    if bits == 8:
        return zeros_GB.T
    shifts_F = torch.arange(0, 8, bits, device=zeros_GB.device)
    zeros_GBF = (zeros_GB.to(torch.int32)[:, :, None] >> shifts_F) & ((1 << bits) - 1)
    return zeros_GBF.reshape(zeros_GB.shape[0], -1).T


def dequantize_bitblas_reference(weight: BitblasWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, with its inputs in the model's order: in float32, rounded once."""
    codes_NK = unpack_codes(weight.codes_NB, weight.bits).float()
    scales_NK = _per_input(weight.scales_NG, weight)
    if weight.zeros_NG is None:
        values_NK = (codes_NK - (0 if weight.bits == 8 else 1 << (weight.bits - 1))) * scales_NK
    elif weight.zeros_mode == "original":
        values_NK = (codes_NK - _per_input(weight.zeros_NG, weight)) * scales_NK
    else:
        values_NK = codes_NK * scales_NK - _per_input(weight.zeros_NG, weight)
    values_NK = values_NK.to(dtype)
    if weight.order_K is None:
        return values_NK
    ordered_NK = torch.empty_like(values_NK)
    ordered_NK[:, weight.order_K] = values_NK
    return ordered_NK


def _per_input(groups_NG: Tensor, weight: BitblasWeight) -> Tensor:
    return groups_NG.float().repeat_interleave(weight.group_size, dim=1)[:, : weight.shape[1]]
