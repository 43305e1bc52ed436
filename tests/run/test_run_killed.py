"""SIGKILL at any moment, again and again: the same table in the end, and only seconds of work done twice.

PIPELINE_TEST_KILLS says how many kills each of these tests has; with 25 they take some minutes each.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pytest
from harness import TINY, WAIT_S, environment, nothing_left_over, parts, results, run_here, run_json, segments, write

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PIPELINE_TEST_KILLS", "4"))
JOURNAL_S = 1.0
CHUNK_ROWS = 20
NUM_ROWS = 80 + 30 * KILLS
WITNESS = Path(__file__).with_name("witness.py")
Row = tuple[str, int]

MODES = {
    "greedy": lambda model: ["model=path", f"model.path={model}"],
    "sampled": lambda model: [f"model.path={TINY}", "sampling.temperature=3.0", "sampling.n=2", "sampling.logprobs=1"],
}


@dataclass
class Life:
    """One process from its start to its end, seen through its witness."""

    process: subprocess.Popen[bytes]
    log: Path
    died_at: float | None = None
    seen: int = field(default=0)

    @cached_property
    def lines(self) -> list[tuple[float, str, str]]:
        """Everything it did; only to be asked for after its end."""
        assert self.process.poll() is not None
        return self.look()

    def look(self) -> list[tuple[float, str, str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        split = [line.split(" ", 2) for line in lines]
        return [(float(when), what, rest) for when, what, rest in split]

    def count(self, what: str) -> int:
        return sum(line[1] == what for line in self.look())

    def kill(self) -> None:
        self.died_at = time.monotonic()
        self.process.kill()
        self.process.wait()

    @property
    def done(self) -> dict[Row, float]:
        """When it had the answers of which rows."""
        return {_row(rest): when for when, what, rest in self.lines if what == "done"}

    @property
    def landing(self) -> str:
        """What it was doing when it was killed."""
        last = [what for _, what, _ in self.lines if what not in ("done",)][-1:]
        if not last:
            return "importing"
        if last == ["start"]:
            return "computing" if self.done else "loading"
        names = {"commit": "writing a Part", "published": "after publishing", "journal": "writing the journal"}
        return names.get(last[0], "computing")

    @property
    def bound_s(self) -> float:
        """How old an answer may be and still be lost: journal_s, if no write took longer than half of that."""
        began: dict[str, float] = {}
        longest = 0.0
        for when, what, _ in [*self.lines, (self.died_at or 0.0, "end", "")]:
            if what in ("commit", "journal"):
                began[what] = when
            for start, ends in (("commit", ("committed", "end")), ("journal", ("journaled", "end"))):
                if what in ends and start in began:
                    longest = max(longest, when - began.pop(start))
        return max(JOURNAL_S, JOURNAL_S / 2 + 3 * longest)


def _row(rest: str) -> Row:
    chunk, index = rest.split()
    return chunk, int(index)


def on_disk(out: Path) -> set[Row]:
    """The rows that are in a Part or a whole segment, read without the pipeline's code."""
    rows = {(part.stem.removeprefix("part-"), row) for part in parts(out) for row in range(CHUNK_ROWS)}
    for path in segments(out):
        data = path.read_bytes()
        head, digest, content = data[:8], data[8:40], data[40:]
        if head == b"rows-1\r\n" and hashlib.blake2b(content, digest_size=32).digest() == digest:
            chunk = re.fullmatch(r"rows-(\d+-\d+)\..*", path.name)
            assert chunk is not None
            rows |= {(chunk[1], row) for row in pa.ipc.open_stream(content).read_all()["row"].to_pylist()}
    return rows


