"""What is begun before the end of a job, by a clock that the tests turn."""

from __future__ import annotations

from pipeline.launch.walltime import Walltime


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_an_end_everything_is_taken() -> None:
    walltime = Walltime()
    assert walltime.take(10**9)
    walltime.answer(1)
    assert walltime.take(10**9)
    assert not walltime.over and not walltime.short


def test_time_to_save_is_the_margin_before_the_end() -> None:
    clock = Clock()
    walltime = Walltime(1100.0, 30.0, clock)
    clock.now = 1069.9
    assert not walltime.over
    clock.now = 1070.0
    assert walltime.over
    assert not walltime.take(1)


def test_by_the_pace_so_far_only_what_can_be_finished_is_taken() -> None:
    """100 s until it must save; 10 rows a second."""
    clock = Clock()
    walltime = Walltime(1130.0, 30.0, clock)
    assert walltime.take(10_000), "no pace is known yet"
    walltime = Walltime(1130.0, 30.0, clock)
    assert walltime.take(100) and walltime.take(100)
    clock.now = 1010.0
    walltime.answer(100)  # another 100 are waiting: 10 s; 90 s are left
    assert walltime.take(800)
    assert not walltime.short
    assert not walltime.take(1)
    assert walltime.short
    walltime.answer(900)
    assert not walltime.take(1), "once refused, nothing more is begun"


def test_time_in_which_there_was_nothing_to_do_does_not_count() -> None:
    clock = Clock()
    walltime = Walltime(2000.0, 0.0, clock)
    walltime.take(100)
    clock.now = 1010.0
    walltime.answer(100)
    walltime.pause()
    clock.now = 1900.0  # waited for the chunks of others
    assert walltime.take(900), "100 s are left, at 10 rows a second"
    assert not walltime.take(200)


def test_pausing_twice_counts_once() -> None:
    clock = Clock()
    walltime = Walltime(2000.0, 0.0, clock)
    walltime.pause()
    walltime.take(10)
    clock.now = 1001.0
    walltime.answer(10)
    walltime.pause()
    clock.now = 1500.0
    walltime.pause()
    assert walltime.take(4999)
