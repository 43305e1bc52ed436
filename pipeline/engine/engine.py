"""A stream of requests to a stream of completions, through enumerated static shapes only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.core import Completion, Request
from pipeline.engine.graphs import Eager, Recorder
from pipeline.engine.kv_cache import KVCache, Segment
from pipeline.engine.packing import (
    DecoderModel,
    Entry,
    PackedPass,
    Work,
    entry_of,
    entry_of_beginning,
    pack,
    pass_tokens,
    take_pass,
)
from pipeline.engine.plan import PREFIX_TOKENS, EnginePlan, LengthClass
from pipeline.engine.prefix import Beginning, PrefixRunner, PrefixStore, Splits
from pipeline.engine.sampler import Sampled, SamplerRows, sample
from pipeline.engine.scoring import completions, score_pass
from pipeline.engine.seat import Decode, Seat, reach
from pipeline.engine.slots import EMPTY, SlotBatch, seen_tokens
from pipeline.kernels.cache_attention import RowsKernel

STEPS_PER_POLL = {"cpu": 4, "cuda": 8}
NO_SPLITS = Splits()


@dataclass(frozen=True, slots=True)
class Output:
    """News of one answer: tokens since the last report; with the request's last answer, its completion."""

    request_id: Hashable
    choice: int
    new_token_ids: tuple[int, ...]
    completion: Completion | None