@dataclass
class Lab:
    """An output, and the processes that work on it one after another or at once."""

    out: Path
    command: list[str]
    logs: Path
    rng: random.Random
    lives: list[Life] = field(default_factory=list)

    def start(self) -> Life:
        log = self.logs / f"{len(self.lives)}.log"
        process = subprocess.Popen(
            [sys.executable, str(WITNESS), str(log), *self.command],
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=log.with_suffix(".err").open("wb"),
        )  # fmt: skip
        self.lives.append(Life(process, log))
        return self.lives[-1]

    def finish(self, life: Life) -> int:
        """To its own end; its exit code."""
        code = life.process.wait(WAIT_S)
        assert code in (0, 75), life.log.with_suffix(".err").read_text()
        return code

    def moment(self, aim: str) -> Callable[[Life], bool]:
        """Whether it is time to kill a process: at any time after its start or its first answers, or at a write."""
        if aim == "start":
            delay, began = self.rng.uniform(0, 6), time.monotonic()
            return lambda life: time.monotonic() - began > delay
        if aim == "rows":
            delay, first = self.rng.uniform(0, 2), []

            def some_time_after_the_first_row(life: Life) -> bool:
                if not first and life.count("done"):
                    first.append(time.monotonic())
                return bool(first) and time.monotonic() - first[0] > delay

            return some_time_after_the_first_row
        wanted, delay = self.rng.randint(1, 3), self.rng.uniform(0, 0.02)

        def soon_after_a_write_began(life: Life) -> bool:
            if life.count(aim) < wanted:
                return False
            time.sleep(delay)
            return True

        return soon_after_a_write_began

    def kill_when(self, life: Life, moment: Callable[[Life], bool]) -> bool:
        """Kill it then; False if it ended before."""
        deadline = time.monotonic() + WAIT_S
        while not moment(life):
            assert time.monotonic() < deadline, life.log.with_suffix(".err").read_text()
            if life.process.poll() is not None:
                self.finish(life)
                return False
            time.sleep(0.001)
        life.kill()
        return life.process.returncode == -signal.SIGKILL

    def assert_little_done_twice(self) -> int:
        """Every row that was computed again had been answered in the last seconds of a process that was killed."""
        answered: dict[Row, list[tuple[float, Life]]] = defaultdict(list)
        for life in self.lives:
            for row, when in life.done.items():
                answered[row].append((when, life))
        again = 0
        for row, times in answered.items():
            times.sort(key=lambda one: one[0])
            for when, life in times[:-1]:
                assert life.died_at is not None, f"{row} was computed again after a process that was not killed"
                assert life.died_at - when < life.bound_s, (
                    f"{row} was lost {life.died_at - when:.2f} s after its answer"
                )
                again += 1
        return again


@pytest.fixture
def lab(request: pytest.FixtureRequest, tickets: list[str], tmp_path: Path) -> Iterator[Lab]:
    mode = request.param
    columns = {"key": list(range(NUM_ROWS)), "prompt": [tickets[row] for row in range(NUM_ROWS)]}
    data = write(tmp_path / "in.parquet", columns)
    (tmp_path / "logs").mkdir()
    command = [
        *MODES[mode](request.getfixturevalue("small_model")), f"data.path={data}", f"output.dir={tmp_path / 'out'}",
        "quant=none", "task.chat=false", f"data.chunk_rows={CHUNK_ROWS}", "engine.slots=16",
        "sampling.max_new_tokens=60", f"output.journal_s={JOURNAL_S}",
    ]  # fmt: skip
    made = Lab(tmp_path / "out", command, tmp_path / "logs", random.Random(mode))
    yield made
    for life in made.lives:
        if life.process.poll() is None:
            life.kill()


def assert_as_if_never_killed(lab: Lab, tmp_path: Path) -> None:
    run_here(*lab.command, f"output.dir={tmp_path / 'whole'}").done()
    found, whole = results(lab.out), results(tmp_path / "whole")
    assert found.equals(whole) and found.num_rows == NUM_ROWS
    assert nothing_left_over(lab.out)
    summaries = [run_json(out)["summary"] for out in (lab.out, tmp_path / "whole")]
    assert summaries[0] == summaries[1]


AIMS = ("commit", "rows", "journal", "rows", "commit", "rows", "start")


@pytest.mark.parametrize("lab", MODES, indirect=True)
def test_killed_again_and_again(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kills = 0
    for number in range(10 * KILLS):
        life = lab.start()
        if not lab.kill_when(life, lab.moment(AIMS[number % len(AIMS)])):
            break
        kills += 1
        known = on_disk(lab.out)
        lost = {row: life.died_at - when for row, when in life.done.items() if row not in known}
        assert all(age < life.bound_s for age in lost.values()), (lost, life.bound_s)
        if kills == KILLS:
            break
    known = on_disk(lab.out)
    last = lab.start()
    assert lab.finish(last) == 0
    assert not last.done.keys() & known, "what is on the disk is not computed again"
    again = lab.assert_little_done_twice()
    landed = Counter(life.landing for life in lab.lives if life.died_at is not None)
    with capsys.disabled():
        print(f"\n{kills} kills of {NUM_ROWS} rows landed {dict(landed)}; {again} rows were computed twice")
    assert kills >= min(KILLS, 3)
    assert landed["writing a Part"] + landed["after publishing"] >= KILLS // 5
    assert_as_if_never_killed(lab, tmp_path)


@pytest.mark.parametrize("lab", ["sampled"], indirect=True)
def test_three_at_once_killed_at_random(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at_work = [lab.start() for _ in range(3)]
    kills = 0
    while kills < KILLS and any(life.process.poll() is None for life in at_work):
        place = lab.rng.randrange(3)
        if lab.kill_when(at_work[place], lab.moment(lab.rng.choice(AIMS))):
            kills += 1
            at_work[place] = lab.start()
    for life in at_work:
        lab.finish(life)
    assert lab.finish(lab.start()) == 0
    again = lab.assert_little_done_twice()
    landed = Counter(life.landing for life in lab.lives if life.died_at is not None)
    with capsys.disabled():
        print(f"\n{kills} kills of three processes landed {dict(landed)}; {again} rows were computed twice")
    assert kills >= min(KILLS, 3)
    assert_as_if_never_killed(lab, tmp_path)
