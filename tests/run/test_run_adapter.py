"""model.adapter from the command line: the shipped model under random adapters that PEFT has written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapters import WEIGHTS, Case, Made, lora, low_rank, make_adapters, write_adapter
from harness import TINY, TOKENIZER_FILES, Ended, disk_state, rows, run_here, run_json, stats, write

from pipeline.describe import main as describe
from pipeline.quantize import main as quantize

MAX_NEW = 14
LIMIT = 12
END = 1
HIDDEN, INNER, KEYS = 256, 704, 128
ADAPTER_BYTES = 4 * 4 * 16 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INNER))
"""Of every Linear of the shipped model: four layers, four bytes, rank 8 padded to 16."""
DORA = {"rank_pattern": {"q_proj": 3}, "use_rslora": True, "use_dora": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tickets: list[str]) -> Path:
    prompts = [*(f"{ticket} The" for ticket in tickets[: LIMIT - 2]), "a", "the two-factor code " * 9]
    return write(tmp_path_factory.mktemp("data") / "in.parquet", {"prompt": prompts})


@pytest.fixture(scope="module")
def tokenizer(tiny_reference: Any) -> Any:
    return tiny_reference[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path, tokenizer: Any) -> dict[str, Made]:
    import pyarrow.parquet as pq

    prompts = [tuple(tokenizer(text).input_ids) for text in pq.read_table(data)["prompt"].to_pylist()]
    base = {"base": TINY, "prompts": tuple(prompts), "new_tokens": MAX_NEW}
    cases = {
        "every linear": Case(**base, settings=lora("all-linear", 8, 4)),
        "another": Case(**base, settings=lora("all-linear", 8, 4), seed=1),
        "patterns": Case(**base, settings=lora(["q_proj", "v_proj", "lm_head"], 20, 6, **DORA)),
    }
    return make_adapters(cases, tmp_path_factory.mktemp("adapters"))


def command(data: Path, out: Path, adapter: Path | None, *more: str) -> list[str]:
    chosen = [] if adapter is None else [f"model.adapter={adapter}"]
    return [
        "quant=none", "model.dtype=float32", f"data.path={data}", f"output.dir={out}", "data.chunk_rows=5",
        f"sampling.max_new_tokens={MAX_NEW}", "task.chat=false", *chosen, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(made: dict[str, Made], data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run under "every linear"."""
    out = tmp_path_factory.mktemp("done") / "out"
    return out, run_here(*command(data, out, made["every linear"].folder)).done()


