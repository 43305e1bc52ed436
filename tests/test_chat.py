"""The chat template applied fast, against transformers' apply_chat_template on templates of many shapes."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.chat import ChatFrame, read_messages, sought_texts
from pipeline.config import PACKAGE
from pipeline.errors import ConfigError
from pipeline.models.tokenizer import Tokenizer
from pipeline.prompts import Prompt, PromptBuilder
from pipeline.settings import TaskSettings

TINY = PACKAGE / "assets" / "tiny"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    + CHATML,
    "llama 3, which trims": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral, which refuses a system text": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 2, which joins system and user": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% set content = system + m['content'] if loop.first else m['content'] %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' if m['role'] == 'user' else content }}{% endfor %}"
    ),
    "qwen 3, which looks for tool answers": (
        "{% for message in messages %}{% if message.role == 'user' and message.content is string"
        " and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
        "{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}{% else %}"
        "{{ '<|im_start|>' + message.role + ':' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "glm, which looks at the end": (
        "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{{ '/nothink' if m.role == 'user' and not m.content.endswith('/nothink') else '' }}{% endfor %}<|assistant|>"
    ),
    "looks for a word": (
        "{% for m in messages %}{% if 'json' in m.content %}JSON!{% endif %}{{ m.content }};{% endfor %}A:"
    ),
    "compares": "{% for m in messages %}{{ 'hello' if m['content'] == 'hi' else m['content'] }}{% endfor %}",
    "a macro looks": (
        "{% macro shown(text, word) %}{{ '!' if word in text else '' }}{{ text }}{% endmacro %}"
        "{% for m in messages %}{{ shown(m.content, 'json') }}{% endfor %}"
    ),
    "a filter replaces": "{% for m in messages %}{{ m.content | replace('json', 'JSON') }}{% endfor %}",
    "numbers": "{% for m in messages %}{{ loop.index }}. {{ m.content }} ({{ m.content | length }}){% endfor %}",
    "asks for the length": (
        "{% for m in messages %}{% if m.content | length > 30 %}Long: {% endif %}{{ m.content }}{% endfor %}"
    ),
    "upper case": "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}A:",
    "twice": "{% for m in messages %}{{ m.content }} -- {{ m.content }}{% endfor %}",
    "as JSON": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "trims after": "{% for m in messages %}{{ ('> ' + m.content + '\n') | trim }}|{% endfor %}",
    "left trim": "{% for m in messages %}{{ m.content.lstrip() }}|{% endfor %}",
    "empty is special": (
        "{% for m in messages %}{% if m.content %}<{{ m.content }}>{% else %}nothing{% endif %}{% endfor %}"
    ),
    "first line": "{% for m in messages %}{{ m.content.split('\n')[0] }}|{% endfor %}",
    "marks generations": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
    "control": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}[{{ m.content }}]{% endfor %}",
}
FRAMED = {
    "chatml", "default system", "llama 3, which trims", "mistral, which refuses a system text",
    "llama 2, which joins system and user", "qwen 3, which looks for tool answers", "control",
    "trims after", "left trim",
}  # fmt: skip
"""Templates that must not cost a rendering for every message."""
REFUSES_SYSTEM = {"mistral, which refuses a system text"}
WORDS = [
    "json",
    "hi",
    "<tool>",
    "</tool>",
    "/nothink",
    "user",
    "system",
    " ",
    "\n",
    "{{ x }}",
    "</s>",
    "a" * 29,
    "É",
    "\\n",
]
MESSAGES = st.text(max_size=20) | st.lists(st.sampled_from(WORDS), max_size=4).map("".join)


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A template to the tokenizer as this project and as transformers load it."""

    def make(template: str | None) -> tuple[Tokenizer, Any]:
        if template is None:
            return Tokenizer(str(TINY)), transformers.AutoTokenizer.from_pretrained(TINY)
        folder = tmp_path_factory.mktemp("tokenizer") / "t"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)

    return make


def expected(oracle: Any, message: str, system: str | None, arguments: dict[str, Any]) -> str:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": message})
    text: str = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    return text


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["shipped", *TEMPLATES])
def test_any_message_is_framed_as_transformers_does(name: str, system: str | None, with_template: Any) -> None:
    tokenizer, oracle = with_template(TEMPLATES.get(name))
    if system is not None and name in REFUSES_SYSTEM:
        with pytest.raises(ConfigError, match=r"refuses the conversation \(.*alternate.*\); drop task\.system"):
            ChatFrame(tokenizer, system, {})
        return
    arguments = {"enable_thinking": False} if name.startswith("qwen") else {}
    frame = ChatFrame(tokenizer, system, arguments)

    @settings(deadline=None, max_examples=60)
    @given(message=MESSAGES)
    @example("")
    @example(" \n")
    @example("hi")
    @example("<tool>a</tool>")
    @example("think/nothink")
    @example(" give me json\n")
    @example("a" * 31)
    def holds(message: str) -> None:
        assert frame.text(message) == expected(oracle, message, system, arguments)

    holds()
    plain = "An ordinary ticket of the user, with a system: and  blanks.\nTwo lines."
    assert frame.frames(plain) == frame.is_constant == (name == "shipped" or name in FRAMED or name in SEEKING)


