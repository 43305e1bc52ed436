"""Claims anywhere: exclusive, given back, taken over from the dead and the silent, by the store's clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from stores import Place, Request, S3Server, s3_place, store_environment

from pipeline.errors import RunFailed
from pipeline.output.owner import Owner

CHUNK = "000000-000000000000"
NAME = f"claims/{CHUNK}.json"
ELSEWHERE = replace(Owner.current("other"), host="elsewhere")

# argv: lease in seconds. Reads "claim ID", "lost", "held" and answers, until stdin ends.
SPEAKER = """
import sys
from stores import store_from_environment
with store_from_environment().claims(float(sys.argv[1])) as claims:
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *ids = line.split()
        print(claims.try_claim(*ids) if verb == "claim" else sorted(getattr(claims, verb)()), flush=True)
"""


@contextmanager
def speaker(place: Place, lease_s: float = 60) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """Another process with claims of its own, and a function that makes it do something."""
    command = [sys.executable, "-c", SPEAKER, str(lease_s)]
    env = store_environment(place)
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(line: str) -> str:
        print(line, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    try:
        assert process.stdout.readline() == "ready\n"
        yield process, say
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3_only(s3: S3Server, request: pytest.FixtureRequest) -> Place:
    return s3_place(s3, f"claims-{abs(hash(request.node.name))}-{time.monotonic_ns()}")


def refuse(request: Request) -> Sequence[bytes]:
    return request.refuse(403, "AccessDenied")


def wait_until(condition: Callable[[], bool], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Taking and giving back


def test_a_claim_is_exclusive_until_released(place: Place) -> None:
    with place.store().claims() as one, place.store().claims() as two:
        assert one.try_claim(CHUNK)
        assert not two.try_claim(CHUNK)
        assert not one.try_claim(CHUNK)
        assert (one.held(), two.held(), one.others(), two.others()) == ({CHUNK}, set(), 0, 1)
        assert (one.confirm(CHUNK), two.confirm(CHUNK)) == (True, False)
        two.release(CHUNK)
        assert not two.try_claim(CHUNK)
        one.release(CHUNK)
        assert two.try_claim(CHUNK)
        assert one.lost() == two.lost() == set()


def test_closing_gives_everything_back(place: Place) -> None:
    with place.store().claims() as claims:
        assert all(claims.try_claim(f"00000{n}-000000000000") for n in range(3))
        owners = [json.loads(content) for content in place.files().values()]
        assert [(owner["attempt"], owner["pid"]) for owner in owners] == [(claims.attempt, os.getpid())] * 3
    with pytest.raises(KeyboardInterrupt), place.store().claims() as claims:
        claims.try_claim(CHUNK)
        raise KeyboardInterrupt
    assert place.files() == {}


def test_the_claim_on_run_json_is_not_a_chunk_of_others(place: Place) -> None:
    with place.store().claims() as one, place.store().claims() as two:
        assert one.try_claim("run")
        assert one.try_claim(CHUNK)
        assert two.others() == 1


def test_of_many_that_claim_at_once_exactly_one_does(place: Place) -> None:
    with ExitStack() as stack:
        claims = [stack.enter_context(place.store().claims()) for _ in range(5)]
        together = threading.Barrier(len(claims))

        def claim(one: Any) -> bool:
            together.wait()
            return one.try_claim(CHUNK)

        with ThreadPoolExecutor(len(claims)) as pool:
            for _ in range(3):
                won = list(pool.map(claim, claims))
                assert won.count(True) == 1
                claims[won.index(True)].release(CHUNK)
                place.put(NAME, ELSEWHERE.to_json())
                place.age(NAME, 70)
                won = list(pool.map(claim, claims))
                assert won.count(True) == 1, "a stale claim is taken over by one"
                claims[won.index(True)].release(CHUNK)
    assert place.files() == {}


# Taking over


def test_a_claim_of_another_machine_goes_by_its_age(place: Place) -> None:
    with place.store().claims(60) as claims:
        place.put(NAME, ELSEWHERE.to_json())
        place.age(NAME, 50)
        assert not claims.try_claim(CHUNK)
        assert claims.others() == 1
        place.age(NAME, 20)
        assert claims.others() == 0
        assert claims.try_claim(CHUNK)
        assert claims.confirm(CHUNK)


@pytest.mark.parametrize("content", ["{", '{"pid": 1}', "null"])
def test_a_claim_without_an_owner_goes_by_its_age(place: Place, content: str) -> None:
    with place.store().claims(60) as claims:
        place.put(NAME, content.encode())
        assert not claims.try_claim(CHUNK)
        place.age(NAME, 70)
        assert claims.try_claim(CHUNK)


def test_a_dead_process_of_this_machine_loses_its_claim_at_once(place: Place) -> None:
    with place.store().claims() as claims:
        place.put(NAME, replace(Owner.current("dead"), started=1).to_json())
        assert claims.others() == 0
        assert claims.try_claim(CHUNK)


def test_a_killed_process_loses_its_claim_at_once(s3_only: Place) -> None:
    with speaker(s3_only) as (process, say), s3_only.store().claims() as claims:
        assert say(f"claim {CHUNK}") == "True"
        assert not claims.try_claim(CHUNK)
        process.kill()
        process.wait()
        assert claims.try_claim(CHUNK)


@pytest.mark.parametrize("wrong_s", [-1e6, 1e6])
def test_age_goes_by_the_clock_of_the_store(s3_only: Place, monkeypatch: pytest.MonkeyPatch, wrong_s: float) -> None:
    from moto.s3 import models

    now = lambda: datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=wrong_s)  # noqa: E731  # as moto has it
    monkeypatch.setattr(models, "utcnow", now)
    with s3_only.store().claims(60) as claims:
        s3_only.put(NAME, ELSEWHERE.to_json())
        s3_only.age(NAME, 50)
        assert not claims.try_claim(CHUNK)
        s3_only.age(NAME, 20)
        assert claims.try_claim(CHUNK)


def test_the_clock_is_asked_again_when_it_is_old(s3_only: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour passes in the store, as for a machine that was suspended: its own monotonic clock stood still."""
    from moto.s3 import models

    with s3_only.store().claims(60) as claims:
        s3_only.put(NAME, ELSEWHERE.to_json())
        assert not claims.try_claim(CHUNK)
        later = lambda: datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=1)  # noqa: E731
        monkeypatch.setattr(models, "utcnow", later)
        assert not claims.try_claim(CHUNK), "by the first answer it is still young"
        monkeypatch.setattr(claims._clock, "_valid_s", 0.0)
        assert claims.try_claim(CHUNK)


