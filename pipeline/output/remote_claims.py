"""Claims in an object store: objects made on condition that there is none, and renewed by writing them again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pipeline.output.claims import NO_CHUNKS, SUFFIX, TICKET_SUFFIX, Claims
from pipeline.output.durable import failing_run
from pipeline.output.owner import Owner
from pipeline.output.store import CLAIMS

if TYPE_CHECKING:
    from pipeline.output.remote import RemoteStore


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A claim as it was read; `owner` is None when its content is not an owner's."""

    content: bytes
    owner: Owner | None
    modified: datetime


class RemoteClaims(Claims):
    """A claim is `claims/<id>.json`, made by an exclusive upload and renewed by another one.

    Its age goes by the store's clock. Of several processes that find a claim stale, the one that makes its
    ticket takes it over. There is no renewal on condition that the claim is still the same, so an owner that
    was taken for dead and wakes up between two of its own requests can write over its successor's claim:
    then two processes hold it until the successor's next heartbeat, and do the same work.
    """

    patience_s = 60.0
    retry_s = 0.5

    def __init__(self, store: RemoteStore, lease_s: float = 60.0) -> None:
        """Nothing is written before a claim is tried."""
        super().__init__(lease_s)
        self._store = store
        self._clock = _StoreClock(store, f"{CLAIMS}/.clock.{self.attempt}.tmp", lease_s)

    def others(self) -> int:
        """How many chunks other processes hold at this moment."""
        with failing_run(self._shown()):
            ids = [name.removesuffix(SUFFIX) for name in self._store.names(CLAIMS) if _is_claim(name)]
            records = [self._read(claim_id) for claim_id in ids if claim_id not in NO_CHUNKS]
            return sum(not self._is_own(record) and not self._is_stale(record) for record in records if record)

    def _shown(self, claim_id: str | None = None) -> str:
        return self._store.shown(CLAIMS if claim_id is None else _name(claim_id))

    def _open(self) -> None:
        """Nothing: there are no folders."""

    def _take(self, claim_id: str) -> bool:
        mine = Owner.current(self.attempt).to_json()
        if self._store.create(_name(claim_id), mine):
            return True
        judged = self._read(claim_id)
        if judged is None:  # given back meanwhile
            return self._store.create(_name(claim_id), mine)
        return self._is_stale(judged) and self._replace_stale(claim_id, judged, mine)

    def _is_mine(self, claim_id: str) -> bool:
        record = self._read(claim_id)
        return record is not None and self._is_own(record)

    def _prolong(self, claim_id: str) -> None:
        self._store.replace(_name(claim_id), self._store.read(_name(claim_id)))

    def _remove(self, claim_id: str) -> None:
        self._store.remove(_name(claim_id))

    def _read(self, claim_id: str) -> _Record | None:
        """A claim's content and age, or None if there is none."""
        name = _name(claim_id)
        try:
            content = self._store.read(name)
            return _Record(content=content, owner=Owner.parse(content), modified=self._store.modified(name))
        except FileNotFoundError:
            return None

    def _is_own(self, record: _Record) -> bool:
        return record.owner is not None and record.owner.attempt == self.attempt

    def _is_stale(self, record: _Record) -> bool:
        """Whether the owner is dead, or has not renewed for a lease."""
        return (record.owner is not None and record.owner.is_dead()) or self._is_old(record.modified)

    def _is_old(self, moment: datetime) -> bool:
        return self._clock.now() - moment > timedelta(seconds=self.lease_s)

    def _replace_stale(self, claim_id: str, judged: _Record, mine: bytes | None) -> bool:
        """Write over a claim that was judged stale, or remove it; of several callers one does.

        Who comes late, when the winner's ticket is gone again, finds another claim than it judged.
        """
        attempt = judged.owner.attempt if judged.owner else "unknown"
        ticket = f"{CLAIMS}/.{claim_id}.{attempt}.{judged.modified:%Y%m%dT%H%M%S%f}{TICKET_SUFFIX}"
        self._drop_abandoned(ticket)
        if not self._store.create(ticket, Owner.current(self.attempt).to_json()):
            return False
        try:
            if self._read(claim_id) != judged:
                return False
            if mine is None:
                self._remove(claim_id)
            else:
                self._store.replace(_name(claim_id), mine)
            return True
        finally:
            self._store.remove(ticket)

    def _drop_abandoned(self, name: str) -> None:
        """Remove what a killed process left between two of its requests, a lease ago."""
        try:
            if self._is_old(self._store.modified(name)):
                self._store.remove(name)
        except FileNotFoundError:
            pass

    def _sweep(self) -> None:
        """Remove stale claims, and what else killed processes left."""
        for name in self._store.names(CLAIMS):
            if not _is_claim(name):
                self._drop_abandoned(f"{CLAIMS}/{name}")
                continue
            claim_id = name.removesuffix(SUFFIX)
            judged = self._read(claim_id)
            if judged is not None and self._is_stale(judged):
                self._replace_stale(claim_id, judged, None)


class _StoreClock:
    """The store's time: asked for now and then, by writing an object, and carried on in between."""

    def __init__(self, store: RemoteStore, name: str, valid_s: float) -> None:
        """Nothing is asked yet; `name` is of the object that is written, and removed again."""
        self._store = store
        self._name = name
        self._valid_s = valid_s
        self._asked: tuple[datetime, float] | None = None

    def now(self) -> datetime:
        """The time by the store's clock: at most as late as it is there, so that nothing looks older than it is."""
        if self._asked is None or time.monotonic() - self._asked[1] > self._valid_s:
            self._store.replace(self._name, b"now")
            moment = self._store.modified(self._name)
            self._asked = (moment, time.monotonic())
            self._store.remove(self._name)
        moment, asked = self._asked
        return moment + timedelta(seconds=time.monotonic() - asked)


def _name(claim_id: str) -> str:
    return f"{CLAIMS}/{claim_id}{SUFFIX}"


def _is_claim(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")
