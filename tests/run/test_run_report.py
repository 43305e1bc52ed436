"""The report of whole runs: written when all is done, anew when more was done, and only then."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pytest
from echo import run_echo
from harness import TINY, disk_state, results, write


def test_a_report_is_written_by_whoever_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = tmp_path / "in", tmp_path / "out"
    write(data / "a.parquet", {"prompt": ["<b>one</b>", None, "three"]})
    command = [
        "model=path", f"model.path={TINY}", f"data.path={data}", f"output.dir={out}", "quant=none", "data.chunk_rows=2",
        "task.chat=false", "task.prompt='<i>{{ prompt }}</i>'", "data.storage_options.secret=geheim",
    ]  # fmt: skip
    run_echo(monkeypatch, *command).done()
    page = (out / "report.html").read_text()
    assert "3 rows in 2 parts" in page and "1 of them errors (33.33 %)" in page
    assert "<i>" not in page and "&lt;i&gt;{{ prompt }}&lt;/i&gt;" in page
    (reason,) = filter(None, results(out)["error"].to_pylist())
    assert f'<td class="text">{escape(reason)}</td>' in page
    assert "geheim" not in page
    before = disk_state(out)
    run_echo(monkeypatch, *command).done()
    assert disk_state(out) == before
    write(data / "b.parquet", {"prompt": ["four"]})
    run_echo(monkeypatch, *command).done()
    page = (out / "report.html").read_text()
    assert "4 rows in 3 parts" in page and "together" in page
    part = sorted((out / "results").iterdir())[0]
    part.unlink()
    run_echo(monkeypatch, *command).done()
    assert page != (out / "report.html").read_text(), "a process more"