SEEKING = {
    "glm, which looks at the end", "looks for a word", "compares", "a macro looks", "a filter replaces",
    "empty is special",
}  # fmt: skip
"""Templates that render only the messages with the texts they look for."""


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("chatml", set()),
        ("llama 3, which trims", set()),
        ("qwen 3, which looks for tool answers", {"<tool>", "</tool>"}),
        ("glm, which looks at the end", {"/nothink"}),
        ("looks for a word", {"json"}),
        ("a filter replaces", {"json", "JSON"}),
        ("marks generations", None),
    ],
)
def test_what_a_template_looks_for(name: str, texts: set[str] | None) -> None:
    found = sought_texts(TEMPLATES[name])
    assert (None if found is None else set(found)) == texts
    assert sought_texts(None) is None


LOOKING = (
    "{% set word = 'json' %}{% if word in messages[0].content %}!{% endif %}{{ messages[0].content }}",
    "{% set a = 'json' %}{% set b = a %}{% if messages[0].content.startswith(b) %}!{% endif %}"
    "{{ messages[0].content }}",
    "{% set ns = namespace(word='') %}{% set ns.word = 'json' %}{% if ns.word in messages[0].content %}!{% endif %}"
    "{{ messages[0].content }}",
    "{% for word in ['yaml', 'json'] %}{% if word in messages[0].content %}!{% endif %}{% endfor %}"
    "{{ messages[0].content }}",
    "{% with word = 'json' %}{% if word in messages[0].content %}!{% endif %}{% endwith %}{{ messages[0].content }}",
    "{% set word %}json{% endset %}{% if word in messages[0].content %}!{% endif %}{{ messages[0].content }}",
    "{% macro f(t, word='json') %}{% if word in t %}!{% endif %}{{ t }}{% endmacro %}{{ f(messages[0].content) }}",
    "{% if 'json' in messages[0].content | lower %}!{% endif %}{{ messages[0].content }}",
    "{% if 'JSON' in messages[0].content.upper() %}!{% endif %}{{ messages[0].content }}",
    "{% if messages[0].content.isdigit() %}!{% endif %}{{ messages[0].content }}",
    "{% if messages[0].content is upper %}!{% endif %}{{ messages[0].content }}",
)
"""Templates that find a text in a message by a detour, or in other letters."""


@pytest.mark.parametrize("template", LOOKING)
def test_what_is_sought_by_a_detour_is_found(template: str, with_template: Any) -> None:
    tokenizer, oracle = with_template(template)
    frame = ChatFrame(tokenizer, None, {})
    for message in ("json", "give me JSON, please", "Json", "plain", "yaml", "8", "WORD", "É"):
        assert frame.text(message) == expected(oracle, message, None, {})


def test_the_template_that_is_looked_at_is_the_one_that_is_used(with_template: Any) -> None:
    """A tokenizer may bring several, and an argument may put another in their place."""
    tokenizer, oracle = with_template(CHATML)
    for loaded in (tokenizer._tokenizer, oracle):
        loaded.chat_template = {
            "default": TEMPLATES["looks for a word"],
            "tool_use": "{{ tools | length }}{{ 'yaml' in messages[0].content }}{{ messages[0].content }}",
        }
    assert tokenizer.has_chat_template
    given: list[dict[str, Any]] = [{}, {"tools": [{"type": "function"}]}, {"chat_template": TEMPLATES["compares"]}]
    for arguments in given:
        frame = ChatFrame(tokenizer, None, arguments)
        for message in ("json", "yaml", "hi", "plain"):
            assert frame.text(message) == expected(oracle, message, None, arguments)
    for loaded in (tokenizer._tokenizer, oracle):
        loaded.chat_template = {"other": CHATML}
    with pytest.raises(ConfigError, match="refuses the conversation"):
        ChatFrame(tokenizer, None, {})
    assert ChatFrame(tokenizer, None, {"chat_template": "other"}).is_constant


