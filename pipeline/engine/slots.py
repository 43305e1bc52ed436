"""The slots of one length class: seats taken by rows, decoded together, freed and refilled."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class SlotState:
    """What a step knows of its slots, [B] each: the token to run and where it stands, the row's reach, tokens drawn.

    A reach of 0 is a free slot's. A step writes them in place.
    """

    token_B: Tensor
    position_B: Tensor
    reach_B: Tensor
    drawn_B: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.token_B, self.position_B, self.reach_B, self.drawn_B

    def of(self, index_B: Tensor) -> SlotState:
        """Copies for some of the slots."""
        return SlotState(*(tensor[index_B] for tensor in self.tensors))

    def put(self, index_B: Tensor, some: SlotState) -> None:
        """Write them back."""
        for tensor, values in zip(self.tensors, some.tensors, strict=True):
            tensor[index_B] = values

    def advance(self, tokens_B: Tensor, last: int) -> None:
        """Step every slot; one that runs past its row's end (it is freed soon) stays inside its own memory."""
        self.token_B.copy_(tokens_B)
        self.position_B.copy_((self.position_B + 1).clamp(max=last))
        self.drawn_B.add_(1)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The slots that steps run, with what the sampler needs of them; `index_B` is None where it is all, in order."""

    slots: Sequence[int]
    index_B: Tensor | None
    sampler: SamplerRows


class SlotBatch:
    """All slots of a length class, with their keys and values on the device.

    The state of all slots is in tensors that are written in place and never replaced: a step of all slots is a function
    of them and of the cache alone, so that it can be captured once and replayed. Where the plan has found that fewer
    rows give the same bits, steps run no more slots than they have to.
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
        self._plan = plan
        self.cache = cache
        self.device = device
        self._model = model
        self._recorder = recorder
        self._recorded: Step | None = None
        self._slots_B = torch.arange(length_class.slots, device=device)
        self.seats: dict[int, Seat] = {}
        self._free = list(range(length_class.slots))
        self._not_finite: set[int] = set()
        self._rows: StepRows | None = None
        self._seen_BV: Tensor | None = None
        self._state = SlotState(*(torch.zeros(length_class.slots, dtype=torch.int64, device=device) for _ in range(4)))

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

    def begin(self, rows: Sequence[tuple[int, tuple[Segment, ...]]]) -> None:
        """Put the segments that rows begin with into their slots."""
        owners: dict[int, tuple[Segment, list[int]]] = {}
        for slot, segments in rows:
            for segment in segments:
                owners.setdefault(id(segment), (segment, []))[1].append(slot)
        for segment, slots_of in owners.values():
            self.cache.copy(torch.tensor(slots_of, device=self.device), segment)

    def seat(self, slots: Sequence[int], seats: Sequence[Seat], first: Sampled) -> None:
        """Put prefilled rows, whose first tokens are the first of `first`, into reserved slots."""
        index = torch.tensor(slots, device=self.device)
        lengths = [len(s.request.prompt_ids) for s in seats]
        reaches = [length + s.limit for length, s in zip(lengths, seats, strict=True)]
        position_B, reach_B = (torch.tensor(values, device=self.device) for values in (lengths, reaches))
        self._state.put(
            index, SlotState(first.tokens_B[: len(seats)], position_B, reach_B, torch.ones_like(position_B))
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

    def decode(self, most_steps: int) -> tuple[int, int]:
        """Run up to `most_steps` steps with one read-back at the end; returns how many, and of how many slots."""
        steps = min(most_steps, max(s.limit - len(s.token_ids) for s in self.seats.values()))
        rows = self._step_rows()
        sampled = self._steps(steps, rows)
        places = {slot: place for place, slot in enumerate(rows.slots)}
        taken = sorted(self.seats)
        self._read_back(sampled, [places[slot] for slot in taken], taken)
        finite_B = torch.stack([s.finite_B for s in sampled]).all(dim=0).tolist()
        self._not_finite.update(slot for slot, finite in zip(rows.slots, finite_B, strict=True) if not finite)
        return steps, len(rows.slots)

    def _steps(self, steps: int, rows: StepRows) -> list[Sampled]:
        """Run so many steps of some slots, or all."""
        index_B, sampler = rows.index_B, rows.sampler
        state = self._state if index_B is None else self._state.of(index_B)
        uniforms_NB = sampler.uniforms(state.drawn_B, steps) if sampler.any_sampled else None
        seen_BV = self._seen_BV if sampler.any_penalty else None
        if seen_BV is not None and index_B is not None:
            seen_BV = seen_BV[index_B]
        sampled = []
        for step in range(steps):
            if seen_BV is not None:
                seen_BV.scatter_(1, state.token_B[:, None], True)
            logits_BV = self._all_logits() if index_B is None else self._logits(state, index_B)
            sampled.append(sample(logits_BV, sampler, None if uniforms_NB is None else uniforms_NB[step], seen_BV))
            state.advance(sampled[-1].tokens_B, self.max_len - 1)
        if index_B is not None:
            self._state.put(index_B, state)
            if seen_BV is not None and self._seen_BV is not None:
                self._seen_BV[index_B] = seen_BV
        return sampled

    def _all_logits(self) -> Tensor:
        """The logits [B, V] of every slot's next token, by the recorded step."""
        if self._recorded is None:
            self._recorded = self._recorder.record(lambda: self._logits(self._state, None))
        return self._recorded()

    def _logits(self, state: SlotState, index_B: Tensor | None) -> Tensor:
        """The logits [B, V] of the next token of some slots, or of all."""
        lengths_B = torch.where(state.reach_B > 0, state.position_B + 1, 0)
        slots_B, some = (self._slots_B, False) if index_B is None else (index_B, True)
        attention = SlotDecode(self.cache, slots_B, state.position_B, lengths_B, state.reach_B, some)
        return self._model.head(self._model.hidden(state.token_B, state.position_B, attention))

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
        self._state.position_B.masked_fill_(free_B, 0)
        self._state.reach_B.masked_fill_(free_B, 0)

    def _step_rows(self) -> StepRows:
        """The taken slots, with as many free ones as it takes to fill a listed shape."""
        if self._rows is None:
            self._send_back([self.seats.get(slot) for slot in range(self.slots)])
            rows = self._plan.rows("decode", self.slots, len(self.seats))
            slots = sorted([*self.seats, *heapq.nsmallest(rows - len(self.seats), self._free)])
            seats = [self.seats.get(slot) for slot in slots]
            self._rows = StepRows(
                slots=slots,
                index_B=None if rows == self.slots else torch.tensor(slots, device=self.device),
                sampler=SamplerRows.of([EMPTY if s is None else s.sampler_row for s in seats], self.device),
            )
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
