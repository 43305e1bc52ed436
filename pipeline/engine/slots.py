"""The slots of one length class: seats taken by rows, decoded together, freed and refilled."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core import SamplingParams
from pipeline.engine.attention import SlotDecode
from pipeline.engine.graphs import Recorder, Step
from pipeline.engine.kv_cache import KVCache, Segment
from pipeline.engine.packing import DecoderModel
from pipeline.engine.plan import EnginePlan, LengthClass
from pipeline.engine.sampler import Sampled, SamplerRow, SamplerRows, sample
from pipeline.engine.seat import Seat

EMPTY = SamplerRow(SamplingParams(), 0)


class SlotBatch:
    """All slots of a length class, with their keys and values on the device.

    Tokens, positions and reaches are tensors that are written in place and never replaced: a step is a function of
    them and of the cache alone, so that it can be captured once and replayed.
    """

    def __init__(
        self,
        plan: EnginePlan,
        length_class: LengthClass,
        cache: KVCache,
        device: torch.device,
        model: DecoderModel,
        recorder: Recorder,
    ) -> None:
        """`recorder` decides how the steps of the model are run."""
        self.slots = length_class.slots
        self.max_len = length_class.max_len
        self.vocab = plan.vocab
        self.cache = cache
        self.device = device
        self._model = model
        self._recorder = recorder
        self._recorded: Step | None = None
        self._slots_B = torch.arange(length_class.slots, device=device)
        self.seats: dict[int, Seat] = {}
        self._free = list(range(length_class.slots))
        self._not_finite: set[int] = set()
        self._rows: SamplerRows | None = None
        self._seen_BV: Tensor | None = None
        self._token_B, self._position_B, self._step_B, self._reach_B = (
            torch.zeros(length_class.slots, dtype=torch.int64, device=device) for _ in range(4)
        )

    @property
    def free(self) -> int:
        """Seats that can be taken now."""
        return len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Take free slots, the lowest first.

        A slot that computed anything not finite is wiped: attention gives a place beyond a row's length
        the weight 0, but 0 * nan is nan. That includes the steps a slot ran after its row had ended.
        """
        slots = [heapq.heappop(self._free) for _ in range(count)]
        for slot in self._not_finite.intersection(slots):
            self.cache.clear(slot)
        self._not_finite.difference_update(slots)
        return slots

    def begin(self, slots: Sequence[int], earlier: Sequence[tuple[Segment, ...]]) -> None:
        """Put the segments that rows begin with into their slots."""
        owners: dict[int, tuple[Segment, list[int]]] = {}
        for slot, segments in zip(slots, earlier, strict=True):
            for segment in segments:
                owners.setdefault(id(segment), (segment, []))[1].append(slot)
        for segment, slots_of in owners.values():
            self.cache.copy(torch.tensor(slots_of, device=self.device), segment)

    def seat(self, slots: Sequence[int], seats: Sequence[Seat], first: Sampled) -> None:
        """Put prefilled rows, whose first tokens are the first of `first`, into reserved slots."""
        index = torch.tensor(slots, device=self.device)
        lengths = [len(s.request.prompt_ids) for s in seats]
        self._token_B[index] = first.tokens_B[: len(seats)]
        self._position_B[index] = torch.tensor(lengths, device=self.device)
        self._step_B[index] = 1
        self._reach_B[index] = torch.tensor(
            [length + s.limit for length, s in zip(lengths, seats, strict=True)], device=self.device
        )
        self.seats.update(zip(slots, seats, strict=True))
        self._rows = None
        if any(s.request.sampling.repetition_penalty != 1 for s in seats):
            self._mark_seen(slots, seats)
        self._read_back([first], range(len(seats)), slots)

    def release(self, slot: int) -> None:
        """Free a slot, which goes on being decoded along with the others until its next row."""
        del self.seats[slot]
        heapq.heappush(self._free, slot)
        self._rows = None

    def decode(self, most_steps: int) -> int:
        """Run up to `most_steps` steps of all slots with one read-back at the end; returns how many."""
        steps = min(most_steps, max(s.limit - len(s.token_ids) for s in self.seats.values()))
        rows = self._sampler_rows()
        uniforms_NB = rows.uniforms(self._step_B, steps) if rows.any_sampled else None
        seen_BV = self._seen_BV if rows.any_penalty else None
        if self._recorded is None:
            self._recorded = self._recorder.record(self._logits)
        sampled = []
        for step in range(steps):
            if seen_BV is not None:
                seen_BV.scatter_(1, self._token_B[:, None], True)
            logits_BV = self._recorded()
            sampled.append(sample(logits_BV, rows, None if uniforms_NB is None else uniforms_NB[step], seen_BV))
            self._advance(sampled[-1].tokens_B)
        taken = sorted(self.seats)
        self._read_back(sampled, taken, taken)
        finite_B = torch.stack([s.finite_B for s in sampled]).all(dim=0).tolist()
        self._not_finite.update(slot for slot, finite in enumerate(finite_B) if not finite)
        return steps

    def _logits(self) -> Tensor:
        """The logits [B, V] of every slot's next token."""
        lengths_B = torch.where(self._reach_B > 0, self._position_B + 1, 0)
        attention = SlotDecode(self.cache, self._slots_B, self._position_B, lengths_B, self._reach_B)
        return self._model.head(self._model.hidden(self._token_B, self._position_B, attention))

    def _advance(self, tokens_B: Tensor) -> None:
        """Step every slot; one that runs past its row's end (it is freed soon) stays inside its own memory."""
        self._token_B.copy_(tokens_B)
        self._position_B.copy_((self._position_B + 1).clamp(max=self.max_len - 1))
        self._step_B += 1

    def _read_back(self, sampled: Sequence[Sampled], rows: Sequence[int], slots: Sequence[int]) -> None:
        """Hand the tokens of so many steps to the seats: row r of the steps belongs to the slot beside it."""
        tokens = torch.stack([s.tokens_B for s in sampled]).tolist()
        logprobs = torch.stack([s.logprobs_B for s in sampled]).tolist()
        finite = torch.stack([s.finite_B for s in sampled]).tolist()
        tops = [_likeliest(s) for s in sampled]
        for row, slot in zip(rows, slots, strict=True):
            seat = self.seats[slot]
            for step, top in enumerate(tops):
                if not finite[step][row]:
                    self._not_finite.add(slot)
                seat.accept(tokens[step][row], logprobs[step][row], finite[step][row], top[row] if top else ())

    def _mark_seen(self, slots: Sequence[int], seats: Sequence[Seat]) -> None:
        """Note which tokens the prompts hold; the answers' own are noted as they are decoded."""
        if self._seen_BV is None:
            self._seen_BV = torch.zeros(self.slots, self.vocab, dtype=torch.bool, device=self.device)
        for slot, seat in zip(slots, seats, strict=True):
            self._seen_BV[slot] = seen_tokens([seat], self.vocab, self.device)[0]

    def _send_back(self, taken: Sequence[Seat | None]) -> None:
        """Let free slots, which are decoded along with the others, begin anew without a reach, attending to nothing."""
        free_B = torch.tensor([seat is None for seat in taken]).to(self.device, non_blocking=True)
        self._position_B.masked_fill_(free_B, 0)
        self._reach_B.masked_fill_(free_B, 0)

    def _sampler_rows(self) -> SamplerRows:
        if self._rows is None:
            taken = [self.seats.get(slot) for slot in range(self.slots)]
            self._send_back(taken)
            self._rows = SamplerRows.of([EMPTY if s is None else s.sampler_row for s in taken], self.device)
        return self._rows


def seen_tokens(seats: Sequence[Seat], vocab: int, device: torch.device) -> Tensor:
    """[B, V]: True for the tokens of each seat's prompt."""
    seen_BV = torch.zeros(len(seats), vocab, dtype=torch.bool, device=device)
    for row, seat in enumerate(seats):
        seen_BV[row, torch.tensor(seat.request.prompt_ids, device=device)] = True
    return seen_BV


def _likeliest(sampled: Sampled) -> list[list[tuple[int, float]]]:
    """For each row, its likeliest tokens with their log-probabilities; empty if no row asked."""
    if sampled.top_tokens_BK is None or sampled.top_logprobs_BK is None:
        return []
    tokens, logprobs = sampled.top_tokens_BK.tolist(), sampled.top_logprobs_BK.tolist()
    return [list(zip(t, p, strict=True)) for t, p in zip(tokens, logprobs, strict=True)]
