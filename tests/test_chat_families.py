"""Chat templates in the manner of model families: tokens as transformers' apply_chat_template makes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2
import pytest
import transformers
from chat_templates import FAMILIES, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from pipeline.config import PACKAGE
from pipeline.errors import ConfigError
from pipeline.models.tokenizer import Tokenizer
from pipeline.prompts import PromptBuilder
from pipeline.settings import TaskSettings

WORDS = [
    "hello", "json", "@@json", "@@JSON", "<tool_response>", "</tool_response>", "<think>a\n</think>", "</think>\n", " ",
    "\n", "\t", "é🙂", "<|im_end|>", "[INST]", "<|close|>", "{{ x }}", "\\n", "42", "ABC", "user", "<|end|>",
]  # fmt: skip
MESSAGES = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
CASES = [(name, n) for name, family in FAMILIES.items() for n in range(len(family.arguments))]
PLAIN = "An ordinary ticket: it has  blanks.\nTwo lines, and a question?"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's tokenizer as this project and as transformers load it."""

    @cache
    def load(name: str) -> tuple[Tokenizer, Any]:
        family, folder = FAMILIES[name], tmp_path_factory.mktemp("family")
        made = transformers.AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")
        tokens = [AddedToken(text, special=True, normalized=False, rstrip=family.swallows) for text in family.control]
        made.add_special_tokens({"extra_special_tokens": tokens})
        made.chat_template = family.template
        made.save_pretrained(folder)
        return Tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)

    return load


def conversation(turns: list[str], system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def task(family: Family, n: int, system: str | None = None, **more: Any) -> TaskSettings:
    return TaskSettings(
        kind="generate", prompt="{{ text }}", system=system, chat_args=family.arguments[n], chat=True, **more
    )


def expected(oracle: Any, messages: list[dict[str, str]], arguments: dict[str, Any]) -> list[int] | None:
    """None where the template refuses."""
    try:
        made = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **arguments)
    except (jinja2.TemplateError, TypeError):
        return None
    ids: list[int] = made["input_ids"]
    return ids


@pytest.mark.parametrize("system", [None, " Be brief.\n", ""])
@pytest.mark.parametrize(("name", "n"), CASES)
def test_prompts_are_what_transformers_makes(name: str, n: int, system: str | None, loaded: Any) -> None:
    family, (tokenizer, oracle) = FAMILIES[name], loaded(name)
    if system is not None and not family.system:
        with pytest.raises(ConfigError, match=r"refuses the conversation \(a system text is not supported\)"):
            PromptBuilder(tokenizer, task(family, n, system), ["text"])
        return
    builder = PromptBuilder(tokenizer, task(family, n, system), ["text"])
    assert builder._frame is not None and builder._frame.frames(PLAIN), "rendered message by message"

    @settings(deadline=None, max_examples=40)
    @given(st.lists(MESSAGES, min_size=1, max_size=4))
    def holds(messages: list[str]) -> None:
        for message, made in zip(messages, builder.build([{"text": m} for m in messages]), strict=True):
            assert list(made.token_ids) == expected(oracle, conversation([message], system), family.arguments[n])

    holds()


@pytest.mark.parametrize(("name", "n"), CASES)
def test_conversations_are_what_transformers_makes_or_refuses(name: str, n: int, loaded: Any) -> None:
    family, (tokenizer, oracle) = FAMILIES[name], loaded(name)
    builder = PromptBuilder(tokenizer, task(family, n, messages="chat"), ["chat"])

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.tuples(st.sampled_from(["user", "user", "assistant", "system"]), MESSAGES), max_size=5))
    def holds(turns: list[tuple[str, str]]) -> None:
        messages = [{"role": role, "content": content} for role, content in turns]
        [made] = builder.build([{"chat": messages}])
        ids = expected(oracle, messages, family.arguments[n]) if messages else None
        assert (made.error is None) == (ids is not None)
        if ids is not None:
            assert list(made.token_ids) == ids

    holds()
    strict = conversation(["a", "b", "c"], None)[1:]
    assert (builder.build([{"chat": strict}])[0].error is not None) == family.alternates


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
@pytest.mark.parametrize(("name", "n"), CASES)
def test_a_cut_prompt_keeps_every_token_of_the_template(name: str, n: int, side: str, loaded: Any) -> None:
    family, (tokenizer, oracle) = FAMILIES[name], loaded(name)
    system = " Be brief.\n" if family.system else None
    builder = PromptBuilder(tokenizer, task(family, n, system, too_long=side), ["text"])

    def rendered(text: str) -> str:
        made: str = oracle.apply_chat_template(
            conversation([text], system), tokenize=False, add_generation_prompt=True, **family.arguments[n]
        )
        return made

    head, _, tail = rendered("middle").rpartition("middle")

    @settings(deadline=None, max_examples=40)
    @given(MESSAGES, st.integers(1, 60))
    def holds(message: str, over: int) -> None:
        text = rendered(message)
        if not (text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail)):
            return
        encoded = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        inside = [i for i, (b, e) in enumerate(spans) if b >= len(head) and b < e <= len(text) - len(tail)]
        own = range(inside[0], inside[-1] + 1) if inside else range(0)
        [made] = builder.build([{"text": message}], [max(1, len(ids) - over)])
        if over >= len(own) or over >= len(ids):
            assert made.error is not None and "the template's own text has more tokens" in made.error
            return
        dropped = own[:over] if side == "truncate_left" else own[-over:]
        assert list(made.token_ids) == [token for i, token in enumerate(ids) if i not in dropped]

    holds()
    [made] = builder.build([{"text": PLAIN * 9}], [150])
    shown = oracle.decode(made.token_ids, skip_special_tokens=False)
    assert len(made.token_ids) == 150
    if not family.swallows:  # control tokens that swallow the line end behind them
        assert shown.startswith(head) and shown.endswith(tail)


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
def test_a_conversation_of_several_messages_is_not_cut(side: str, loaded: Any) -> None:
    """What is left of one would be words of the assistant in the mouth of the user."""
    tokenizer, _ = loaded("qwen 3")
    builder = PromptBuilder(tokenizer, task(FAMILIES["qwen 3"], 0, messages="chat", too_long=side), ["chat"])
    one, several = conversation([PLAIN * 9], None), conversation([PLAIN, PLAIN * 9, PLAIN], None)
    whole, cut, uncut = builder.build([{"chat": several}, {"chat": one}, {"chat": several}], [None, 60, 60])
    assert len(cut.token_ids) == 60
    assert uncut.token_ids == ()
    tokens = len(whole.token_ids)
    reason = (
        f"the prompt has {tokens} tokens, there is room for 60, and it cannot be cut because it has several messages"
    )
    assert uncut.error == reason