MOMENT = "%d %b %Y|%-d.%-m.%y|%A %B %j|%H:%M:%S %p %I|%c %x %X|%U %W %w %Z %z"


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  ", "x\n"])
def test_the_present_moment_is_the_one_that_is_given(
    start: str, with_template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that is resumed tomorrow goes on with the same prompts."""
    then = datetime(2024, 7, 6, 9, 5, 3)
    clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: then)})
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
    tokenizer, oracle = with_template(
        start + "  {% if strftime_now is defined %}{{ strftime_now('" + MOMENT + "') + '!' }}{% endif %}\n"
        "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{% for m in messages %}{{ day() }}{{ m.content }}"
        "{% endfor %}\n"
    )
    text = expected(oracle, "hello", None, {})
    assert "06 Jul 2024|6.7.24" in text
    monkeypatch.undo()
    frame = ChatFrame(tokenizer, None, {}, then)
    assert frame.is_dated and frame.is_constant
    assert frame.text("hello") == text
    assert ChatFrame(tokenizer, None, {}).text("hello") != text
    assert not ChatFrame(with_template(CHATML)[0], None, {}, then).is_dated


# --- whole conversations -----------------------------------------------------------------------------------------

TURNS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=15), min_size=1, max_size=5)


def conversation(turns: list[str], system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other, behind a system text."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@cache
def tiny() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY)


@cache
def builder(system: str | None = None) -> PromptBuilder:
    task = TaskSettings(kind="generate", prompt="{{ prompt }}", messages="chat", system=system)
    return PromptBuilder(Tokenizer(str(TINY)), task, ["chat", "other"])


@settings(deadline=None, max_examples=50)
@given(turns=TURNS, own=st.none() | st.text(max_size=5), as_json=st.booleans())
def test_conversations_are_what_apply_chat_template_gives(turns: list[str], own: str | None, as_json: bool) -> None:
    messages = conversation(turns, own)
    value: Any = json.dumps(messages) if as_json else messages
    for system in (None, "Be brief."):
        given_first = messages if own is not None or system is None else conversation(turns, system)
        encoded = tiny().apply_chat_template(given_first, tokenize=True, add_generation_prompt=True, return_dict=True)
        [made] = builder(system).build([{"chat": value}])
        assert made == Prompt(tuple(encoded["input_ids"]))
        assert made.token_ids.count(tiny().bos_token_id) == 1


BAD = {
    "null": (None, "no list of role and content"),
    "empty list": ([], "no list of role and content"),
    "text that is no JSON": ("hello", "Expecting value"),
    "JSON of another kind": ('{"role": "user"}', "no list of role and content"),
    "a number": (3, "no list of role and content"),
    "texts": (["hello"], "no role or no content that is text"),
    "null in the list": ([None], "no role or no content that is text"),
    "null content": ([{"role": "user", "content": None}], "no role or no content that is text"),
    "null role": ([{"role": None, "content": "x"}], "no role or no content that is text"),
    "no content": ([{"role": "user"}], "no role or no content that is text"),
    "content in parts": ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "no content that is text"),
    "a role unknown to the template": ([{"role": "tool", "content": "x"}], "role must be system, user or assistant"),
    "half a surrogate pair": ('[{"role": "user", "content": "\\ud800"}]', "surrogates not allowed"),
}


def test_bad_conversations_cost_no_other_row_anything() -> None:
    good = {"chat": conversation(["hello"])}
    made = builder().build([good, *({"chat": value} for value, _ in BAD.values()), good])
    assert made[0] == made[-1]
    assert made[0].error is None and made[0].token_ids
    for (name, (_, words)), prompt in zip(BAD.items(), made[1:-1], strict=True):
        assert prompt.token_ids == (), name
        assert prompt.error is not None and prompt.error.startswith("the prompt cannot be made: "), name
        assert words in prompt.error, name
        assert "\n" not in prompt.error


def test_further_keys_of_a_message_reach_the_template(with_template: Any) -> None:
    tokenizer, _ = with_template("{% for m in messages %}{{ m.name | default('-') }}:{{ m.content }};{% endfor %}")
    task = TaskSettings(kind="generate", prompt="x", messages="chat")
    chat = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "user", "content": "b", "name": None}]
    [made] = PromptBuilder(tokenizer, task, ["chat"]).build([{"chat": chat}])
    assert tokenizer.decode([made.token_ids]) == ["Ann:a;-:b;"]
    assert read_messages(chat)[1] == {"role": "user", "content": "b"}, "a null is a key that is not there"


def test_messages_need_a_chat_model(with_template: Any) -> None:
    assert builder().columns == ["chat"]
    task = TaskSettings(kind="generate", prompt="x", messages="chat", chat=False)
    with pytest.raises(ConfigError, match=r"^task\.messages is set, but the prompt is no chat"):
        PromptBuilder(Tokenizer(str(TINY)), task, ["chat"])


def test_the_frame_is_the_text_around_a_message(with_template: Any, tmp_path: Path) -> None:
    tokenizer, _ = with_template(TEMPLATES["llama 3, which trims"])
    frame = ChatFrame(tokenizer, "Sys", {})
    head, tail = frame.around("\n Ticket: ", " \nEnd ")
    assert head.endswith("<|end_header_id|>\n\nTicket: ")
    assert tail.startswith(" \nEnd<|eot_id|>")
    assert frame.text("\n Ticket: x \nEnd ") == head + "x" + tail
