"""task=label: the probability of every label, and the likeliest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.core import Completion, Request
from pipeline.errors import ConfigError
from pipeline.settings import TaskSettings
from pipeline.tasks.task import RequestId, Row, row_by_row

Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels by name, the texts that stand for them, and those texts' token ids, `end_tokens` of them an end."""

    names: tuple[str, ...]
    verbalizers: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    end_tokens: int


@dataclass(frozen=True, slots=True)
class LabelScores:
    """One row's distribution: log-probabilities as the model gives them, normalized over the labels."""

    label_set: LabelSet
    logprobs: tuple[float, ...]

    @property
    def probs(self) -> list[float]:
        """Probability of each label among the labels; they sum to 1."""
        top = max(self.logprobs)
        weights = [math.exp(x - top) for x in self.logprobs]
        total = math.fsum(weights)
        return [w / total for w in weights]

    @property
    def best(self) -> int:
        """Index of the likeliest label; the first one of equals."""
        return self.logprobs.index(max(self.logprobs))

    @property
    def margin(self) -> float:
        """Probability of the likeliest label minus that of the second."""
        first, second = sorted(self.probs, reverse=True)[:2]
        return first - second

    @property
    def entropy(self) -> float:
        """Entropy of the distribution in nats."""
        return -math.fsum(p * math.log(p) for p in self.probs if p > 0)


class LabelTask:
    """One scored request a row; the labels are the run's, or each row's own column of them."""

    kind = "label"

    def __init__(self, settings: TaskSettings, encode: Encode, *, is_chat: bool, stop_token_ids: Sequence[int]) -> None:
        """`encode` gives the tokens of a text behind the prompt. Raises ConfigError on unusable labels."""
        assert settings.labels is not None
        separator = settings.label_separator
        self._separator = ("" if is_chat else " ") if separator is None else separator
        self._encode = encode
        self._eos = settings.label_eos
        self._stop = tuple(stop_token_ids)
        self._abstain_below = settings.abstain_below
        self._column = settings.labels if isinstance(settings.labels, str) else None
        self.columns: tuple[str, ...] = () if self._column is None else (self._column,)
        self._make = lru_cache(maxsize=1024)(self._label_set)
        if settings.label_eos and not self._stop:
            raise ConfigError("task.label_eos=true, but the checkpoint names no end token; use task.label_eos=false")
        self._fixed: LabelSet | None = None
        if not isinstance(settings.labels, str):
            try:
                self._fixed = self._make(tuple(settings.labels.items()))
            except ValueError as error:
                raise ConfigError(f"task.labels: {error}") from error

    def requests(self, ids: Sequence[RequestId], rows: Sequence[Row]) -> list[Request | str]:
        """The rows' requests with their labels as candidates; the reason where a row's own labels are unusable."""
        return row_by_row(self._request, ids, rows)

    def _request(self, request_id: RequestId, row: Row) -> Request:
        return Request(id=request_id, prompt_ids=(), candidates=self._labels_of(row).token_ids)

    def results(self, completions: Sequence[Completion], rows: Sequence[Row]) -> dict[str, list[Any]]:
        """Label, distribution, margin and entropy; all null in error rows, the label also where the task abstains."""
        columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "completion", "completion_tokens", "cumulative_logprob",
                "label", "label_probs", "label_logprob", "margin", "entropy",
            )
        }  # fmt: skip
        for completion, row in zip(completions, rows, strict=True):
            for name, value in self._result(completion, row).items():
                columns[name].append(value)
        return columns

    def _result(self, completion: Completion, row: Row) -> dict[str, Any]:
        if completion.error is not None:
            nothing = ("completion", "cumulative_logprob", "label", "label_probs", "label_logprob", "margin", "entropy")
            return {"completion_tokens": 0, **dict.fromkeys(nothing)}
        labels = self._labels_of(row)
        scores = LabelScores(labels, completion.candidate_logprobs)
        probs, best = scores.probs, scores.best
        abstains = probs[best] < self._abstain_below
        return {
            "completion": None if abstains else labels.verbalizers[best],
            "completion_tokens": 0 if abstains else len(labels.token_ids[best]) - labels.end_tokens,
            "cumulative_logprob": None if abstains else scores.logprobs[best],
            "label": None if abstains else labels.names[best],
            "label_probs": self._by_label(labels, probs),
            "label_logprob": self._by_label(labels, scores.logprobs),
            "margin": scores.margin,
            "entropy": scores.entropy,
        }

    def _by_label(self, labels: LabelSet, values: Sequence[float]) -> Any:
        """Label to number: a struct's dict for the run's labels, a map's pairs for a row's own."""
        pairs = list(zip(labels.names, values, strict=True))
        return pairs if self._fixed is None else dict(pairs)

    def _labels_of(self, row: Row) -> LabelSet:
        if self._fixed is not None:
            return self._fixed
        assert self._column is not None
        labels = row[self._column]
        usable = isinstance(labels, list) and len(set(map(str, labels))) == len(labels) >= 2
        if not usable or not all(isinstance(x, str) and x for x in labels):
            raise ValueError(f"column {self._column} must hold at least two different, non-empty labels")
        return self._make(tuple((label, label) for label in labels))

    def _label_set(self, labels: tuple[tuple[str, str], ...]) -> LabelSet:
        ids = [self._encode(self._separator + text) for _, text in labels]
        if not all(ids):
            raise ValueError("a label has no tokens; give it a text that stands for it")
        if len(set(ids)) != len(ids):
            raise ValueError("two labels have the same tokens; give them texts that differ")
        begins_another = any(a != b and b[: len(a)] == a for a in ids for b in ids)
        end = bool(self._eos or (self._eos is None and begins_another))
        if end:
            if not self._stop:
                raise ValueError(
                    "one label's tokens begin another's, and the checkpoint names no end token to tell them apart"
                )
            ids = [(*candidate, self._stop[0]) for candidate in ids]
        return LabelSet(tuple(n for n, _ in labels), tuple(t for _, t in labels), tuple(ids), int(end))
