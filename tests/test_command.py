"""Signals: before anything could be saved they end a process at once, whatever it is at; later it is asked to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

# Says `ready`, then sleeps as an import or a download does, which asks for no signals. Once `over`, it works.
COMMAND = """
import sys, time
from pipeline.command import guarded, until_loaded

def body(console, stopping):
    with until_loaded(console, stopping) as loading:
        if sys.argv[1] == "over":
            loading.over()
        print("ready", flush=True)
        for _ in range(50 if sys.argv[1] == "over" else 1):
            time.sleep(30 / 50 if sys.argv[1] == "over" else 30)
            if stopping():
                time.sleep(0.5)  # longer than anybody takes to look
                print("saved", flush=True)
                return 75
    return 0

sys.exit(guarded(body))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("when", ["loading", "over"])
def test_a_signal_ends_the_loading_at_once_and_the_work_in_order(when: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", COMMAND, when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        sent = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=25)
        assert process.returncode == 75
        assert out == ("saved\n" if when == "over" else "")
        assert err == ("stopped while loading; what is committed stays; run the same command again to go on\n") * (
            when == "loading"
        )
        assert time.monotonic() - sent < 5


def test_nothing_heavy_is_imported_before_signals_are_heard() -> None:
    """Hydra, pyarrow and what uses them: seconds on a cold disk, in which a signal would kill."""
    code = (
        "import sys, pipeline.__main__; print({'hydra', 'omegaconf', 'pyarrow', 'jinja2', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
