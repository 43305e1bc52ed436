"""What a person or a log sees of a run: notes, a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pipeline.redaction import redacted

LINE_EVERY_S = 10.0

T = TypeVar("T")


class Console:
    """Notes and progress go to standard error, results to standard output."""

    def __init__(self, stream: TextIO | None = None, *, is_terminal: bool | None = None) -> None:
        self._stream = stream or sys.stderr
        self.is_terminal = self._stream.isatty() if is_terminal is None else is_terminal

    def note(self, text: str) -> None:
        """One line, credentials in URLs left out."""
        with _reader_may_leave(self._stream):
            tqdm.write(redacted(text), file=self._stream)
            self._stream.flush()

    def result(self, text: str) -> None:
        """One line of what came out."""
        with _reader_may_leave(sys.stdout):
            sys.stdout.write(f"{redacted(text)}\n")
            sys.stdout.flush()

    def loading(self, items: Sequence[T], *, what: str = "loading", unit: str = "tensors") -> Iterator[T]:
        """The items, with a bar on a terminal."""
        with tqdm(
            items, desc=what, unit=unit, file=self._stream, disable=not self.is_terminal,
            leave=False,
        ) as bar:  # fmt: skip
            yield from bar

    @contextmanager
    def rows(self, total: int, done: int) -> Iterator[RowProgress]:
        """Progress in rows, of which `done` were there before."""
        progress = RowProgress(self, self._stream, total, done)
        try:
            yield progress
        finally:
            progress.close()


class RowProgress:
    """Rows done, tokens per second, time left: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, stream: TextIO, total: int, done: int) -> None:
        self._console = console
        self._total = total
        self._first = self._done = done
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if console.is_terminal:
            self._bar = tqdm(total=total, initial=done, desc="rows", unit="rows", file=stream, smoothing=0.1)

    def advance(self, rows: int, tokens: int) -> None:
        """So many more rows are answered, with so many tokens, prompts included; what was done twice counts once."""
        rows = min(rows, self._total - self._done)
        self._done += rows
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(rows)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._console.note(self._line(now - self._started, rate))

    def extend(self, total: int) -> None:
        """There are more rows than there were."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def close(self) -> None:
        """End the bar, or give the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first:
            elapsed = time.monotonic() - self._started
            self._console.note(self._line(elapsed, self._tokens / max(elapsed, 1e-9)))

    def _line(self, elapsed: float, tokens_per_s: float) -> str:
        rate = (self._done - self._first) / max(elapsed, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        share = 100 * self._done / self._total if self._total else 100.0
        return (
            f"{self._done:,} of {self._total:,} rows ({share:.0f} %), {rate:,.1f} rows/s, "
            f"{tokens_per_s:,.0f} tokens/s, {_clock(left)} left"
        )


@contextmanager
def _reader_may_leave(stream: TextIO) -> Iterator[None]:
    """A pipe closed at its other end (`| head`) silences the stream; it is no reason to end a run."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size_text(num_bytes: float) -> str:
    """So many bytes in the unit that suits them."""
    if num_bytes < 1024:
        return f"{num_bytes:,.0f} bytes"
    for unit in ("KiB", "MiB"):
        num_bytes /= 1024
        if num_bytes < 1024:
            return f"{num_bytes:,.1f} {unit}"
    return f"{num_bytes / 1024:,.2f} GiB"