@dataclass(slots=True)
class EngineCounters:
    """Work done since the counters were made: real and padded token positions, and seconds.

    `prompt_tokens` are those run row by row, `prefix_tokens` those of segments, which rows share; `graphs` are the
    decode shapes that were captured.
    """

    prompt_tokens: int = 0
    prefix_tokens: int = 0
    completion_tokens: int = 0
    padded_tokens: int = 0
    prefill_passes: int = 0
    decode_steps: int = 0
    graphs: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Engine:
    """Submit requests, poll for what became of them, cancel what is no longer wanted.

    A request's answer depends on the request, the model and the plan only: not on its neighbours,
    its slot or the order. One thread drives it.
    """

    def __init__(
        self,
        model: DecoderModel,
        plan: EnginePlan,
        make_cache: Callable[[LengthClass], KVCache],
        device: torch.device,
        decode: Decode | None = None,
        splits: Splits = NO_SPLITS,
        prefix_tokens: int = PREFIX_TOKENS,
        recorder: Recorder | None = None,
        rows_kernel: RowsKernel | None = None,
    ) -> None:
        """`make_cache` allocates a length class's keys and values, when the class is first used.

        `decode` turns token ids into text; only requests with stop texts need it. Prompts are cut at `splits`,
        and the last `prefix_tokens` tokens of segments are kept. `recorder` decides how decode steps are run; without
        one they are called as they are. `rows_kernel` attends to the rows of a prefill pass.
        """
        self.plan = plan
        self.counters = EngineCounters()
        self._model = model
        self._device = device
        self._make_cache = make_cache
        self._decode_text = decode
        self._recorder = recorder or Eager("not asked for")
        self._rows_kernel = rows_kernel
        self._steps_per_poll = STEPS_PER_POLL.get(device.type, 4)
        self._prefixes = PrefixRunner(splits, PrefixStore(prefix_tokens), self._run_beginnings)
        self._scoring: deque[Work] = deque()
        self._waiting: dict[LengthClass, deque[Work]] = {c: deque() for c in plan.length_classes}
        self._batches: dict[LengthClass, SlotBatch] = {}
        self._choices: dict[Hashable, dict[int, Completion]] = {}

    @property
    def unfinished(self) -> int:
        """Answers asked for that are neither completed nor cancelled."""
        return self.waiting + sum(len(b.seats) for b in self._batches.values())

    @property
    def waiting(self) -> int:
        """Answers asked for that have not reached the device."""
        return len(self._scoring) + sum(len(q) for q in self._waiting.values())

    @property
    def eager_reason(self) -> str | None:
        """Why decode steps are not captured in graphs, or None."""
        return self._recorder.eager_reason

    def submit(self, request: Request) -> None:
        """Queue a request; raises ValueError if the engine cannot take it (`unfit` tells beforehand)."""
        reason = unfit(request, self.plan)
        if reason is not None:
            raise ValueError(f"request {request.id}: {reason}")
        if request.sampling.stop and self._decode_text is None:
            raise ValueError(f"request {request.id}: this engine has no decoder for stop texts")
        if request.candidates or request.scores_text:
            self._scoring.append((request, 0))
            return
        wanted = reach(request, self.plan)
        queue = self._waiting[next(c for c in self.plan.length_classes if c.max_len >= wanted)]
        queue.extend((request, choice) for choice in range(request.sampling.n))

    def cancel(self, request_id: Hashable) -> None:
        """Forget a request; nothing more is reported of it. Unknown ids are ignored."""
        for queue in (self._scoring, *self._waiting.values()):
            for work in [w for w in queue if w[0].id == request_id]:
                queue.remove(work)
        for batch in self._batches.values():
            for slot in [s for s, seat in batch.seats.items() if seat.request.id == request_id]:
                batch.release(slot)
        self._choices.pop(request_id, None)

    @torch.inference_mode()
    def poll(self) -> list[Output]:
        """Do the next piece of work (a scoring pass, or a refill and a few decode steps) and report it."""
        outputs = self._score() if self._scoring else []
        for length_class in self.plan.length_classes:
            if self._waiting[length_class] or length_class in self._batches:
                outputs += self._decode(length_class)
        return outputs

    def _score(self) -> list[Output]:
        started = time.perf_counter()
        work = take_pass(self._scoring, self.plan, len(self._scoring), self._prefixes.splits)
        requests = [request for request, _ in work]
        earlier = self._prefixes.segments_of(requests, self.plan.prefill_tokens[0])
        packed = self._pack([self._entry(r, e) for r, e in zip(requests, earlier, strict=True)])
        top = max(request.sampling.logprobs or 0 for request in requests)
        found = score_pass(self._model, packed, self.plan, top)
        self._count_prefill(started, packed.real_tokens, packed.tokens_T.shape[0])
        return [Output(c.request_id, 0, (), c) for c in completions(requests, packed, found)]

    def _decode(self, length_class: LengthClass) -> list[Output]:
        batch = self._batch(length_class)
        outputs: list[Output] = []
        while self._waiting[length_class] and batch.free:
            outputs += self._refill(length_class, batch)
        if batch.seats:
            started = time.perf_counter()
            steps, rows = batch.decode(self._steps_per_poll)
            self.counters.graphs = self._recorder.graphs
            reports = self._report(batch)
            accepted = sum(len(o.new_token_ids) for o in reports)
            self.counters.decode_steps += steps
            self.counters.completion_tokens += accepted
            self.counters.padded_tokens += steps * rows - accepted
            self.counters.decode_s += time.perf_counter() - started
            outputs += reports
        return outputs

    def _refill(self, length_class: LengthClass, batch: SlotBatch) -> list[Output]:
        started = time.perf_counter()
        most = min(batch.free, self.plan.logit_rows)
        work = take_pass(self._waiting[length_class], self.plan, most, self._prefixes.splits)
        earlier = self._prefixes.segments_of([request for request, _ in work], self.plan.prefill_tokens[0])
        slots = batch.reserve(len(work))
        rows = list(zip((request for request, _ in work), earlier, slots, strict=True))
        goes_on = [request.sampling.max_new_tokens > 1 for request, _, _ in rows]  # of others nothing is read again
        entries = [self._entry(r, e, s if kept else None) for (r, e, s), kept in zip(rows, goes_on, strict=True)]
        packed = self._pack(entries, batch.cache)
        batch.begin([(s, e) for (_, e, s), kept in zip(rows, goes_on, strict=True) if kept])
        seats = [Seat.of(request, choice, self.plan, self._decode_text) for request, choice in work]
        ((_, indices_L),) = packed.wanted_slices(self.plan)
        logits_LV = self._model.head(packed.run(self._model)[indices_L])
        batch.seat(slots, seats, self._first_tokens(logits_LV, seats))
        reports = self._report(batch)
        self.counters.completion_tokens += sum(len(o.new_token_ids) for o in reports)
        self._count_prefill(started, packed.real_tokens, packed.tokens_T.shape[0])
        return reports

    def _pack(self, entries: list[Entry], cache: KVCache | None = None) -> PackedPass:
        return pack(entries, self.plan, self._device, cache, self._rows_kernel)

    def _entry(self, request: Request, earlier: tuple[Segment, ...], slot: int | None = None) -> Entry:
        return entry_of(request, self.plan, self._device, earlier, slot)

    def _run_beginnings(self, beginnings: list[Beginning]) -> None:
        """Run segments that prompts begin with, which takes their keys and values."""
        packed = self._pack([entry_of_beginning(b) for b in beginnings])
        packed.run(self._model)
        self.counters.prefix_tokens += packed.real_tokens
        self.counters.padded_tokens += packed.tokens_T.shape[0] - packed.real_tokens
        self.counters.prefill_passes += 1

    def _first_tokens(self, logits_LV: Tensor, seats: list[Seat]) -> Sampled:
        padding = logits_LV.shape[0] - len(seats)
        rows = SamplerRows.of([*(s.sampler_row for s in seats), *[EMPTY] * padding], self._device)
        zero_B = torch.zeros(logits_LV.shape[0], dtype=torch.int64, device=self._device)
        seen_BV = None
        if rows.any_penalty:
            seen_BV = torch.zeros_like(logits_LV, dtype=torch.bool)
            seen_BV[: len(seats)] = seen_tokens(seats, logits_LV.shape[1], self._device)
        return sample(logits_LV, rows, rows.uniforms(zero_B, 1)[0] if rows.any_sampled else None, seen_BV)

    def _report(self, batch: SlotBatch) -> list[Output]:
        outputs = []
        for slot, seat in list(batch.seats.items()):
            new = tuple(seat.token_ids[seat.reported :])
            seat.reported = len(seat.token_ids)
            if seat.finish is not None:
                batch.release(slot)
            if new or seat.finish is not None:
                outputs.append(Output(seat.request.id, seat.choice, new, self._completed(seat)))
        return outputs

    def _completed(self, seat: Seat) -> Completion | None:
        """The request's completion, once its last answer has ended."""
        if seat.finish is None:
            return None
        if seat.request.sampling.n == 1:
            return seat.completion()
        ended = self._choices.setdefault(seat.request.id, {})
        ended[seat.choice] = seat.completion()
        if len(ended) < seat.request.sampling.n:
            return None
        choices = tuple(completion for _, completion in sorted(self._choices.pop(seat.request.id).items()))
        broken = next((c for c in choices if c.error is not None), None)
        return broken or replace(choices[0], choices=choices)

    def _batch(self, length_class: LengthClass) -> SlotBatch:
        if length_class not in self._batches:
            cache = self._make_cache(length_class)
            self._batches[length_class] = SlotBatch(
                self.plan, length_class, cache, self._device, self._model, self._recorder
            )
        return self._batches[length_class]

    def _count_prefill(self, started: float, real_tokens: int, tokens: int) -> None:
        self.counters.prompt_tokens += real_tokens
        self.counters.padded_tokens += tokens - real_tokens
        self.counters.prefill_passes += 1
        self.counters.prefill_s += time.perf_counter() - started


