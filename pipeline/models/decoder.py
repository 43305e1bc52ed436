"""A transformers causal language model behind the engine's `DecoderModel` interface."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.attention import AttentionPass
from pipeline.kernels.prepack import Prepacker
from pipeline.models.packed_linear import pack_linears, packed_bytes
from pipeline.models.rope import RowLongRope
from pipeline.quant.linear import QuantLinear


class TransformersDecoder:
    """Runs flat passes of T tokens, all rows of a pass in one sequence; attention knows the rows."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, unused_tensors: tuple[str, ...] = ()
    ) -> None:
        """`unused_tensors` are those of the checkpoint that the model has no place for."""
        self.model = model
        self.unused_tensors = unused_tensors
        self.dtype = dtype
        self.device = device
        self._row_ropes = [module for module in model.modules() if isinstance(module, RowLongRope)]
        self._layers: nn.Module = getattr(model, str(model.base_model_prefix))
        self._head = head_of(model)

    @property
    def rope_by_row(self) -> bool:
        """Whether a token's keys depend on how long its row can become."""
        return bool(self._row_ropes)

    def capture_obstacle(self) -> str | None:
        """Why a pass cannot be captured in a CUDA graph, or None if nothing is known to be in the way."""
        for _, linear in self.quant_linears():
            check = linear.kernel.uncapturable
            reason = None if check is None else check(linear.weight)
            if reason is not None:
                return reason
        return None

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: AttentionPass) -> Tensor:
        """What the output head takes, of every token of the pass: [T, hidden size]."""
        for rope in self._row_ropes:
            rope.reach_T = attention.reach_T
        out = self._layers(
            input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, attention_pass=attention
        )
        hidden_TC: Tensor = out.last_hidden_state[0]
        return hidden_TC

    def head(self, hidden_LC: Tensor) -> Tensor:
        """Float32 logits [L, V] of L hidden states."""
        logits_LV: Tensor = self._head(inputs_embeds=hidden_LC[None]).logits[0].float()
        return logits_LV

    def quant_linears(self) -> Iterator[tuple[str, QuantLinear]]:
        """Every quantized Linear with its module path."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantLinear):
                yield name, module

    def cache_dequantized(self, budget_bytes: int, rows: Sequence[int] = ()) -> int:
        """Keep dequantized weights, layer after layer, while they fit the budget; returns the bytes taken.

        A CPU has them laid out beforehand for passes of so many `rows`, as `pack` does with other weights.
        """
        taken = 0
        prepack = Prepacker(rows)
        for linear in (linear for _, linear in self.quant_linears() if linear.cacheable):
            if taken + linear.dense_bytes > budget_bytes:
                break
            linear.cache_weight(prepack)
            taken += linear.dense_bytes
        return taken

    def drop_dequantized(self) -> int:
        """Give up all cached dequantized weights, which changes no bit; returns the bytes that this frees."""
        return sum(linear.drop_cached() for _, linear in self.quant_linears())

    def pack(self) -> None:
        """Lay out unquantized weights as the CPU's library wants them; elsewhere nothing changes."""
        pack_linears(self.model)
        self._head = head_of(self.model)

    def weight_bytes(self) -> int:
        """Bytes of parameters and quantized weights on the device, cached dequantized weights not counted."""
        dense = {t.data_ptr(): t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())}
        quantized = sum(linear.stored_bytes for _, linear in self.quant_linears())
        return sum(dense.values()) + packed_bytes(self.model) + quantized


class _NoLayers(nn.Module):
    """Stands in a causal model where its layers were: what goes in as embeddings comes out as hidden states."""

    def forward(self, *tokens: Any, inputs_embeds: Tensor, **others: Any) -> SimpleNamespace:
        return SimpleNamespace(
            last_hidden_state=inputs_embeds, past_key_values=None, hidden_states=None, attentions=None
        )


def head_of(model: nn.Module) -> nn.Module:
    """A causal model without its layers: the output head with all that an architecture does to its logits.

    It shares the model's weights. Scales and caps of the logits are in the model's own forward, not in a
    module that could be called by itself.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, str(model.base_model_prefix): _NoLayers()}
    return head
