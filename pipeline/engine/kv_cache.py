"""Keys and values: preallocated for the slots of a length class, and of the segments that prompts share.

Shapes: B slots, K key/value heads, S = max_len positions, D head dim, T tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.engine.plan import LengthClass, ModelGeometry


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

    The extra last slot takes what a padded position of a static pass writes and is never read.
    """

    def __init__(
        self, geometry: ModelGeometry, length_class: LengthClass, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate zeroed memory; raises torch.OutOfMemoryError where the device has too little."""
        self.slots = length_class.slots
        self.max_len = length_class.max_len
        shape = (self.slots + 1, geometry.kv_heads, self.max_len, geometry.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(geometry.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(geometry.layers)]

    @property
    def scratch_slot(self) -> int:
        """The slot that padding writes to."""
        return self.slots

    def write(self, layer: int, slots_T: Tensor, positions_T: Tensor, k_KTD: Tensor, v_KTD: Tensor) -> None:
        """Store the keys and values of T tokens, each at its own slot and position."""
        self.keys[layer][slots_T, :, positions_T] = k_KTD.transpose(0, 1)
        self.values[layer][slots_T, :, positions_T] = v_KTD.transpose(0, 1)

    def copy(self, slots_R: Tensor, segment: Segment) -> None:
        """Put a segment that R rows begin with into their slots."""
        for layer, (k_KSD, v_KSD) in enumerate(zip(segment.keys, segment.values, strict=True)):
            self.keys[layer][slots_R, :, segment.begin : segment.end] = k_KSD
            self.values[layer][slots_R, :, segment.begin : segment.end] = v_KSD

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots of a layer, [B, K, S, D], as views."""
        return self.keys[layer][: self.slots], self.values[layer][: self.slots]

    def clear(self, slot: int) -> None:
        """Zero a slot: after a row with non-finite values, which a mask alone would let through as 0 * nan."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()