def unfit(request: Request, plan: EnginePlan) -> str | None:
    """Why the engine cannot take the request (too long, unknown tokens), or None if it can."""
    if not request.prompt_ids:
        return "the prompt has no tokens"
    if not all(request.candidates):
        return "a label has no tokens"
    if request.score_prompt and not request.target_ids and len(request.prompt_ids) == 1:
        return "the prompt has 1 token; it is scored from its second one on"
    unknown = _unknown_token(request, plan.vocab)
    if unknown is not None:
        return f"the tokenizer gives token {unknown}, but the model knows {plan.vocab} tokens"
    too_long = _too_long(request, plan.max_len)
    if too_long is None and pass_tokens(request) > plan.prefill_tokens[-1]:
        return f"the prompt and its labels have {pass_tokens(request)} tokens, more than {plan.prefill_tokens[-1]}"
    return too_long


def _too_long(request: Request, max_len: int) -> str | None:
    """That prompt and answer do not fit; an answer that is generated may be cut down to one token."""
    tokens = len(request.prompt_ids)
    answer, what = 1, "an answer"
    if request.candidates:
        answer, what = request.answer_tokens, "its longest label"
    elif request.scores_text:
        answer, what = request.answer_tokens, f"the {request.answer_tokens} of its target"
    if tokens + answer <= max_len:
        return None
    together = f", which with {what} is" if answer else ","
    return f"the prompt has {tokens} tokens{together} more than the {max_len} there is room for"


def _unknown_token(request: Request, vocab: int) -> int | None:
    """A token id of the request that the model has no embedding for."""
    parts = [part for part in (request.prompt_ids, request.target_ids, *request.candidates) if part]
    largest, smallest = max(map(max, parts)), min(map(min, parts))
    if largest >= vocab:
        return largest
    return smallest if smallest < 0 else None