def test_who_comes_between_the_steps_of_a_takeover_does_not_take_it_too(s3: S3Server, s3_only: Place) -> None:
    with s3.failing(None), s3_only.store().claims() as one, s3_only.store().claims() as two:
        s3_only.put(NAME, ELSEWHERE.to_json())
        s3_only.age(NAME, 70)
        other: list[bool] = []

        def come_between(request: Request) -> Sequence[bytes]:
            takes_over = request.method == "PUT" and request.path.endswith(NAME)
            if takes_over and "HTTP_IF_NONE_MATCH" not in request.environ:
                s3.fault = None
                other.append(two.try_claim(CHUNK))
            return request.carry_out()

        s3.fault = come_between
        assert one.try_claim(CHUNK)
        assert other == [False]
        assert (one.confirm(CHUNK), two.confirm(CHUNK)) == (True, False)


def test_a_cut_short_eviction_blocks_for_a_lease_only(s3_only: Place) -> None:
    with s3_only.store().claims(60) as claims:
        s3_only.put(NAME, ELSEWHERE.to_json())
        s3_only.age(NAME, 70)
        modified = s3_only.store().modified(NAME)
        name = f"claims/.{CHUNK}.other.{modified:%Y%m%dT%H%M%S%f}.ticket"
        s3_only.put(name, b"{}")
        assert not claims.try_claim(CHUNK)
        s3_only.age(name, 70)
        assert claims.try_claim(CHUNK)


def test_closing_removes_what_the_dead_left_but_not_what_others_hold(place: Place) -> None:
    if place.is_local:
        pytest.skip("in test_claims.py")
    left = {"000001-000000000000.json": ELSEWHERE.to_json(), ".clock.dead.tmp": b"now", ".x.y.1.ticket": b"{}"}
    for name, content in left.items():
        place.put(f"claims/{name}", content)
        place.age(f"claims/{name}", 70)
    living = {"claims/000002-000000000000.json": ELSEWHERE.to_json(), "claims/.clock.alive.tmp": b"now"}
    for name, content in living.items():
        place.put(name, content)
    with place.store().claims():
        pass
    assert place.files() == living


# Renewing and losing


def test_the_heartbeat_keeps_a_claim_beyond_its_lease(place: Place) -> None:
    if place.is_local:
        pytest.skip("in test_claims.py")
    with place.store().claims(3) as one, place.store().claims(3) as two:
        assert one.try_claim(CHUNK)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert not two.try_claim(CHUNK)
            time.sleep(0.3)
        assert one.held() == {CHUNK}


def test_a_stopped_process_finds_its_claim_lost_and_does_not_take_it_back(s3_only: Place) -> None:
    with speaker(s3_only, lease_s=2) as (process, say), s3_only.store().claims(2) as claims:
        assert say(f"claim {CHUNK}") == "True"
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: claims.try_claim(CHUNK))
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: say("lost") == f"['{CHUNK}']")
        assert say("held") == "[]"
        process.communicate(timeout=20)
        assert claims.confirm(CHUNK)
        assert list(s3_only.files()) == [NAME]


def test_a_claim_that_was_removed_is_lost_and_can_be_taken_again(place: Place) -> None:
    with place.store().claims(0.6) as claims:
        assert claims.try_claim(CHUNK)
        place.remove(NAME)
        assert not claims.confirm(CHUNK)
        wait_until(lambda: claims.lost() == {CHUNK})
        assert claims.held() == set()
        assert claims.try_claim(CHUNK)
        assert claims.lost() == set()


def test_a_failing_renewal_is_no_reason_to_stop(s3: S3Server, s3_only: Place, caplog: pytest.LogCaptureFixture) -> None:
    with s3_only.store().claims(1.5) as claims:
        assert claims.try_claim(CHUNK)
        with s3.failing(refuse):
            wait_until(lambda: "could not be renewed (" in caplog.text)
        assert claims.held() == {CHUNK}
        assert claims.lost() == set()
        before = s3_only.store().modified(NAME)
        wait_until(lambda: s3_only.store().modified(NAME) > before)


def test_a_store_that_refuses_ends_the_run_and_is_not_asked_for_every_claim(
    s3: S3Server, s3_only: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with s3.failing(None), s3_only.store().claims() as claims:
        assert all(claims.try_claim(f"00000{n}-000000000000") for n in (1, 2, 3))
        s3.fault = refuse
        with pytest.raises(RunFailed, match=rf"{s3_only.url}/{NAME} could not be written or read \(AccessDenied by"):
            claims.try_claim(CHUNK)
        before = len(s3.requests)
    assert len({path for _, path in s3.requests[before:]}) == 1
    assert caplog.text.count("could not be released (") == 1
