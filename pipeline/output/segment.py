"""One segment of a journal: some completions of a chunk as bytes that are either whole or not used.

Layout: 8 bytes that name the format, the 32 bytes of a BLAKE2b hash, then what is hashed: an Arrow IPC stream of
one batch, a row for each completion, whose schema's metadata names what the rows belong to. Arrow keeps floats as
they are, to the last bit.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipeline.core import Completion, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")
MAGIC = b"rows-1\r\n"
"""Of this layout; whoever changes it, or what a Completion means, changes the number."""

_HASH_BYTES = 32
_OWNER_KEY = b"pipeline.journal"
_ALTERNATIVE = pa.struct([("token_id", pa.int32()), ("logprob", pa.float64())])
_STEP = pa.struct([("token_id", pa.int32()), ("logprob", pa.float64()), ("top", pa.list_(_ALTERNATIVE))])
_ANSWER = pa.struct(
    [
        ("prompt_tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("text_end", pa.int64()),
        ("cumulative_logprob", pa.float64()),
        ("logprobs", pa.list_(_STEP)),
        ("candidate_logprobs", pa.list_(pa.float64())),
        ("target_tokens", pa.int64()),
        ("prompt_logprob", pa.float64()),
        ("error", pa.string()),
    ]
)
_COMPRESSION = pa.ipc.IpcWriteOptions(compression="zstd")


def encode(owner: str, completions: Mapping[int, Completion]) -> bytes:
    """A segment with completions by their row's index in the chunk; `owner` tells what chunk of what run it is."""
    answers = list(completions.values())
    batch = pa.record_batch(
        {
            "row": pa.array(list(completions), pa.int64()),
            "answer": _answers(answers),
            "choices": _lists([c.choices for c in answers], _answers),
        }
    ).replace_schema_metadata({_OWNER_KEY: owner})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=_COMPRESSION) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return MAGIC + _digest(content) + content


def decode(owner: str, chunk_id: str, data: bytes) -> dict[int, Completion] | None:
    """The completions of a segment; None if it is damaged, cut off, of another layout or of another owner."""
    start = len(MAGIC) + _HASH_BYTES
    content = data[start:]
    if data[:start] != MAGIC + _digest(content):
        return None
    with pa.ipc.open_stream(content) as reader:
        if (reader.schema.metadata or {}).get(_OWNER_KEY) != owner.encode():
            return None
        rows = reader.read_all().to_pylist()
    return {row["row"]: _completion((chunk_id, row["row"]), row["answer"], row["choices"]) for row in rows}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


def _answers(completions: Sequence[Completion]) -> pa.StructArray:
    values = {
        "prompt_tokens": [c.prompt_tokens for c in completions],
        "finish_reason": [c.finish_reason.value for c in completions],
        "token_ids": [c.token_ids for c in completions],
        "text_end": [c.text_end for c in completions],
        "cumulative_logprob": [c.cumulative_logprob for c in completions],
        "candidate_logprobs": [c.candidate_logprobs for c in completions],
        "target_tokens": [c.target_tokens for c in completions],
        "prompt_logprob": [c.prompt_logprob for c in completions],
        "error": [c.error for c in completions],
    }
    steps = _lists([c.logprobs for c in completions], _steps)
    arrays = [steps if f.name == "logprobs" else pa.array(values[f.name], f.type) for f in _ANSWER]
    return pa.StructArray.from_arrays(arrays, fields=list(_ANSWER))


def _steps(steps: Sequence[TokenLogprob]) -> pa.StructArray:
    arrays = [*_token_logprobs([(s.token_id, s.logprob) for s in steps]), _lists([s.top for s in steps], _alternatives)]
    return pa.StructArray.from_arrays(arrays, fields=list(_STEP))


def _alternatives(pairs: Sequence[tuple[int, float]]) -> pa.StructArray:
    return pa.StructArray.from_arrays(_token_logprobs(pairs), fields=list(_ALTERNATIVE))


def _token_logprobs(pairs: Sequence[tuple[int, float]]) -> list[pa.Array]:
    return [pa.array([p[0] for p in pairs], pa.int32()), pa.array([p[1] for p in pairs], pa.float64())]


def _lists(groups: Sequence[Sequence[T]], values: Callable[[list[T]], pa.Array]) -> pa.ListArray:
    """A list for each group, whose elements `values` turns into one array."""
    ends = pa.array(accumulate(map(len, groups), initial=0), pa.int32())
    return pa.ListArray.from_arrays(ends, values(list(chain.from_iterable(groups))))


def _completion(
    request_id: tuple[str, int], answer: Mapping[str, Any], choices: Iterable[Mapping[str, Any]]
) -> Completion:
    return Completion(
        request_id=request_id,
        finish_reason=FinishReason(answer["finish_reason"]),
        token_ids=tuple(answer["token_ids"]),
        logprobs=tuple(_step(step) for step in answer["logprobs"]),
        candidate_logprobs=tuple(answer["candidate_logprobs"]),
        choices=tuple(_completion(request_id, choice, ()) for choice in choices),
        **{name: answer[name] for name in _PLAIN},
    )


_PLAIN = ("prompt_tokens", "text_end", "cumulative_logprob", "target_tokens", "prompt_logprob", "error")


def _step(step: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((one["token_id"], one["logprob"]) for one in step["top"])
    return TokenLogprob(token_id=step["token_id"], logprob=step["logprob"], top=top)
