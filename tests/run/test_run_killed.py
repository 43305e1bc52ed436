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
from harness import TINY, WAIT_S, environment, nothing_left_over, parts, results, run_cli, run_json, segments, write

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PIPELINE_TEST_KILLS", "4"))
JOURNAL_S = 1.0
CHUNK_ROWS = 40
NUM_ROWS = 400
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
    """An output, and the processes that work on it one after another or at once; and the next output."""

    folder: Path
    settings: list[str]
    rng: random.Random
    rounds: int = 0
    lives: list[Life] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / f"out{self.rounds}"

    def begin(self) -> None:
        """With an output that is not there yet."""
        self.rounds += 1
        self.lives = []

    def start(self) -> Life:
        log = self.folder / f"{self.rounds}-{len(self.lives)}.log"
        process = subprocess.Popen(
            [sys.executable, str(WITNESS), str(log), *self.settings, f"output.dir={self.out}"],
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
        rows_s, write_s, wanted = self.rng.uniform(0, 1.6), self.rng.uniform(0, 0.08), self.rng.randint(1, 2)

        def soon(life: Life) -> bool:
            if aim == "rows":
                done = [when for when, what, _ in life.look() if what == "done"]
                return bool(done) and time.monotonic() - done[0] > rows_s
            if life.count(aim) < wanted:
                return False
            time.sleep(write_s)
            return True

        return soon

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
    settings = [
        *MODES[mode](request.getfixturevalue("small_model")), f"data.path={data}", "quant=none", "task.chat=false",
        f"data.chunk_rows={CHUNK_ROWS}", "engine.slots=16", "sampling.max_new_tokens=60",
        f"output.journal_s={JOURNAL_S}",
    ]  # fmt: skip
    made = Lab(tmp_path, settings, random.Random(mode))
    yield made
    for life in made.lives:
        if life.process.poll() is None:
            life.kill()


@pytest.fixture
def whole(lab: Lab) -> Path:
    """The run that nobody interrupts."""
    run_cli(*lab.settings, f"output.dir={lab.folder / 'whole'}").done()
    return lab.folder / "whole"


def assert_as_if_never_killed(out: Path, whole: Path) -> None:
    assert results(out).equals(results(whole)) and results(out).num_rows == NUM_ROWS
    assert nothing_left_over(out)
    assert run_json(out)["summary"] == run_json(whole)["summary"]


AIMS = ("commit", "rows", "journal", "commit", "rows", "commit", "start")


def kill_one_after_another(lab: Lab, most: int) -> None:
    """At most so many processes on one output, fewer where it is done before; then one that nobody kills."""
    for _ in range(most):
        life = lab.start()
        if not lab.kill_when(life, lab.moment(lab.rng.choice(AIMS))):
            break
        known = on_disk(lab.out)
        lost = {row: life.died_at - when for row, when in life.done.items() if row not in known}
        assert all(age < life.bound_s for age in lost.values()), (lost, life.bound_s)
    known = on_disk(lab.out)
    last = lab.start()
    assert lab.finish(last) == 0
    assert not last.done.keys() & known, "what is on the disk is not computed again"


def kill_some_of_three(lab: Lab, most: int) -> None:
    """The same for three at a time; whoever is killed begins again."""
    at_work = [lab.start() for _ in range(3)]
    kills = 0
    while kills < most and any(life.process.poll() is None for life in at_work):
        place = lab.rng.randrange(3)
        if lab.kill_when(at_work[place], lab.moment(lab.rng.choice(AIMS))):
            kills += 1
            at_work[place] = lab.start()
    for life in at_work:
        lab.finish(life)
    assert lab.finish(lab.start()) == 0


@pytest.mark.parametrize(
    ("lab", "kill"),
    [("greedy", kill_one_after_another), ("sampled", kill_one_after_another), ("sampled", kill_some_of_three)],
    ids=["greedy", "sampled", "three processes"],
    indirect=["lab"],
)
def test_killed_again_and_again(
    lab: Lab, kill: Callable[[Lab, int], None], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    landed: Counter[str] = Counter()
    again = 0
    while landed.total() < KILLS:
        lab.begin()
        kill(lab, KILLS - landed.total())
        landed.update(life.landing for life in lab.lives if life.died_at is not None)
        again += lab.assert_little_done_twice()
        assert_as_if_never_killed(lab.out, whole)
    with capsys.disabled():
        print(f"\n{landed.total()} kills in {lab.rounds} runs landed {dict(landed)}; {again} rows were computed twice")
    assert landed["writing a Part"] + landed["after publishing"] >= KILLS // 5
