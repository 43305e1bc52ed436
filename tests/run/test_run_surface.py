"""Dry runs, working directories, consoles, and templates that try to get out."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyarrow as pa
import pytest
from harness import REPOSITORY, environment, parts, prompt, results, rows, run_cli, run_here, start, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", {"prompt": ["one", "two", "three"], "n": [0, 1, 2]})


def args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    where = [f"model.path={model}", f"data.path={data}", f"output.dir={out}"]
    return ["model=path", *where, "quant=none", "sampling.max_new_tokens=3", *more]


def test_dry_run_shows_the_plan_and_writes_nothing(small_model: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = run_here(*args(small_model, data, tmp_path / "out", "dry_run=true", "data.chunk_rows=2")).done()
    plan = json.loads(ended.out)
    assert plan["rows"] == 3
    assert plan["chunks"] == plan["chunks_left"] == 2
    assert plan["files"] == [{"path": str(data), "rows": 3, "bytes": data.stat().st_size}]
    assert plan["shapes"]["length_classes"][-1]["max_len"] == 512
    assert plan["memory_bytes"]["weights"] > 0
    assert plan["runs"]["resolved.dtype"] == "float32"
    assert plan["config"]["output"]["dir"] == str(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_refuses_what_a_run_refuses(small_model: Path, data: Path, tmp_path: Path) -> None:
    more = ["dry_run=true", prompt("{{ nosuch }}")]
    assert "nosuch" in run_here(*args(small_model, data, tmp_path / "out", *more)).refusal()


def test_relative_paths_are_those_of_the_working_directory(small_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    relative = args(small_model, Path("../in.parquet"), Path("'my out'"))
    run_cli(*relative, cwd=tmp_path / "deep", env=environment(PYTHONPATH=str(REPOSITORY))).done()
    assert results(tmp_path / "deep" / "my out").num_rows == 3


def test_a_home_folder_is_expanded(
    small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_here(*args(small_model, Path("'~/in.parquet'"), Path("'~/out'"))).done()
    assert results(tmp_path / "out").num_rows == 3
    assert not (tmp_path / "~").exists()


@pytest.mark.xfail(strict=True, reason="task.prompt_file does not expand ~, unlike data.path, model.path, output.dir")
def test_a_template_in_the_home_folder(
    small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jinja").write_text("{{ prompt }}")
    run_here(*args(small_model, data, tmp_path / "out", "task.prompt_file='~/p.jinja'")).done()


def test_a_limit_counts_over_files_and_passes_empty_ones(small_model: Path, tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 0), ("c", 4), ("d", 2)):
        texts = pa.array([f"{name}{i}" for i in range(count)], pa.string())
        write(tmp_path / "in" / f"{name}.parquet", {"prompt": texts})
    more = ["data.limit=5", "data.chunk_rows=2"]
    run_here(*args(small_model, tmp_path / "in", tmp_path / "out", *more)).done()
    assert results(tmp_path / "out")["prompt"].to_pylist() == ["a0", "a1", "a2", "c0", "c1"]
    assert [part.name[5:-8] for part in parts(tmp_path / "out")] == [
        "000000-000000000000", "000000-000000000002", "000002-000000000000",
    ]  # fmt: skip


def test_a_terminal_shows_a_bar(small_model: Path, data: Path, tmp_path: Path) -> None:
    """The same run under a pseudo-terminal: bars that overwrite themselves, and no log lines of progress."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *args(small_model, data, tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=end,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )
    os.close(end)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: the process has closed its end
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    out = process.communicate()[0].decode()
    assert process.returncode == 0, shown
    text = shown.decode()
    assert "\r" in text and "rows: 100%" in text and "3/3" in text
    assert "loading" in text
    assert out.startswith("results ")
    assert "\r" not in out


def test_a_reader_that_goes_away_does_no_harm(small_model: Path, data: Path, tmp_path: Path) -> None:
    process = start(*args(small_model, data, tmp_path / "out"))
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait() == 0, err
    process.stderr.close()
    assert "Traceback" not in err and "BrokenPipe" not in err
    assert results(tmp_path / "out").num_rows == 3, err


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ row.__init__ }}",
    "{{ row.__init__.__globals__ }}",
    "{{ row['__class__'] }}",
    "{{ prompt.__len__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ '{0.__class__}'.format(prompt) }}",
    "{{ prompt | attr('__class__') }}",
    "{{ row.update({'prompt': 'x'}) }}",
    "{{ row | map(attribute='__class__') | first }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as p %}{{ p }}",
    "{% extends '/etc/passwd' %}",
    "{% for i in range(10000000) %}x{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_escape(template: str, small_model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run_here(*args(small_model, data, out, prompt(template)))
    assert ended.code in (0, 2)
    assert "root:" not in ended.err + ended.out
    if ended.code == 2:
        ended.refusal()
        return
    for row in rows(out):
        assert row["finish_reason"] == "error", row
        assert row["error"].startswith("the prompt cannot be made: ")
        assert "root:" not in row["error"]
        assert row["completion"] is None


def test_help_and_version(tmp_path: Path) -> None:
    shown = run_here("--help").done().out
    for key in ("task.prompt", "model.path", "output.dir", "max_error_rate", "exit codes"):
        assert key in shown
    assert run_here("--version").done().out.strip()
