"""Leases on chunks, so that several processes can share one output without doing the same work.

Claims are advisory. After a suspended process or a lost network two processes may hold the same
chunk; that costs double work and nothing else, because the exclusive publish of a Part is the
commit (see `sink.py`).
"""

from __future__ import annotations

import logging
import threading
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from pipeline.output.durable import failing_run, reason

if TYPE_CHECKING:
    from types import TracebackType

RUN_CLAIM = "run"
"""The id of the claim under which run.json is changed."""
SCHEDULE_CLAIM = "schedule"
"""The id of the claim that keeps scheduled runs from overlapping; every other id is a chunk's."""
NO_CHUNKS = (RUN_CLAIM, SCHEDULE_CLAIM)
SUFFIX = ".json"
TICKET_SUFFIX = ".ticket"
"""Of the name that stands for the right to evict one stale claim."""

_BEATS_PER_LEASE = 6
_log = logging.getLogger(__name__)


class Claims(ABC):
    """The claims of one process; a context manager, since a thread renews what is held.

    A claim may be taken over when its owner's process has ended on this machine, or when it was not
    renewed for `lease_s` seconds by the store's own clock. A claim that somebody took over is `lost`;
    that does not stop its loser, whose commit just comes second.
    """

    patience_s: ClassVar[float] = 10.0
    """How long whoever waits for a claim tries, and how often."""
    retry_s: ClassVar[float] = 0.05

    def __init__(self, lease_s: float) -> None:
        """Nothing is touched before the context is entered."""
        self.attempt = uuid.uuid4().hex
        self.lease_s = lease_s
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._changing = threading.RLock()  # one claim is looked at or changed at a time
        self._closing = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="claims-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Start renewing; ConfigError where there can be no claims."""
        self._open()
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything held, and remove what dead processes left; a store that fails is not asked again."""
        self._closing.set()
        self._heartbeat.join()
        if all(self._give_back(claim_id) for claim_id in self.held() | self.lost()):
            try:
                self._sweep()
            except OSError as problem:
                _log.warning("claims of ended processes stay in %s (%s)", self._shown(), reason(problem))

    def try_claim(self, claim_id: str) -> bool:
        """Take the claim if it is free or stale; False while anybody, this object included, holds it.

        Raises RunFailed when it cannot be written.
        """
        with self._changing, failing_run(self._shown(claim_id)):
            if claim_id in self._held:
                return False
            taken = self._take(claim_id)
            if taken:
                self._held.add(claim_id)
                self._lost.discard(claim_id)
            return taken

    def release(self, claim_id: str) -> None:
        """Give a claim back, and forget it if it was lost. Never fails: what stays behind turns stale."""
        self._give_back(claim_id)

    def confirm(self, claim_id: str) -> bool:
        """Whether this object holds the claim and nobody has taken it over, looked up now.

        Raises RunFailed when it cannot be read.
        """
        with self._changing, failing_run(self._shown(claim_id)):
            return claim_id in self._held and self._is_mine(claim_id)

    def held(self) -> set[str]:
        """The ids that this object holds."""
        with self._changing:
            return set(self._held)

    def lost(self) -> set[str]:
        """The ids that somebody else took over, or removed, while this object held them."""
        with self._changing:
            return set(self._lost)

    @abstractmethod
    def others(self) -> int:
        """How many chunks other processes hold at this moment."""

    def _give_back(self, claim_id: str) -> bool:
        """Release a claim; False if the store would not."""
        with self._changing:
            if claim_id not in self._held | self._lost:
                return True
            self._held.discard(claim_id)
            self._lost.discard(claim_id)
            try:
                if self._is_mine(claim_id):
                    self._remove(claim_id)
            except OSError as error:
                _log.warning("claim %s could not be released (%s)", claim_id, reason(error))
                return False
            return True

    def _beat(self) -> None:
        while not self._closing.wait(self.lease_s / _BEATS_PER_LEASE):
            for claim_id in self.held():
                self._renew(claim_id)

    def _renew(self, claim_id: str) -> None:
        """Prolong a claim if it still is this object's; what fails now is tried again at the next beat."""
        with self._changing:
            if claim_id not in self._held:
                return
            try:
                if self._is_mine(claim_id):
                    self._prolong(claim_id)
                    return
            except FileNotFoundError:
                pass  # taken over between the look and the renewal
            except OSError as error:
                _log.warning("claim %s could not be renewed (%s)", claim_id, reason(error))
                return
            self._held.remove(claim_id)
            self._lost.add(claim_id)

    # What a kind of store does; all of these may raise OSError.

    @abstractmethod
    def _open(self) -> None:
        """Make the place of the claims."""

    @abstractmethod
    def _take(self, claim_id: str) -> bool:
        """Make the claim if it is free or stale."""

    @abstractmethod
    def _is_mine(self, claim_id: str) -> bool:
        """Whether the claim that is there names this attempt."""

    @abstractmethod
    def _prolong(self, claim_id: str) -> None:
        """Make a claim of this attempt look new; FileNotFoundError if it is gone."""

    @abstractmethod
    def _remove(self, claim_id: str) -> None:
        """Remove a claim if it is there."""

    @abstractmethod
    def _sweep(self) -> None:
        """Remove stale claims and whatever else killed processes left."""

    @abstractmethod
    def _shown(self, claim_id: str | None = None) -> str:
        """Where a claim is, or all of them, for messages."""
