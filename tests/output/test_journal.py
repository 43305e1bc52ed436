"""The journal: what was written comes back as it was, what was damaged or is another's does not, and it stays small."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Place, S3Server, local_place, s3_place

from pipeline.core import Completion, FinishReason, TokenLogprob
from pipeline.data.source import Chunk
from pipeline.errors import RunFailed
from pipeline.output import journal as journals
from pipeline.output.journal import MOST_SEGMENTS, ChunkJournal, Journal
from pipeline.output.segment import MAGIC, decode, encode

CHUNK = Chunk(file_ordinal=1, first_row=4096, num_rows=50)
RUN = {"pipeline.run_id": "r", "pipeline.fingerprint": "f"}
TOKENS = st.integers(0, 2**31 - 1)
COUNTS = st.integers(0, 2**40)
FLOATS = st.floats(width=64)


def answers(choices: Any) -> st.SearchStrategy[Completion]:
    alternatives = st.lists(st.tuples(TOKENS, FLOATS), max_size=3).map(tuple)
    steps = st.builds(TokenLogprob, token_id=TOKENS, logprob=FLOATS, top=alternatives)
    return st.builds(
        Completion,
        request_id=st.none(),
        prompt_tokens=COUNTS,
        finish_reason=st.sampled_from(FinishReason),
        token_ids=st.lists(TOKENS, max_size=4).map(tuple),
        text_end=st.none() | COUNTS,
        cumulative_logprob=st.none() | FLOATS,
        logprobs=st.lists(steps, max_size=3).map(tuple),
        candidate_logprobs=st.lists(FLOATS, max_size=4).map(tuple),
        target_tokens=COUNTS,
        prompt_logprob=st.none() | FLOATS,
        choices=choices,
        error=st.none() | st.text(),
    )


COMPLETIONS = answers(st.lists(answers(st.just(())), max_size=3).map(tuple))
ROWS = st.dictionaries(st.integers(0, CHUNK.num_rows - 1), COMPLETIONS, max_size=5)


def owned(rows: Mapping[int, Completion], chunk: Chunk = CHUNK) -> dict[int, Completion]:
    """With the request ids that the engine would have been given."""
    made = {}
    for index, one in rows.items():
        choices = tuple(replace(choice, request_id=(chunk.id, index)) for choice in one.choices)
        made[index] = replace(one, request_id=(chunk.id, index), choices=choices)
    return made


def bits(value: Any) -> Any:
    """A value in which floats are their bits, so that -0.0 is not 0.0 and a NaN is itself."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, Completion | TokenLogprob):
        return type(value), [(name, bits(getattr(value, name))) for name in value.__slots__]
    if isinstance(value, Mapping):
        return {key: bits(inner) for key, inner in value.items()}
    return tuple(map(bits, value)) if isinstance(value, tuple) else value


def answer(index: int, text: str = "") -> Completion:
    return Completion(
        request_id=(CHUNK.id, index),
        prompt_tokens=index,
        finish_reason=FinishReason.STOP,
        token_ids=(index, index + 1),
        cumulative_logprob=-index / 7,
        error=text or None,
    )


def some(*indices: int) -> dict[int, Completion]:
    return {index: answer(index) for index in indices}


def opened(place: Place, attempt: str = "a1", chunk: Chunk = CHUNK, **changes: str) -> ChunkJournal:
    """A chunk's journal, as a process of its own sees it."""
    about = {"content": "digest", "base": "", **changes}
    run = {**RUN, **{key: about.pop(key) for key in tuple(about) if key in RUN}}
    return Journal(place.store(), run, attempt).open(chunk, **about)


# What is written comes back, and nothing else


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_a_segment_gives_back_every_bit(rows: dict[int, Completion]) -> None:
    rows = owned(rows)
    assert bits(decode("owner", CHUNK.id, encode("owner", rows))) == bits(rows)


def test_numbers_at_their_ends() -> None:
    nan = struct.unpack("<d", struct.pack("<Q", 0x7FF80000DEADBEEF))[0]
    for number in (nan, -0.0, math.inf, -math.inf, 5e-324, -1.7976931348623157e308, 0.1 + 0.2):
        rows = {7: replace(answer(7), cumulative_logprob=number, candidate_logprobs=(number, 0.0))}
        assert bits(decode("owner", CHUNK.id, encode("owner", rows))) == bits(rows)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.data())
