"""Keys and values: preallocated for the slots of a length class, and of the segments that prompts share.

Shapes: B slots, K key/value heads, S = max_len positions, D head dim, T tokens of a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.plan import LengthClass, ModelGeometry
from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.cache_attention import AttendCached, CachedLayer, attend_cached_reference
from pipeline.kernels.float8 import quantize


@dataclass(slots=True)
class Segment:
    """The keys and values of a prompt's tokens from one cut to the next, of every layer, [K, S, D] each.

    They are filled in layer by layer by the pass that runs the segment.
    """

    begin: int
    end: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def put(self, layer: int, k_KSD: Tensor, v_KSD: Tensor) -> None:
        """Take a copy of a layer's keys and values; layers come in order."""
        assert layer == len(self.keys)
        self.keys.append(k_KSD.clone())
        self.values.append(v_KSD.clone())


class KVCache:
    """Keys and values of every slot and layer, [B + 1, K, S, D] each; allocated once, never moved.

    In FP8 they are codes, with scales [B + 1, K, S] beside them. The extra last slot takes what a padded position of
    a static pass writes and is never read.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        length_class: LengthClass,
        dtype: torch.dtype,
        device: torch.device,
        *,
        float8: bool = False,
        attend: AttendCached = attend_cached_reference,
    ) -> None:
        """Allocate zeroed memory; raises torch.OutOfMemoryError where the device has too little. `attend` reads it."""
        self.slots = length_class.slots
        self.max_len = length_class.max_len
        self.splits = length_class.splits
        self._attend = attend
        shape = (self.slots + 1, geometry.kv_heads, self.max_len, geometry.head_dim)

        stored = torch.uint8 if float8 else dtype

        def tensors() -> list[Tensor]:
            return [_zeros(shape, stored, device) for _ in range(geometry.layers)]

        def scales() -> list[Tensor | None]:
            return [_zeros(shape[:-1], torch.float32, device) if float8 else None for _ in range(geometry.layers)]

        self.keys, self.values = tensors(), tensors()
        self.key_scales, self.value_scales = scales(), scales()

    @property
    def scratch_slot(self) -> int:
        """The slot that padding writes to."""
        return self.slots

    def write(self, layer: int, slots_T: Tensor, positions_T: Tensor, k_KTD: Tensor, v_KTD: Tensor) -> None:
        """Store the keys and values of T tokens, each at its own slot and position."""
        for x_KTD, stored, scales in self._places(layer, k_KTD, v_KTD):
            if scales is not None:
                x_KTD, scales_KT = quantize(x_KTD)
                scales[slots_T, :, positions_T] = scales_KT.transpose(0, 1)
            stored[slots_T, :, positions_T] = x_KTD.transpose(0, 1)

    def copy(self, slots_R: Tensor, segment: Segment) -> None:
        """Put a segment that R rows begin with into their slots."""
        for layer, (k_KSD, v_KSD) in enumerate(zip(segment.keys, segment.values, strict=True)):
            for x_KSD, stored, scales in self._places(layer, k_KSD, v_KSD):
                if scales is not None:
                    x_KSD, scales_KS = quantize(x_KSD)
                    scales[slots_R, :, segment.begin : segment.end] = scales_KS
                stored[slots_R, :, segment.begin : segment.end] = x_KSD

    def attend(
        self, layer: int, q_BHD: Tensor, lengths_B: Tensor, rule: AttentionRule, slots_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A query for each slot, or each of `slots_B`, against its first `lengths_B` positions: [B, H, D], [B, H]."""
        return self._attend(q_BHD, replace(self.read(layer), slots_B=slots_B), lengths_B, rule, self.splits)

    def read(self, layer: int) -> CachedLayer:
        """What a layer holds of all slots, as views."""
        key_scales, value_scales = self.key_scales[layer], self.value_scales[layer]
        return CachedLayer(
            self.keys[layer][: self.slots],
            self.values[layer][: self.slots],
            None if key_scales is None else key_scales[: self.slots],
            None if value_scales is None else value_scales[: self.slots],
        )

    def clear(self, slot: int) -> None:
        """Zero a slot: after a row with non-finite values, which a mask alone would let through as 0 * nan."""
        for tensor in (*self.keys, *self.values, *self.key_scales, *self.value_scales):
            if tensor is not None:
                tensor[slot].zero_()

    def _places(self, layer: int, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor | None], ...]:
        """Keys and values with what stores them, and what stores their scales."""
        return (
            (k, self.keys[layer], self.key_scales[layer]),
            (v, self.values[layer], self.value_scales[layer]),
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take memory page by page, as they are written: slots have room for the longest row."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
