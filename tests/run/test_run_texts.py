"""Texts of any script through whole runs: tokens as transformers makes them, every kept value as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo import run_echo
from harness import TINY, results
from texts import multilingual

COLUMNS = "prompt, i, f, tags, meta"


def dataset(folder: Path, kind: str, texts: list[str]) -> Path:
    """The texts with an ordinal, a double and nested columns; JSON lines with and without escapes and CRLF."""
    rng = random.Random(1)
    table = pa.table(
        {
            "prompt": texts,
            "i": range(len(texts)),
            "f": [rng.uniform(-1e300, 1e300) for _ in texts],
            "tags": [[text[:3], None] for text in texts],
            "meta": [{"length": len(text), "first": text[:1] or None} for text in texts],
        }
    )
    pq.write_table(table, folder / "x.parquet", row_group_size=777)
    if kind == "jsonl":
        with (folder / "x.jsonl").open("wb") as file:
            for i, row in enumerate(table.to_pylist()):
                file.write(json.dumps(row, ensure_ascii=bool(i % 2)).encode() + (b"\r\n" if i % 3 == 0 else b"\n"))
    return folder / f"x.{kind}"


def check(kind: str, chat: bool, texts: list[str], sampled: int, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    data = dataset(tmp_path, kind, texts)
    more = [f"data.path={data}", f"output.dir={out}", f"task.chat={chat}".lower(), "data.chunk_rows=999"]
    run_echo(patch, f"data={kind}", *more).done()
    given, kept = f"'{tmp_path}/x.parquet'", f"'{out}/results/*.parquet'"
    assert duckdb.sql(f"select count(*) from {kept}").fetchall() == [(len(texts),)]
    different = f"(select {COLUMNS} from {given} except all select {COLUMNS} from {kept})"
    assert duckdb.sql(f"select count(*) from {different}").fetchall() == [(0,)]
    found = results(out)
    assert found["i"].to_pylist() == list(range(len(texts)))
    assert found["prompt"].to_pylist() == texts
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for i in random.Random(2).sample(range(len(texts)), sampled):
        if chat:
            messages = [{"role": "user", "content": texts[i]}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(texts[i])["input_ids"]
        error = found["error"][i].as_py()
        assert (found["token_ids"][i].as_py() or []) == (ids if error is None else [])
        assert error == (None if ids else "the prompt has no tokens")


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_texts_of_any_script(kind: str, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, chat, multilingual(3000, seed=7), 1000, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_hundred_thousand_of_them(kind: str, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, chat, multilingual(100_000), 5000, tmp_path, monkeypatch)
