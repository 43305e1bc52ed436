"""What a terminal and a log see; standard output stays free for results."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pipeline import console
from pipeline.console import LINE_EVERY_S, Console

LINE = re.compile(
    r"(?P<done>[\d,]+) of (?P<total>[\d,]+) rows \((?P<share>\d+) %\), (?P<rate>[\d,.]+) rows/s, "
    r"(?P<tokens>[\d,]+) tokens/s, (?P<left>[\d:]+) left"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only moves when told to."""
    now = [1000.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def lines(stream: io.StringIO) -> list[dict[str, str]]:
    found = [LINE.fullmatch(line) for line in stream.getvalue().splitlines()]
    assert all(found), stream.getvalue()
    return [match.groupdict() for match in found if match]


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(wait: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Console(stream).rows(total=4000, done=1000) as progress:
        for _ in range(6):
            wait(LINE_EVERY_S / 4)
            progress.advance(rows=25, tokens=500)
        assert len(lines(stream)) == 1
        wait(LINE_EVERY_S)
        progress.advance(rows=50, tokens=0)
        assert len(lines(stream)) == 2
    first, second, last = lines(stream)
    assert first == {
        "done": "1,100", "total": "4,000", "share": "28", "rate": "10.0", "tokens": "200", "left": "4:50",
    }  # fmt: skip
    assert (second["done"], second["share"], second["rate"], second["tokens"]) == ("1,200", "30", "8.0", "120")
    assert second["left"] == "5:50"
    assert last == second


def test_a_log_gets_the_last_line_also_when_the_run_breaks_off(wait: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Console(stream).rows(total=10, done=0) as progress:
        wait(2)
        progress.advance(rows=4, tokens=8)
        raise RuntimeError
    [line] = lines(stream)
    assert (line["done"], line["rate"], line["tokens"], line["left"]) == ("4", "2.0", "4", "0:03")


def test_nothing_done_is_no_line(wait: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Console(stream).rows(total=10, done=10):
        wait(60)
    assert stream.getvalue() == ""


def test_no_time_and_no_rows_divide_nothing_by_zero(wait: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Console(stream).rows(total=0, done=0) as progress:
        progress.advance(0, 0)
        wait(LINE_EVERY_S)
        progress.advance(0, 0)
    [line] = lines(stream)
    assert (line["share"], line["left"]) == ("100", "0:00")
    with Console(stream).rows(total=2, done=0) as progress:
        progress.advance(1, 5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.9, "0:09"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (100 * 3600 + 62, "100:01:02")],
)
def test_time_left(seconds: float, text: str, wait: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Console(stream).rows(total=2, done=0) as progress:
        wait(seconds)
        progress.advance(1, 1)
    assert lines(stream)[0]["left"] == text


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    shown = Console(stream)
    assert shown.is_terminal
    with shown.rows(total=40, done=10) as progress:
        progress.advance(rows=30, tokens=123456)
        shown.note("a note beside the bar")
    text = stream.getvalue()
    assert "rows:  25%" in text
    assert "10/40" in text
    assert "40/40" in text
    assert "tokens/s" in text
    assert "a note beside the bar\n" in text
    assert not any(map(LINE.search, text.splitlines()))
    assert capsys.readouterr() == ("", "")


def test_credentials_in_urls_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    Console(stream).note("error: data.path=s3://me:hunter2@bucket/x?sig=hunter2 does not exist")
    assert stream.getvalue() == "error: data.path=s3://(redacted)@bucket/x?sig=(redacted) does not exist\n"
    Console(stream).result(json.dumps({"path": "https://host/x?a=1&sig=hunter2", "rows": 3}))
    assert json.loads(capsys.readouterr().out) == {"path": "https://host/x?a=1&sig=(redacted)", "rows": 3}


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_loading_gives_every_item(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Console(stream).loading("abc")) == ["a", "b", "c"]
    assert ("loading" in stream.getvalue()) == stream.isatty()
    assert capsys.readouterr() == ("", "")


def test_notes_go_to_standard_error_and_results_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console()
    shown.note("a note")
    with shown.rows(total=1, done=0) as progress:
        progress.advance(1, 1)
    assert list(shown.loading([1])) == [1]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("a note\n")
    shown.result("rows 1")
    assert capsys.readouterr() == ("rows 1\n", "")
