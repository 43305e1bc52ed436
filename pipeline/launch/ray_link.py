"""This process's end of the link to the one that speaks with Ray (`ray_driver.py`): lines of JSON, both ways."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import Any

from pipeline.errors import ConfigError, Interrupted
from pipeline.launch.ray_plan import RayNode
from pipeline.process import Stopping
from pipeline.settings import RaySettings

PROBE_S = 5.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ENABLE_AUTO_CONNECT": "0"}
"""For the process that speaks with Ray; the last one, since Ray Data's threads would start a new Ray after the end."""
LOOK_S = 0.1
CONNECT_S = 60.0
"""Longest wait for a cluster whose port answers."""
END_S = 30.0

Told = dict[str, Any]
"""What is said in one line."""


class RayLink:
    """The process that speaks with Ray, in a session of its own: what a terminal signals is for its parent."""

    def __init__(self, settings: RaySettings, *, may_start: bool) -> None:
        """Nothing is started yet; `may_start`: a Ray of this machine's own where no other is asked for or found."""
        self._address = settings.address
        self._may_start = may_start
        self._process: subprocess.Popen[str] | None = None
        self.words: deque[str] = deque(maxlen=50)

    def start(self, hear: Callable[[Told | None], None]) -> None:
        """Start it; `hear` is called in a thread. Raises ConfigError where nobody listens."""
        refuse_unreachable(self._address)
        command = [sys.executable, "-m", "pipeline.launch.ray_driver", self._address or ""]
        self._process = process = subprocess.Popen(  # noqa: S603  # this Python and this package
            [*command, "start" if self._may_start else "look"],
            env=os.environ | QUIET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                hear(json.loads(line))
            process.wait()
            hear(None)

        def keep() -> None:
            assert process.stderr is not None
            self.words.extend(line.strip() for line in process.stderr if line.strip())

        for body in (listen, keep):
            threading.Thread(target=body, daemon=True).start()

    def nodes(self, heard: Callable[..., Told | None], stopping: Stopping) -> list[RayNode] | None:
        """The nodes of the cluster, None where there is none; raises ConfigError if it does not take us."""
        for _ in range(int(CONNECT_S / LOOK_S)):
            if stopping():
                raise Interrupted("stopped while connecting to Ray")
            with suppress(Empty):
                told = heard(timeout=LOOK_S)
                if told is None or "refused" in told:
                    why = self.last_words() if told is None else told["refused"]
                    raise ConfigError(f"{self._asked()}, but Ray does not take us: {why}")
                if told["nodes"] is None:
                    return None
                return [RayNode(**node) for node in told["nodes"]]
        raise ConfigError(f"{self._asked()}, but Ray has not answered within {CONNECT_S:.0f} s; look at `ray status`")

    def tell(self, line: str) -> None:
        """One line; it may be gone."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()

    def last_words(self) -> str:
        """The last line that it or Ray has written."""
        return self.words[-1] if self.words else "nothing was said"

    def end(self) -> None:
        """Let it end, which ends the workers."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _asked(self) -> str:
        named = os.environ.get("RAY_ADDRESS")
        return f"RAY_ADDRESS={named}" if self._address is None and named else f"launcher.address={self._address}"


def refuse_unreachable(address: str | None) -> None:
    """Raise ConfigError if nobody listens at host:port, which Ray would take two minutes to find out, then abort."""
    asked = address if address is not None else os.environ.get("RAY_ADDRESS")
    if asked in (None, "", "auto", "local"):
        return
    key = "RAY_ADDRESS" if address is None else "launcher.address"
    host, _, port = asked.rpartition(":")
    if not host or not port.isdecimal() or "/" in asked:
        raise ConfigError(f"{key}={asked} is no host:port; start this on a machine of the cluster and name its head")
    try:
        socket.create_connection((host, int(port)), PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"{key}={asked} does not answer ({error.strerror or error}); `ray status` on the cluster's head tells its "
            "address, and `ray start --head` starts one"
        ) from error
