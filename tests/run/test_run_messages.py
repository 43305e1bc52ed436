"""Conversations as a column, and prompts that are cut to fit, against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness import greedy_tokens, prompt, rows, run_here, write

MAX_NEW = 6
POSITIONS = 512
ROOM = POSITIONS - MAX_NEW
CHATS: list[Any] = [
    [{"role": "user", "content": "Where is my parcel?"}],
    [{"role": "system", "content": "Be rude."}, {"role": "user", "content": " Hello\n"}],
    [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
    None,
    [],
    [{"role": "user", "content": None}],
    [{"role": "nobody", "content": "x"}],
    [{"role": "assistant", "content": "I begin."}],
]
BAD = {3: "no list", 4: "no list", 5: "no content", 6: "role must be"}


def args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    where = [f"model.path={model}", f"data.path={data}", f"output.dir={out}"]
    return ["model=path", *where, "quant=none", f"sampling.max_new_tokens={MAX_NEW}", *more]


def answer(reference: Any, ids: list[int]) -> dict[str, Any]:
    model, tokenizer = reference
    tokens = greedy_tokens(model, ids, MAX_NEW)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"prompt_tokens": len(ids), "completion": text, "completion_tokens": len(tokens)}


@pytest.mark.parametrize("kind", ["list of structs", "JSON text"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_conversations_get_what_transformers_gives(
    kind: str, system: str | None, small_model: Path, small_reference: Any, tmp_path: Path
) -> None:
    column = pa.array(CHATS, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
    if kind == "JSON text":
        column = pa.array([None if chat is None else json.dumps(chat) for chat in CHATS])
    data = write(tmp_path / "in.parquet", {"chat": column, "other": list(range(len(CHATS)))})
    more = ["task.messages=chat", *([f"task.system='{system}'"] if system else [])]
    run_here(*args(small_model, data, tmp_path / "out", *more)).done()
    answered = rows(tmp_path / "out")
    assert [i for i, row in enumerate(answered) if row["error"] is not None] == list(BAD)
    for i, row in enumerate(answered):
        if i in BAD:
            assert row["finish_reason"] == "error" and BAD[i] in row["error"]
            assert (row["prompt_tokens"], row["completion"]) == (0, None)
            continue
        chat = CHATS[i]
        if system and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": system}, *chat]
        ids = small_reference[1].apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert {name: row[name] for name in ("prompt_tokens", "completion", "completion_tokens")} == answer(
            small_reference, ids
        )


def test_labels_behind_conversations(small_model: Path, small_reference: Any, tmp_path: Path) -> None:
    import torch

    data = write(tmp_path / "in.parquet", {"chat": [json.dumps(CHATS[2])]})
    more = ["task=label", "task.labels=[billing,login]", "task.messages=chat"]
    command = [part for part in args(small_model, data, tmp_path / "out", *more) if "max_new_tokens" not in part]
    run_here(*command).done()
    (row,) = rows(tmp_path / "out")
    model, tokenizer = small_reference
    text = tokenizer.apply_chat_template(CHATS[2], add_generation_prompt=True, tokenize=False)
    for name in ("billing", "login"):
        before, whole = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, text + name))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
        expected = sum(float(logprobs[i - 1, whole[i]]) for i in range(len(before), len(whole)))
        assert row["label_logprob"][name] == pytest.approx(expected, abs=1e-4)


def test_conversations_need_a_chat_model_and_their_column(small_model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.parquet", {"chat": [json.dumps(CHATS[0])], "other": [1]})
    plain = tmp_path / "plain"
    shutil.copytree(small_model, plain, ignore=shutil.ignore_patterns("*.jinja"))
    message = run_here(*args(plain, data, tmp_path / "out", "task.messages=chat")).refusal()
    assert "task.messages" in message and "chat template" in message
    message = run_here(*args(small_model, data, tmp_path / "out", "task.messages=talk")).refusal()
    assert "task.messages=talk" in message and "chat, other" in message
    assert not (tmp_path / "out" / "run.json").exists()


# --- too long ----------------------------------------------------------------------------------------------------

HEAD, TAIL = "Which topic is this?\n\n", "\n\nOne word:"
TEXTS = ["Where is my parcel? ", "The app crashes at the login screen. ", "Grüße, who pays 3 % more? "]


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text * times for text in TEXTS for times in (1, 110, 200)]
    return write(tmp_path_factory.mktemp("long") / "in.parquet", {"prompt": texts})


def cut(reference: Any, row: dict[str, Any], policy: str, *, chat: bool) -> list[int]:
    """Tokenize the whole prompt, then drop tokens of the row's own text until it fits."""
    tokenizer = reference[1]
    head, tail, text = HEAD, TAIL, HEAD + row["prompt"] + TAIL
    if chat:
        before, after = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
        ).split("x")
        head, tail, text = before + head, tail + after, before + text + after
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    own = [i for i, (b, e) in enumerate(encoded["offset_mapping"]) if e > len(head) and b < len(text) - len(tail)]
    over = max(0, len(encoded["input_ids"]) - ROOM)
    dropped = set((own[:over] if policy == "truncate_left" else own[len(own) - over :]) if over else [])
    return [token for i, token in enumerate(encoded["input_ids"]) if i not in dropped]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
def test_long_prompts_are_cut_to_the_room_there_is(
    policy: str, chat: bool, small_model: Path, small_reference: Any, long_rows: Path, tmp_path: Path
) -> None:
    more = [f"task.too_long={policy}", f"task.chat={chat}".lower(), prompt(f"{HEAD}{{{{ prompt }}}}{TAIL}")]
    run_here(*args(small_model, long_rows, tmp_path / "out", *more)).done()
    answered = rows(tmp_path / "out")
    assert [row["error"] for row in answered] == [None] * len(answered)
    for row in answered:
        ids = cut(small_reference, row, policy, chat=chat)
        assert ids[0] == 0, "<|bos|>"
        assert {name: row[name] for name in ("prompt_tokens", "completion", "completion_tokens")} == answer(
            small_reference, ids
        )
    assert sorted({row["prompt_tokens"] for row in answered})[-1] == ROOM
    assert sum(row["prompt_tokens"] == ROOM for row in answered) >= 5


def test_long_prompts_are_errors_by_default_and_where_the_template_has_no_room(
    small_model: Path, long_rows: Path, tmp_path: Path
) -> None:
    run_here(*args(small_model, long_rows, tmp_path / "error")).done()
    found = [row["error"] for row in rows(tmp_path / "error")]
    assert [error is None for error in found].count(False) >= 5
    assert all("tokens" in error for error in found if error is not None)
    more = ["task.too_long=truncate_left", prompt("word " * 600 + "{{ prompt }}")]
    run_here(*args(small_model, long_rows, tmp_path / "template", *more)).done()
    for row in rows(tmp_path / "template"):
        assert row["finish_reason"] == "error"
        assert row["error"] == f"the template's own text has more tokens than the {ROOM} there is room for"