def test_any_damage_is_seen(rows: dict[int, Completion], data: st.DataObject) -> None:
    whole = encode("owner", owned(rows))
    kind = data.draw(st.sampled_from(["cut", "flip", "append", "zeros"]))
    position = data.draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        damaged = whole[:position]
    elif kind == "flip":
        damaged = bytearray(whole)
        damaged[position] ^= data.draw(st.integers(1, 255))
    elif kind == "append":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=9))
    else:  # as after a crash of a disk that kept the length and not the content
        damaged = whole[:position] + bytes(len(whole) - position)
    assert decode("owner", CHUNK.id, bytes(damaged)) is None or bytes(damaged) == whole


def test_every_byte_counts_and_every_length() -> None:
    whole = encode("owner", some(1, 2))
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        assert decode("owner", CHUNK.id, bytes(flipped)) is None
        assert decode("owner", CHUNK.id, whole[:position]) is None


def test_a_later_layout_is_left_alone() -> None:
    whole = encode("owner", some(1))
    assert decode("owner", CHUNK.id, MAGIC.replace(b"1", b"2") + whole[len(MAGIC) :]) is None


@pytest.mark.parametrize(
    "other",
    [
        {"pipeline.run_id": "another"},
        {"pipeline.fingerprint": "other settings"},
        {"content": "changed"},
        {"base": "a Part"},
        {"chunk": replace(CHUNK, num_rows=51)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_rows_of_another_run_file_or_part_are_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    place = local_place(tmp_path)
    opened(place).write(some(1, 2))
    assert opened(place, "a2").found == some(1, 2)
    strange = opened(place, "a2", **other)
    assert strange.found == {}
    strange.remove()
    assert place.files() == {}, "nobody will ever want them: the chunk has been committed"


def test_rows_of_another_chunk_are_not_taken(tmp_path: Path) -> None:
    place = local_place(tmp_path)
    opened(place).write(some(1, 2))
    (name,) = place.files()
    other = replace(CHUNK, first_row=0)
    place.put(name.replace(CHUNK.id, other.id), place.files()[name])
    assert opened(place, chunk=other).found == {}


# A chunk's life


def test_what_several_attempts_left_is_put_together(place: Place) -> None:
    first, second = opened(place), opened(place, "a2")
    first.write(some(1, 2))
    second.write(some(2, 3))
    first.write(some(4))
    third = opened(place, "a3")
    assert third.found == some(1, 2, 3, 4)
    third.write(some(5))
    assert opened(place, "a4").found == some(1, 2, 3, 4, 5)
    third.remove()
    assert place.files() == {}
    assert opened(place, "a4").found == {}


def test_a_process_that_takes_a_chunk_again_writes_over_nothing(place: Place) -> None:
    journal = Journal(place.store(), RUN, "a1")
    journal.open(CHUNK, "digest").write(some(1))
    journal.open(CHUNK, "digest").write(some(2))
    assert opened(place).found == some(1, 2)


def test_segments_stay_few_however_often_it_is_written_and_restarted(tmp_path: Path) -> None:
    place, most = local_place(tmp_path), 0
    for row in range(CHUNK.num_rows):
        opened(place, f"a{row}").write(some(row))
        most = max(most, len(place.files()))
    one = opened(place, "last")
    assert one.found == some(*range(CHUNK.num_rows))
    for row in range(CHUNK.num_rows):
        one.write(some(row))
        most = max(most, len(place.files()))
    assert most <= MOST_SEGMENTS + 1
    assert opened(place).found == some(*range(CHUNK.num_rows))


def test_a_damaged_segment_costs_its_rows_and_goes_with_the_others(place: Place) -> None:
    one = opened(place)
    for rows in (some(1, 2), some(3), some(4)):
        one.write(rows)
    _, second, third = sorted(place.files())
    place.put(second, place.files()[second][:-1])
    place.put(third, b"")
    again = opened(place, "a2")
    assert again.found == some(1, 2)
    again.write(some(3, 4))
    assert opened(place, "a3").found == some(1, 2, 3, 4)
    again.remove()
    assert place.files() == {}


def test_a_segment_that_goes_while_it_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(place).write(some(1))
    opened(place, "a2").write(some(2))
    store = place.store()
    first = min(place.files())
    read = type(store).read

    def meanwhile(self: Any, name: str) -> bytes:
        if name == first and name in place.files():
            place.remove(name)
        return read(self, name)

    monkeypatch.setattr(type(store), "read", meanwhile)
    assert Journal(store, RUN, "a3").open(CHUNK, "digest").found == some(2)


def test_only_chunks_with_a_part_are_swept(place: Place) -> None:
    other = replace(CHUNK, first_row=0)
    opened(place).write(some(1))
    opened(place, chunk=other).write(some(1))
    place.put("journal/part-000000-000000000000.a1.tmp", b"somebody writes this")
    place.put("journal/rows-of-something-else", b"")
    journals.sweep(place.store(), {CHUNK.id})
    left = sorted(place.files())
    assert [name.split(".")[0] for name in left] == [
        "journal/part-000000-000000000000", f"journal/rows-{other.id}", "journal/rows-of-something-else"
    ]  # fmt: skip


class _Memory:
    """As much of a Store as a journal uses, quick enough for thousands of lives."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def shown(self, name: str) -> str:
        return name

    def names(self, folder: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in self.files]

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self.files[name]

    def replace(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def remove(self, name: str) -> None:
        self.files.pop(name, None)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "write", "write", "write", "kill", "damage"]),
        st.integers(0, 2),
        st.lists(st.integers(0, CHUNK.num_rows - 1), min_size=1, max_size=4),
    ),
    max_size=80,
)


@settings(max_examples=80, deadline=None)
@given(STEPS)
def test_any_order_of_restarts_also_of_processes_at_the_same_time(steps: list[tuple[str, int, list[int]]]) -> None:
    """What was written is found by whoever begins later, however many write at once; damage loses rows, never more."""
    store: Any = _Memory()
    living: dict[int, ChunkJournal] = {}
    written: set[int] = set()
    damaged = False
    names = itertools.count()
    for what, process, rows in steps:
        if what == "begin":
            living[process] = Journal(store, RUN, f"a{next(names)}").open(CHUNK, "digest")
            assert all(found == answer(index) for index, found in living[process].found.items())
            assert damaged or living[process].found.keys() == written
        elif what == "write" and process in living:
            living[process].write(some(*rows))
            written |= set(rows)
        elif what == "kill":
            living.pop(process, None)
        elif what == "damage" and store.files:
            name = sorted(store.files)[rows[0] % len(store.files)]
            store.files[name] = store.files[name][: -rows[-1] - 1]
            damaged = True
    last = Journal(store, RUN, "last").open(CHUNK, "digest")
    assert all(found == answer(index) for index, found in last.found.items())
    assert damaged or last.found.keys() == written


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.randoms(use_true_random=False))
def test_a_kill_at_any_write_or_removal_loses_only_what_was_being_written(steps: int, rng: random.Random) -> None:
    class Killed(Exception):
        pass

    class Mortal(_Memory):
        left = steps

        def _step(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Killed

        def replace(self, name: str, data: bytes) -> None:
            self._step()
            super().replace(name, data)

        def remove(self, name: str) -> None:
            self._step()
            super().remove(name)

    store: Any = Mortal()
    written: set[int] = set()
    one = Journal(store, RUN, "a1").open(CHUNK, "digest")
    try:
        while True:
            row = rng.randrange(CHUNK.num_rows)
            one.write(some(row))
            written.add(row)
    except Killed:
        pass
    assert Journal(store, RUN, "a2").open(CHUNK, "digest").found.keys() - {row} == written - {row}


# Stores that fail


def test_a_journal_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = local_place(tmp_path)
    one = opened(place)
    one.write(some(1))

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(RunFailed, match=rf"rows-{CHUNK.id}.* could not be written \(No space left .*free space"):
            one.write(some(2))
    assert opened(place, "a2").found == some(1)
    assert len(place.files()) == 1, "nothing half-written"


def test_a_full_disk_ends_the_run_and_a_freed_one_takes_the_rows(small_disk: Path) -> None:
    place = local_place(small_disk)
    one = opened(place)
    one.write(some(1))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    rows = {row: answer(row, random.Random(row).randbytes(4096).hex()) for row in range(2, 9)}
    with pytest.raises(RunFailed, match=r"could not be written \(No space left on device\)"):
        one.write(rows)
    assert opened(place, "a2").found == some(1)
    assert sorted(place.files())[0] == "filler" and len(place.files()) == 2, "nothing half-written"
    filler.unlink()
    opened(place, "a2").write(rows)
    assert opened(place, "a3").found == {**some(1), **rows}


def test_a_bad_sector_costs_the_rows_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = local_place(tmp_path)
    opened(place).write(some(1))
    store = place.store()

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(type(store), "read", broken)
    assert Journal(store, RUN, "a2").open(CHUNK, "digest").found == {}


def test_a_store_out_of_reach_is_no_reason_to_do_rows_again(s3: S3Server) -> None:
    place = s3_place(s3, "journal-out-of-reach")
    opened(place).write(some(1))
    store = place.store()
    with s3.failing(lambda request: request.refuse(403, "ExpiredToken")), pytest.raises(RunFailed, match="reached"):
        Journal(store, RUN, "a2").open(CHUNK, "digest")
    assert opened(place, "a3").found == some(1)
