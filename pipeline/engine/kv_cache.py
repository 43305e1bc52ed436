"""Preallocated keys and values of one length class.

Shapes: B slots, K key/value heads, S = max_len positions, D head dim, T tokens of a pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.engine.plan import LengthClass, ModelGeometry


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

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots of a layer, [B, K, S, D], as views."""
        return self.keys[layer][: self.slots], self.values[layer][: self.slots]

    def clear(self, slot: int) -> None:
        """Zero a slot: after a row with non-finite values, which a mask alone would let through as 0 * nan."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()
