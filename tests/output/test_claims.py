"""Claims in a local folder, between real processes: exclusive, given back, taken over from the dead and the silent."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, RunFailed
from pipeline.output import local_claims as room
from pipeline.output.local_claims import LocalClaims as Claims
from pipeline.output.owner import Owner

ROOT = Path(room.__file__).parents[2]
CHUNK = "000000-000000000000"

# argv: claims folder, lease in seconds. Reads "claim ID", "lost", "held" and answers, until stdin ends.
SPEAKER = """
import sys
from pathlib import Path
from pipeline.output.local_claims import LocalClaims as Claims
with Claims(Path(sys.argv[1]), float(sys.argv[2])) as claims:
    for line in sys.stdin:
        verb, *ids = line.split()
        print(claims.try_claim(*ids) if verb == "claim" else sorted(getattr(claims, verb)()), flush=True)
"""

# argv: root, own number, number of claims. Claims all it can and holds until all four are done.
RACER = """
import sys, time
from pathlib import Path
from pipeline.output.local_claims import LocalClaims as Claims
root, me, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def meet(point):
    (root / f"{point}{me}").touch()
    while len(list(root.glob(f"{point}*"))) < 4:
        time.sleep(0.001)
with Claims(root / "claims") as claims:
    meet("start")
    got = [n for n in range(count) if claims.try_claim(f"{n:06d}-000000000000")]
    meet("end")
    assert claims.others() + len(got) == count, (claims.others(), len(got))
    meet("counted")
    print(*got)
