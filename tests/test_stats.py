"""The intervals of a process's work: none is lost, and their number does not grow with the time."""

from __future__ import annotations

from itertools import count

import pytest

from pipeline.engine.engine import EngineCounters
from pipeline.stats import IntervalRecorder


def test_a_long_run_has_longer_intervals_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stats.MOST_INTERVALS", 8)
    clock = count()
    monkeypatch.setattr("pipeline.stats.time.perf_counter", lambda: float(next(clock)))
    recorder, counters = IntervalRecorder("run", "attempt"), EngineCounters()
    for second in range(1, 200):
        counters.decode_steps += second
        counters.prefill_s += 0.5
        recorder.tick(counters, 10 * second, second, 2 * second)
        assert len(recorder.intervals) < 8
    recorder.tick(counters, 2000, 0, 0, last=True)
    intervals = recorder.intervals
    assert sum(i.seconds for i in intervals) == 200
    assert sum(i.rows for i in intervals) == 2000
    assert sum(i.decode_steps for i in intervals) == sum(range(200))
    assert sum(i.prefill_s for i in intervals) == 199 / 2
    assert len({i.seconds for i in intervals[:-1]}) == 1
    assert intervals[-1].running == 0
    assert [i.ended_at for i in intervals] == sorted(i.ended_at for i in intervals)
