"""One row in, one row out, for any mixture of good and bad rows, through whole runs from files to Parts."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo import run_echo
from harness import TINY, call, nothing_left_over, parts, prompt, results, run_json
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.verify import main as verify

CHAT = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": " There "}]


@dataclass(frozen=True)
class Row:
    """A row of a file: its columns, and the word of its error, or None for a good one.

    `line` is its line where that is not the columns as JSON; such a row has no columns.
    """

    prompt: bytes | None = b"hello"
    n: int | None = 1
    chat: str | None = json.dumps(CHAT)
    error: str | None = None
    line: bytes | None = None

    @property
    def values(self) -> dict[str, Any]:
        if self.line is not None:
            return dict.fromkeys(("prompt", "n", "chat"))
        return {"prompt": self.prompt, "n": self.n, "chat": None if self.chat is None else self.chat.encode()}

    @property
    def kept(self) -> dict[str, Any]:
        """The columns of the results; bytes that are no text are in `error` instead."""
        return self.values | ({"prompt": None} if self.error == "UTF-8" else {})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
GOOD = st.builds(Row, prompt=texts.map(str.encode), n=st.integers(1, 9))
BAD = (
    Row(prompt=None, error="null"),
    Row(n=0, error="by zero"),
    Row(n=None, error="null"),
    Row(prompt=b"word " * 1100, error="more than the 1024"),
)
BAD_LINES = tuple(
    Row(line=line, error=error)
    for line, error in (
        (b'{"prompt": "x", "n": 1', "not valid JSON"),
        (b'{"prompt": 7, "n": 1}', "prompt is an integer"),
        (b'{"prompt": "x", "n": 0.5}', "n is a fraction"),
        (b'{"prompt": "x", "more": 1}', "the key more"),
        (b'{"prompt": "x", "prompt": "y"}', "twice"),
        (b"[]", "a list"),
        (b"\xff\x00", "UTF-8"),
        (b'{"prompt": ' + b"[" * 5000, "nested too deep"),
    )
)
NOT_UTF8 = Row(prompt=b"\xff", error="UTF-8")
CHATS = st.builds(Row, chat=st.lists(texts, min_size=1, max_size=3).map(
    lambda turns: json.dumps([{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)])
))  # fmt: skip
BAD_CHATS = (
    Row(chat=None, error="no list of role"),
    Row(chat="[]", error="no list of role"),
    Row(chat="7", error="no list of role"),
    Row(chat="[7]", error="no role or no content"),
    Row(chat='[{"role": "user"}]', error="no role or no content"),
    Row(chat='[{"role": "user", "content": ["x"]}]', error="no role or no content"),
    Row(chat='[{"role": "nobody", "content": "x"}]', error="role must be"),
    Row(chat="hello", error="Expecting value"),
    Row(chat='[{"role": "user", "content": "\\ud800"}]', error="surrogates"),
    Row(chat=json.dumps([{"role": "user", "content": "word " * 1100}]), error="more than the 1024"),
)
FIRST = Row()
"""What every file with rows begins with, so that the columns of JSON lines are made from these."""


def lines(rows: list[Row]) -> bytes:
    made = []
    for row in rows:
        values = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.values.items() if v is not None}
        made.append(json.dumps(values).encode() if row.line is None else row.line)
    return b"\n \n".join(made) + b"\n"


def table(rows: list[Row]) -> pa.Table:
    """String columns whose bytes nobody checked."""

    def text(values: list[bytes | None]) -> pa.Array:
        binary = pa.array(values, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(values), binary.buffers(), binary.null_count)

    columns = [text([row.values["prompt"] for row in rows]), pa.array([row.n for row in rows], pa.int64())]
    return pa.table([*columns, text([row.values["chat"] for row in rows])], names=["prompt", "n", "chat"])


@cache
def oracle() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def tokens(row: Row, messages: bool) -> list[int]:
    """What the model is to be given for a good row."""
    own = [{"role": "user", "content": f"{(row.prompt or b'').decode()} {6 // (row.n or 1)}"}]
    chat = json.loads(row.chat or "") if messages else own
    ids: list[int] = oracle().apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def check(kind: str, messages: bool, files: list[list[Row]], chunk_rows: int, patch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name, "in"), Path(name, "out")
        folder.mkdir()
        for number, rows in enumerate(files):
            if kind == "jsonl":
                (folder / f"{number}.jsonl").write_bytes(lines(rows) if rows else b"")
            else:
                pq.write_table(table(rows), folder / f"{number}.parquet", row_group_size=3)
        asked = "task.messages=chat" if messages else prompt("{{ prompt }} {{ 6 // n }}")
        more = [f"data.path={folder}", f"output.dir={out}", f"data.chunk_rows={chunk_rows}", asked]
        run_echo(patch, f"data={kind}", *more).done()
        given = [row for rows in files for row in rows]
        found = results(out)
        assert found.num_rows == len(given) == run_json(out)["summary"]["rows"]
        assert run_json(out)["summary"]["error_rows"] == sum(row.error is not None for row in given)
        assert len(parts(out)) == max(1, sum(-(-len(rows) // chunk_rows) for rows in files))
        ids = [f"{number:06d}-{i:012d}" for number, rows in enumerate(files) for i in range(len(rows))]
        assert found["row_id"].to_pylist() == ids
        kept = found.select(["prompt", "n", "chat"]).set_column(0, "prompt", found["prompt"].cast(pa.binary()))
        assert kept.set_column(2, "chat", found["chat"].cast(pa.binary())).to_pylist() == [row.kept for row in given]
        for row, answer in zip(given, found.select(["error", "finish_reason", "token_ids"]).to_pylist(), strict=True):
            assert (answer["finish_reason"] == "error") == (answer["error"] is not None) == (row.error is not None)
            assert row.error is None or row.error in answer["error"]
            assert answer["token_ids"] == (tokens(row, messages) if row.error is None else None)
        assert nothing_left_over(out)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a whole run each, too slow to look for the smallest
)
@given(data=st.data(), messages=st.booleans(), chunk_rows=st.integers(1, 9))
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_row_is_answered_once_or_has_its_error(
    kind: str, data: st.DataObject, messages: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*BAD_LINES,) if kind == "jsonl" else (NOT_UTF8,) if not messages else ()
    any_row = st.one_of(CHATS if messages else GOOD, st.sampled_from([*(BAD_CHATS if messages else BAD), *own]))
    files = data.draw(st.lists(st.lists(any_row, max_size=8), max_size=3))
    monkeypatch.setattr("pipeline.data.jsonl.SAMPLE_ROWS", 1)
    check(kind, messages, [[FIRST], *([FIRST, *rows] if rows else [] for rows in files)], chunk_rows, monkeypatch)


def test_a_prompt_that_reads_no_column_has_as_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are made ready at once, and in chunks that they do not fill."""
    pq.write_table(pa.table({"n": range(2500)}), tmp_path / "x.parquet")
    for template, error in (("Hello", None), ("{{ ''.__class__ }}", "unsafe")):
        out = tmp_path / ("good" if error is None else "bad")
        more = [f"data.path={tmp_path / 'x.parquet'}", f"output.dir={out}", "data.chunk_rows=2000", prompt(template)]
        run_echo(monkeypatch, *more).done()
        found = results(out)
        assert found["n"].to_pylist() == list(range(2500))
        assert all((error is None) == (e is None) and (error or "") in (e or "") for e in found["error"].to_pylist())


def test_a_row_that_is_no_text_keeps_no_reader_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB refuses a query that meets text which is no UTF-8; also in a column that no prompt reads."""
    rows = table([Row(prompt=b"x"), NOT_UTF8, Row(prompt=b"y")])
    pq.write_table(rows.append_column("other", rows["prompt"]), tmp_path / "x.parquet")
    for name, more in (("prompt", prompt("{{ prompt }}")), ("other", prompt("{{ n }}"))):
        run_echo(monkeypatch, f"data.path={tmp_path / 'x.parquet'}", f"output.dir={tmp_path / name}", more).done()
        asked = f"select prompt, other, error is null from '{tmp_path / name}/results/*.parquet'"
        assert duckdb.sql(asked).fetchall() == [("x", "x", True), (None, None, False), ("y", "y", True)]
        assert r"\xff" in results(tmp_path / name)["error"][1].as_py()
        assert call(verify, str(tmp_path / name)).code == 0