def answer(found: Made, row: int) -> list[int]:
    """PEFT's answer up to the end token."""
    tokens = list(found.tokens(row))
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize("name", ["every linear", "patterns"])
def test_completions_are_what_peft_generates(
    name: str, made: dict[str, Made], data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    run_here(*command(data, tmp_path / "base", None)).done()
    run_here(*command(data, tmp_path / "out", made[name].folder)).done()
    base, answered = rows(tmp_path / "base"), rows(tmp_path / "out")
    for n, row in enumerate(answered):
        tokens = answer(made[name], n)
        assert row["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["completion_tokens"] == len(tokens)
    assert sum(a["completion"] != b["completion"] for a, b in zip(base, answered, strict=True)) >= LIMIT - 2


def test_the_log_and_the_stats_name_it(done: tuple[Path, Ended], made: dict[str, Made]) -> None:
    out, ended = done
    said = "LoRA of rank 8 on 28 modules"
    assert f"adapter {made['every linear'].folder}: {said}" in ended.err.splitlines()[0]
    assert "trained on" not in ended.err, "it was made for this model"
    (run,) = stats(out)
    assert run["adapter"] == said
    assert json.loads(run["config"])["model"]["adapter"] == str(made["every linear"].folder)
    assert json.loads((out / "plan.json").read_text())["runs"]["resolved.adapter"] == said


def test_another_adapter_or_none_is_refused_on_these_results(
    done: tuple[Path, Ended], made: dict[str, Made], data: Path
) -> None:
    out, _ = done
    before = disk_state(out)
    message = run_here(*command(data, out, made["another"].folder)).refusal()
    assert f"model.adapter.{WEIGHTS}: " in message and "->" in message
    message = run_here(*command(data, out, None)).refusal()
    assert f"model.adapter.{WEIGHTS}" in message and "(absent)" in message
    assert disk_state(out) == before


def test_the_same_adapter_elsewhere_goes_on(
    done: tuple[Path, Ended], made: dict[str, Made], data: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "out"))
    moved = Path(shutil.copytree(made["every linear"].folder, tmp_path / "moved"))
    before = rows(out)
    sorted((out / "results").iterdir())[1].unlink()
    run_here(*command(data, out, moved)).done()
    assert rows(out) == before


def test_results_without_an_adapter_have_no_trace_of_one(data: Path, made: dict[str, Made], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_here(*command(data, out, None, "data.limit=2")).done()
    assert not [key for key in run_json(out)["fingerprint"] if "adapter" in key]
    assert stats(out)[0]["adapter"] == ""
    assert "model.adapter" in run_here(*command(data, out, made["another"].folder, "data.limit=2")).refusal()


def test_the_plan_counts_its_bytes(made: dict[str, Made], data: Path, tmp_path: Path) -> None:
    plans = [
        json.loads(run_here(*command(data, tmp_path / "out", adapter, "dry_run=true")).done().out)
        for adapter in (None, made["every linear"].folder)
    ]
    weights = [plan["memory_bytes"]["weights"] for plan in plans]
    assert weights[1] - weights[0] == ADAPTER_BYTES
    assert plans[1]["memory_bytes"]["passes"] > plans[0]["memory_bytes"]["passes"]


def test_under_a_quantized_model(made: dict[str, Made], data: Path, tmp_path: Path) -> None:
    adapter = made["every linear"].folder
    plain = command(data, tmp_path / "plain", None, "quant=bnb")
    run_here(*plain).done()
    ended = run_here(*command(data, tmp_path / "out", adapter, "quant=bnb")).done()
    assert "NF4" in ended.err and "LoRA of rank 8" in ended.err
    both = zip(rows(tmp_path / "plain"), rows(tmp_path / "out"), strict=True)
    assert sum(a["completion"] != b["completion"] for a, b in both) >= LIMIT - 2


def test_a_base_of_another_name_is_noted(made: dict[str, Made], data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["every linear"].folder, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/other-base"}))
    ended = run_here(*command(data, tmp_path / "out", folder, "data.limit=1")).done()
    assert f"model.adapter={folder} was trained on some/other-base and runs on model.path=" in ended.err


def test_a_hub_id_and_its_revision_from_the_local_cache(
    done: tuple[Path, Ended], made: dict[str, Made], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--some--adapter"
    (cached / "refs").mkdir(parents=True)
    for revision, name in {"main": "another", "v2": "every linear"}.items():
        commit = f"{len(name):040x}"
        (cached / "refs" / revision).write_text(commit)
        shutil.copytree(made[name].folder, cached / "snapshots" / commit)
    run_here(*command(data, tmp_path / "out", Path("some/adapter"), "model.adapter_revision=v2")).done()
    assert rows(tmp_path / "out") == rows(done[0])
    message = run_here(*command(data, tmp_path / "out", Path("some/adapter"))).refusal()
    assert f"model.adapter.{WEIGHTS}: " in message


# --- a tokenizer that comes with the adapter ------------------------------------------------------------------


@pytest.fixture
def with_tokenizer(made: dict[str, Made], tmp_path: Path) -> Path:
    """An adapter that brings the shipped tokenizer with another chat template and another end token."""
    folder = Path(shutil.copytree(made["every linear"].folder, tmp_path / "adapter"))
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, folder / name)
    (folder / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|user|>"}))
    return folder


def test_its_own_tokenizer_and_chat_template_are_used(
    with_tokenizer: Path, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    ended = run_here(*command(data, tmp_path / "own", with_tokenizer, "task.chat=auto")).done()
    assert f"those that model.adapter={with_tokenizer} brings; model.tokenizer names another" in ended.err
    for row in rows(tmp_path / "own"):
        text = f"Q: {row['prompt']} A:"
        assert row["prompt_tokens"] == len(tokenizer(text, add_special_tokens=False).input_ids)
    assert "tokenizer.files.chat_template.jinja" in run_json(tmp_path / "own")["fingerprint"]
    more = ["task.chat=auto", f"model.tokenizer={TINY}"]
    ended = run_here(*command(data, tmp_path / "named", with_tokenizer, *more)).done()
    assert "brings" not in ended.err
    row = rows(tmp_path / "named")[0]
    messages = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row["prompt_tokens"] == len(tokenizer(text, add_special_tokens=False).input_ids)


def test_its_end_token_ends_answers_too(
    with_tokenizer: Path, made: dict[str, Made], data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The token that the most answers hold is made its end token."""
    answers = [answer(made["every linear"], n) for n in range(LIMIT)]
    ids = sorted({token for tokens in answers for token in tokens})
    commonest = max(ids, key=lambda token: sum(token in tokens for tokens in answers))
    config = json.loads((with_tokenizer / "tokenizer_config.json").read_text())
    end = tokenizer.convert_ids_to_tokens(commonest)
    (with_tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": end}))
    run_here(*command(data, tmp_path / "out", with_tokenizer)).done()
    shortened = 0
    for row, tokens in zip(rows(tmp_path / "out"), answers, strict=True):
        place = tokens.index(commonest) if commonest in tokens else None
        shortened += place is not None
        assert row["completion_tokens"] == len(tokens[:place])
    assert shortened > 0


# --- the other commands ---------------------------------------------------------------------------------------


def test_describe_says_what_it_is_and_whether_it_fits(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe([f"model.adapter={with_tokenizer}"]) == 0
    said = capsys.readouterr().out
    assert f"adapter       {with_tokenizer}: LoRA of rank 8 on 28 modules" in said
    in_memory = [
        json.loads((describe(["--json", *more]), capsys.readouterr().out)[1])["place"]["resident_bytes"]
        for more in ([], [f"model.adapter={with_tokenizer}"])
    ]
    assert in_memory[1] - in_memory[0] == ADAPTER_BYTES
    foreign = write_adapter(tmp_path / "foreign", low_rank("model.layers.9.self_attn.q_proj", 256, 256))
    assert describe([f"model.adapter={foreign}"]) == 2
    assert f"{foreign / WEIGHTS}: tensor" in capsys.readouterr().err
    assert describe(["model.adapter=gone/away"]) == 2
    assert "model.adapter=gone/away" in capsys.readouterr().err


def test_quantize_refuses_one(made: dict[str, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = made["every linear"].folder
    assert quantize([f"model.adapter={adapter}", "quant=bnb", f"output.dir={tmp_path / 'out'}"]) == 2
    assert f"model.adapter={adapter} is never merged into weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what is refused ------------------------------------------------------------------------------------------


def test_adapters_that_cannot_run_are_exit_2(made: dict[str, Made], data: Path, tmp_path: Path) -> None:
    def refusal(adapter: Path | str, *more: str) -> str:
        return run_here(*command(data, tmp_path / "out", Path(adapter), *more)).refusal()

    assert "model.adapter=gone/away is no folder here" in refusal("gone/away")
    assert f"model.adapter={TINY} has no adapter_config.json" in refusal(TINY)
    ia3 = write_adapter(tmp_path / "ia3", {}, peft_type="IA3")
    assert "PEFT adapter of type IA3" in refusal(ia3)
    foreign = write_adapter(tmp_path / "foreign", low_rank("model.layers.0.self_attn.q_proj", 64, 64))
    for more in ([], ["dry_run=true"]):
        message = refusal(foreign, *more)
        assert str(foreign / WEIGHTS) in message and "lora_A" in message and "[4, 256]" in message
        assert not (tmp_path / "out" / "run.json").exists()
    message = run_here(*command(data, tmp_path / "out", None, f"model.path={foreign}")).refusal()
    assert f"model.path={foreign} is an adapter, no model" in message
    message = run_here(*command(data, tmp_path / "out", None, "model.adapter_revision=main")).refusal()
    assert "model.adapter_revision=main is set without model.adapter" in message
