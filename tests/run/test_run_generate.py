"""task=generate against transformers' own generate(), one row at a time, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import greedy_tokens, label_args, prompt, results, rows, run_here, write

MAX_NEW = 14


@pytest.fixture(scope="module")
def reference(small_reference: Any) -> Any:
    return small_reference


def generated(reference: Any, ids: list[int], **settings: Any) -> list[int]:
    """Greedy tokens of the reference behind the prompt, the end token cut off."""
    model, _ = reference
    return greedy_tokens(model, ids, min(MAX_NEW, model.config.max_position_embeddings - len(ids)), **settings)


def generate_args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", "quant=none", f"data.path={data}", f"output.dir={out}",
        f"sampling.max_new_tokens={MAX_NEW}", *more,
    ]  # fmt: skip


def ended_row(tokens: list[int]) -> str:
    return "length" if len(tokens) == MAX_NEW else "stop"


def test_plain_prompts_get_what_generate_gives(small_model: Path, varied: Path, reference: Any, tmp_path: Path) -> None:
    run_here(*generate_args(small_model, varied, tmp_path / "out", "task.chat=false")).done()
    tokenizer = reference[1]
    answered = rows(tmp_path / "out")
    assert len(answered) == 60
    for row in answered:
        ids = tokenizer(row["prompt"]).input_ids
        assert ids[0] == 0 and 0 not in ids[1:], "this tokenizer adds one <|bos|>"
        tokens = generated(reference, ids)
        assert row["prompt_tokens"] == len(ids)
        assert row["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["completion_tokens"] == len(tokens)
        assert row["finish_reason"] == ended_row(tokens)
        assert row["cumulative_logprob"] < 0
    assert max(r["prompt_tokens"] for r in answered) > 256 > min(r["prompt_tokens"] for r in answered)


def test_chats_begin_with_exactly_one_bos(small_model: Path, varied: Path, reference: Any, tmp_path: Path) -> None:
    more = ["task.system='You are short.'", "data.limit=20", prompt("Say: {{ prompt }}")]
    run_here(*generate_args(small_model, varied, tmp_path / "out", *more)).done()
    tokenizer = reference[1]
    for row in rows(tmp_path / "out"):
        messages = [
            {"role": "system", "content": "You are short."},
            {"role": "user", "content": f"Say: {row['prompt']}"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids.count(0) == 1
        assert row["prompt_tokens"] == len(ids)
        assert row["completion"] == tokenizer.decode(generated(reference, ids), skip_special_tokens=True)


def test_stop_tokens_end_answers_and_stay_out_of_them(
    small_model: Path, varied: Path, reference: Any, tmp_path: Path
) -> None:
    tokenizer = reference[1]
    run_here(*generate_args(small_model, varied, tmp_path / "free", "task.chat=false", "data.limit=20")).done()
    free = rows(tmp_path / "free")
    tokens = {row["key"]: generated(reference, tokenizer(row["prompt"]).input_ids) for row in free}
    stops = sorted({found[3] for found in tokens.values() if len(found) > 3})[:6]
    more = ["task.chat=false", "data.limit=20", f"sampling.stop_token_ids={stops}".replace(" ", "")]
    run_here(*generate_args(small_model, varied, tmp_path / "out", *more)).done()
    shortened = 0
    for row in rows(tmp_path / "out"):
        expected = tokens[row["key"]]
        end = next((place for place, token in enumerate(expected) if token in stops), None)
        shortened += end is not None
        assert row["completion"] == tokenizer.decode(expected[:end], skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if end is not None else ended_row(expected))
    assert shortened >= 3


def sampled(model: Path, varied: Path, out: Path, *more: str) -> list[str]:
    args = generate_args(model, varied, out, "task.chat=false", "data.limit=20", *more)
    run_here(*args).done()
    texts: list[str] = results(out)["completion"].to_pylist()
    return texts


def test_equal_seeds_draw_equal_texts_and_other_seeds_others(small_model: Path, varied: Path, tmp_path: Path) -> None:
    hot = ["sampling.temperature=1.0", "sampling.top_k=50", "sampling.top_p=0.95"]
    first = sampled(small_model, varied, tmp_path / "a", *hot, "sampling.seed=5")
    again = sampled(small_model, varied, tmp_path / "b", *hot, "sampling.seed=5")
    other = sampled(small_model, varied, tmp_path / "c", *hot, "sampling.seed=6")
    greedy = sampled(small_model, varied, tmp_path / "d")
    assert first == again
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 15
    assert first != greedy


def test_sampling_default_draws_as_the_checkpoint_says(small_model: Path, varied: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    stored = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [1, 5]}
    (model / "generation_config.json").write_text(json.dumps(stored))
    by_checkpoint = sampled(model, varied, tmp_path / "a", "sampling=default")
    hand = ["sampling.temperature=0.7", "sampling.top_k=20", "sampling.top_p=0.9", "sampling.stop_token_ids=[5]"]
    by_hand = sampled(small_model, varied, tmp_path / "b", *hand)
    plain = sampled(small_model, varied, tmp_path / "c", "sampling=default")
    assert by_checkpoint == by_hand
    assert by_checkpoint != plain


def test_a_stored_setting_out_of_range_is_refused(small_model: Path, varied: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (model / "generation_config.json").write_text(json.dumps({"top_p": 1.5, "eos_token_id": 1}))
    message = run_here(*generate_args(model, varied, tmp_path / "out", "sampling=default")).refusal()
    assert "sampling.top_p" in message and "1.5" in message and "generation_config.json" in message
    assert not (tmp_path / "out" / "run.json").exists()


def test_equal_rows_get_equal_answers(small_model: Path, tmp_path: Path) -> None:
    texts = ["twice", "once", "twice", "twice"] * 10
    data = write(tmp_path / "in.parquet", {"prompt": texts})
    args = generate_args(small_model, data, tmp_path / "out", "sampling.temperature=1.5", "task.chat=false")
    run_here(*args).done()
    answers: dict[str, set[str]] = {}
    for row in rows(tmp_path / "out"):
        answers.setdefault(row["prompt"], set()).add(row["completion"])
    assert [len(found) for found in answers.values()] == [1, 1]
    assert label_args()