"""


@contextmanager
def speaker(folder: Path, lease_s: float = 60) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """Another process with Claims of its own, and a function that makes it do something."""
    command = [sys.executable, "-c", SPEAKER, str(folder), str(lease_s)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(line: str) -> str:
        print(line, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    try:
        yield process, say
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()


def write_claim(folder: Path, owner: Owner | None, age_s: float = 0) -> Path:
    """A claim on CHUNK by somebody else."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{CHUNK}.json"
    path.write_text(json.dumps(asdict(owner)) if owner else "")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def refuse_link(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def race(root: Path, count: int) -> list[list[str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(root), str(me), str(count)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for me in range(4)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    return [output.split() for output in outputs]


def wait_until(condition: Callable[[], bool], limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Taking and giving back


def test_a_claim_is_exclusive_until_released(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as one, Claims(tmp_path / "claims") as two:
        assert one.try_claim(CHUNK)
        assert not two.try_claim(CHUNK)
        assert not one.try_claim(CHUNK)
        assert (one.held(), two.held(), one.others(), two.others()) == ({CHUNK}, set(), 0, 1)
        two.release(CHUNK)
        assert not two.try_claim(CHUNK)
        one.release(CHUNK)
        assert two.try_claim(CHUNK)
        assert one.lost() == two.lost() == set()


def test_a_claim_tells_its_owner(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as claims:
        claims.try_claim(CHUNK)
        owner = json.loads((tmp_path / "claims" / f"{CHUNK}.json").read_text())
    assert (owner["attempt"], owner["pid"], owner["host"]) == (claims.attempt, os.getpid(), os.uname().nodename)
    assert owner["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert f"pid:[{owner['pid_namespace']}]" == os.readlink("/proc/self/ns/pid")


def test_closing_releases_everything_and_leaves_the_folder_empty(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Claims(folder) as claims:
        assert all(claims.try_claim(f"00000{n}-000000000000") for n in range(5))
        assert len(list(folder.iterdir())) == 5
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), Claims(folder) as claims:
        claims.try_claim(CHUNK)
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []


def test_closing_removes_what_the_dead_left_but_not_what_others_hold(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with speaker(folder) as (process, say):
        assert say("claim 000007-000000000000") == "True"
        process.kill()
    with Claims(folder) as other:
        assert other.try_claim("000008-000000000000")
        (folder / ".x.tmp").touch()
        os.utime(folder / ".x.tmp", (0, 0))
        (folder / ".y.tmp").touch()
        with Claims(folder):
            assert len(list(folder.iterdir())) == 4
        assert sorted(path.name for path in folder.iterdir()) == [".y.tmp", "000008-000000000000.json"]


def test_the_claim_on_run_json_is_not_a_chunk_of_others(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as one, Claims(tmp_path / "claims") as two:
        assert one.try_claim("run")
        assert one.try_claim(CHUNK)
        assert two.others() == 1


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"output\.dir .*claims \(Not a directory\)"),
        Claims(tmp_path / "file/claims"),
    ):
        pass

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Claims(tmp_path / "claims") as claims:
        monkeypatch.setattr(os, "link", broken)
        with pytest.raises(RunFailed, match=rf"{CHUNK}\.json could not be written \(No space left on device\)"):
            claims.try_claim(CHUNK)
        assert list((tmp_path / "claims").iterdir()) == []


# Taking over


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_process_loses_its_claim_at_once(tmp_path: Path, reaped: bool) -> None:
    with speaker(tmp_path / "claims") as (process, say), Claims(tmp_path / "claims") as claims:
        assert say(f"claim {CHUNK}") == "True"
        assert not claims.try_claim(CHUNK)
        assert claims.others() == 1
        process.kill()
        if reaped:
            process.wait()
        else:
            wait_until(lambda: ") Z " in Path(f"/proc/{process.pid}/stat").read_text())
        assert claims.others() == 0
        assert claims.try_claim(CHUNK)


def test_a_reused_pid_is_not_its_predecessor(tmp_path: Path) -> None:
    me = Owner.current("other")
    write_claim(tmp_path / "claims", replace(me, started=me.started - 1))
    with Claims(tmp_path / "claims") as claims:
        assert claims.try_claim(CHUNK)


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot_id": "x"}, {"boot_id": None}, {"pid_namespace": 1}])
def test_a_claim_of_another_machine_only_goes_by_its_age(tmp_path: Path, other: dict[str, object]) -> None:
    owner = replace(Owner.current("other"), pid=2**22 + 1, **other)
    with Claims(tmp_path / "claims", lease_s=60) as claims:
        write_claim(tmp_path / "claims", owner, age_s=50)
        assert not claims.try_claim(CHUNK)
        assert claims.others() == 1
        write_claim(tmp_path / "claims", owner, age_s=70)
        assert claims.others() == 0
        assert claims.try_claim(CHUNK)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "null"])
def test_a_claim_without_an_owner_only_goes_by_its_age(tmp_path: Path, content: str) -> None:
    with Claims(tmp_path / "claims", lease_s=60) as claims:
        for age_s, taken in ((50, False), (70, True)):
            path = write_claim(tmp_path / "claims", None, age_s)
            path.write_text(content)
            os.utime(path, (time.time() - age_s,) * 2)
            assert claims.try_claim(CHUNK) == taken


def test_age_is_measured_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = replace(Owner.current("other"), host="elsewhere")
    with Claims(tmp_path / "claims") as claims:
        write_claim(tmp_path / "claims", owner, age_s=50)
        for wrong_s in (-1e6, 1e6):
            with monkeypatch.context() as patch:
                now = time.time()
                patch.setattr(time, "time", lambda now=now, wrong_s=wrong_s: now + wrong_s)
                assert not claims.try_claim(CHUNK)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_claim_that_changed_after_it_was_judged_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_link)
    path = write_claim(tmp_path / "claims", Owner.current("first"))
    judged = room._read(path)
    path = write_claim(tmp_path / "claims", Owner.current("second"))
    content = path.read_text()
    assert not room._evict(path, judged.ticket(path), judged)
    assert path.read_text() == content
    assert list((tmp_path / "claims").iterdir()) == [path]
    judged = room._read(path)
    assert room._evict(path, judged.ticket(path), judged)
    assert list((tmp_path / "claims").iterdir()) == []


def test_an_eviction_that_was_cut_short_blocks_for_a_lease_only(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims", lease_s=0.5) as claims:
        path = write_claim(tmp_path / "claims", replace(Owner.current("dead"), started=1))
        os.link(path, room._read(path).ticket(path))
        assert not claims.try_claim(CHUNK)
        wait_until(lambda: claims.try_claim(CHUNK))


# Renewing and losing


def test_the_heartbeat_keeps_a_claim_beyond_its_lease(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims", lease_s=0.6) as one, Claims(tmp_path / "claims", lease_s=0.6) as two:
        assert one.try_claim(CHUNK)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert not two.try_claim(CHUNK)
            time.sleep(0.05)
        assert one.held() == {CHUNK}


def test_a_stopped_process_finds_its_claim_lost_and_does_not_take_it_back(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with speaker(folder, lease_s=0.6) as (process, say), Claims(folder, lease_s=0.6) as claims:
        assert say(f"claim {CHUNK}") == "True"
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: claims.try_claim(CHUNK))
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: say("lost") == f"['{CHUNK}']")
        assert say("held") == "[]"
        process.communicate(timeout=20)
        assert claims.held() == {CHUNK}
        assert (folder / f"{CHUNK}.json").exists()


def test_a_claim_that_was_removed_is_lost_and_can_be_taken_again(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims", lease_s=0.3) as claims:
        assert claims.try_claim(CHUNK)
        (tmp_path / "claims" / f"{CHUNK}.json").unlink()
        wait_until(lambda: claims.lost() == {CHUNK})
        assert claims.held() == set()
        assert claims.try_claim(CHUNK)
        assert claims.lost() == set()


def test_a_failing_renewal_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Claims(tmp_path / "claims", lease_s=0.3) as claims:
        assert claims.try_claim(CHUNK)
        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", broken)
            wait_until(lambda: "could not be renewed (Input/output error)" in caplog.text)
        assert claims.held() == {CHUNK}
        assert claims.lost() == set()


# Races


def test_of_four_processes_each_claim_has_one_winner(tmp_path: Path) -> None:
    won = race(tmp_path, 200)
    assert Counter(claim for got in won for claim in got) == {str(n): 1 for n in range(200)}
    assert list((tmp_path / "claims").iterdir()) == []


def test_of_four_processes_one_takes_over_each_claim_of_a_dead_one(tmp_path: Path) -> None:
    with speaker(tmp_path / "claims") as (process, say):
        assert all(say(f"claim {n:06d}-000000000000") == "True" for n in range(100))
        process.kill()
    won = race(tmp_path, 100)
    assert Counter(claim for got in won for claim in got) == {str(n): 1 for n in range(100)}
    assert list((tmp_path / "claims").iterdir()) == []


def test_without_hard_links_claims_work_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse_link)
    with Claims(tmp_path / "claims") as one, Claims(tmp_path / "claims") as two:
        assert one.try_claim(CHUNK)
        assert not two.try_claim(CHUNK)
        one.release(CHUNK)
        write_claim(tmp_path / "claims", Owner.current("other"), age_s=100)
        assert two.try_claim(CHUNK)
    assert list((tmp_path / "claims").iterdir()) == []
