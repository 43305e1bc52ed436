"""The slots of one length class: seats taken by rows, decoded together, freed and refilled."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.core import FinishReason, Request, SamplingParams
from pipeline.engine.attention import SlotDecode
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.packing import DecoderModel, reach
from pipeline.engine.plan import EnginePlan, LengthClass
from pipeline.engine.sampler import Sampled, SamplerRows, prompt_key, sample

EMPTY = (SamplingParams(), 0)


@dataclass(slots=True)
class Seat:
    """One row being decoded: what it was asked, what it has answered, and how many tokens it may have."""

    request: Request
    limit: int
    key: int
    token_ids: list[int] = field(default_factory=list)
    reported: int = 0
    logprob: float = 0.0
    finish: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, plan: EnginePlan) -> Seat:
        """A seat for a fresh row; its answer ends where the longest row would."""
        return cls(request, reach(request, plan) - len(request.prompt_ids), prompt_key(request.prompt_ids))

    def accept(self, token: int, logprob: float, finite: bool) -> None:
        """Take the next token, unless the row has ended; the stop token itself is not part of the answer."""
        if self.finish is not None:
            return
        if not finite:
            self.finish = FinishReason.ERROR
            return
        self.logprob += logprob
        if token in self.request.sampling.stop_token_ids:
            self.finish = FinishReason.STOP
            return
        self.token_ids.append(token)
        if len(self.token_ids) >= self.limit:
            self.finish = FinishReason.LENGTH


class SlotBatch:
    """All slots of a length class, with their keys and values on the device."""

    def __init__(self, plan: EnginePlan, length_class: LengthClass, cache: KVCache, device: torch.device) -> None:
        self.shapes = plan.decode_slots(length_class)
        self.max_len = length_class.max_len
        self.cache = cache
        self.device = device
        self.seats: dict[int, Seat] = {}
        self._free = list(range(length_class.slots))
        self._not_finite: set[int] = set()
        self._rows: SamplerRows | None = None
        self._token_B = torch.zeros(length_class.slots, dtype=torch.int64, device=device)
        self._position_B = torch.zeros(length_class.slots, dtype=torch.int64, device=device)
        self._step_B = torch.zeros(length_class.slots, dtype=torch.int64, device=device)
        self._reach_B = torch.zeros(length_class.slots, dtype=torch.int64, device=device)

    @property
    def free(self) -> int:
        """Seats that can be taken now."""
        return len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Take the lowest free slots, so that a part-filled batch runs a small shape.

        A slot that computed anything not finite is wiped: attention gives a place beyond a row's length
        the weight 0, but 0 * nan is nan. That includes the steps a slot ran after its row had ended.
        """
        slots = [heapq.heappop(self._free) for _ in range(count)]
        for slot in self._not_finite.intersection(slots):
            self.cache.clear(slot)
        self._not_finite.difference_update(slots)
        return slots

    def seat(self, slots: Sequence[int], seats: Sequence[Seat], first_B: Tensor) -> None:
        """Put prefilled rows, whose first tokens are `first_B`, into reserved slots."""
        index = torch.tensor(slots, device=self.device)
        lengths = torch.tensor([len(s.request.prompt_ids) for s in seats], device=self.device)
        self._token_B[index] = first_B
        self._position_B[index] = lengths
        self._step_B[index] = 1
        self._reach_B[index] = torch.tensor([len(s.request.prompt_ids) + s.limit for s in seats], device=self.device)
        self.seats.update(zip(slots, seats, strict=True))
        self._rows = None

    def release(self, slot: int) -> None:
        """Free a slot, which goes on being decoded along with the others until its next row."""
        seat = self.seats.pop(slot)
        if seat.finish is FinishReason.ERROR:
            self._not_finite.add(slot)
        heapq.heappush(self._free, slot)
        self._rows = None

    def decode(self, model: DecoderModel, most_steps: int) -> tuple[int, int]:
        """Run up to `most_steps` steps with one read-back at the end; returns (steps, slots run in each)."""
        slots = next(n for n in self.shapes if n > max(self.seats))
        steps = min(most_steps, max(s.limit - len(s.token_ids) for s in self.seats.values()))
        rows = self._sampler_rows(slots)
        uniforms_NB = rows.uniforms(self._step_B[:slots], steps) if rows.any_sampled else None
        slots_B = torch.arange(slots, device=self.device)
        sampled = []
        for step in range(steps):
            attention = SlotDecode(self.cache, slots_B, self._position_B[:slots].clone(), self._reach_B[:slots])
            logits_BV = model.logits(self._token_B[:slots], attention.positions_B, attention, None)
            sampled.append(sample(logits_BV, rows, None if uniforms_NB is None else uniforms_NB[step]))
            self._advance(slots, sampled[-1].tokens_B)
        self._read_back(sampled)
        return steps, slots

    def _advance(self, slots: int, tokens_B: Tensor) -> None:
        """Step every slot; one that runs past its row's end (it is freed soon) stays inside its own memory."""
        self._token_B[:slots] = tokens_B
        self._position_B[:slots] = (self._position_B[:slots] + 1).clamp(max=self.max_len - 1)
        self._step_B[:slots] += 1

    def _read_back(self, sampled: Sequence[Sampled]) -> None:
        tokens = torch.stack([s.tokens_B for s in sampled], dim=1).tolist()
        logprobs = torch.stack([s.logprobs_B for s in sampled], dim=1).tolist()
        finite = torch.stack([s.finite_B for s in sampled], dim=1).tolist()
        self._not_finite.update(slot for slot, flags in enumerate(finite) if not all(flags))
        for slot, seat in self.seats.items():
            for token, logprob, is_finite in zip(tokens[slot], logprobs[slot], finite[slot], strict=True):
                seat.accept(token, logprob, is_finite)

    def _sampler_rows(self, slots: int) -> SamplerRows:
        if self._rows is None or self._rows.temperature_B.shape[0] != slots:
            taken = [self.seats.get(slot) for slot in range(slots)]
            rows = [EMPTY if s is None else (s.request.sampling, s.key) for s in taken]
            self._rows = SamplerRows.of(rows, self.device)
        return self._rows
