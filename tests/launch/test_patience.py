"""Waiting for chunks in other hands."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from pipeline.errors import Interrupted
from pipeline.launch import patience as module
from pipeline.launch.patience import Patience, wait_for_chunks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)


def values(numbers: Iterable[int]) -> Callable[[], int]:
    """A number at each call, the last one for ever."""
    left = list(numbers)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def nothing() -> None:
    """No reason to end the wait."""


def test_what_nobody_holds_is_there_at_once() -> None:
    assert wait_for_chunks(Patience(0.0), values([3]), values([2]), nothing)


def test_nothing_left_is_the_end_of_it() -> None:
    assert not wait_for_chunks(Patience(60.0), values([0]), values([0]), nothing)


def test_without_patience_one_look_is_enough() -> None:
    assert not wait_for_chunks(Patience(0.0), values([3]), values([3]), nothing)


def test_a_chunk_that_was_given_up_ends_the_wait() -> None:
    assert wait_for_chunks(Patience(60.0), values([3, 3, 3]), values([3, 3, 2]), nothing)


def test_chunks_that_others_finish_end_the_wait() -> None:
    assert not wait_for_chunks(Patience(60.0), values([2, 1, 0]), values([2, 1, 0]), nothing)


def test_a_short_patience_ends() -> None:
    assert not wait_for_chunks(Patience(0.05), values([1]), values([1]), nothing)


def test_a_signal_ends_the_wait() -> None:
    def stop() -> None:
        raise Interrupted("stopped by a signal")

    with pytest.raises(Interrupted):
        wait_for_chunks(Patience(60.0), values([1]), values([1]), stop)


def test_what_the_last_one_left_is_taken_although_patience_is_over() -> None:
    """It may have died between the look at the chunks and the look at who is at work."""

    class Siblings(Patience):
        def lasts(self) -> bool:
            held.append(0)  # by the time nobody is at work, nothing is held
            return False

    held = [1]
    assert wait_for_chunks(Siblings(), lambda: 1, lambda: held[-1], nothing)
