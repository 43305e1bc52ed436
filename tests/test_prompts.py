"""Rows to prompt token ids, compared with the tokenizer and the chat template as transformers applies them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from pipeline import prompts
from pipeline.config import PACKAGE
from pipeline.errors import ConfigError
from pipeline.models.tokenizer import Tokenizer
from pipeline.prompts import Prompt, PromptBuilder
from pipeline.settings import TaskSettings
from pipeline.template import RowTemplate

TINY = str(PACKAGE / "assets" / "tiny")
COLUMNS = ["text", "n", "odd name", "nothing"]
ROW: dict[str, Any] = {"text": "my invoice", "n": 3, "odd name": "odd", "nothing": None}
LABELS = ["billing", "login", " billing", "Zahlung", "🙂", "a b", ",", "<|end|>"]

tiny = Tokenizer(TINY)
oracle = transformers.AutoTokenizer.from_pretrained(TINY)


def builder(prompt: str = "{{ text }}", columns: Sequence[str] = COLUMNS, **settings: Any) -> PromptBuilder:
    return PromptBuilder(tiny, TaskSettings(kind="generate", prompt=prompt, **settings), columns)


def rendered(prompt: str, row: dict[str, Any] | None = None) -> str:
    return RowTemplate(prompt, COLUMNS).render(ROW if row is None else row)


def reason(prompt: str, row: dict[str, Any] | None = None, columns: Sequence[str] = COLUMNS) -> str:
    """Why the row has no prompt."""
    made = builder(prompt, columns).build([ROW if row is None else row])
    assert len(made) == 1
    assert made[0].token_ids == ()
    assert made[0].error is not None
    assert "\n" not in made[0].error
    return made[0].error


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("{{ text }}", "my invoice"),
        ("{{ n }} and {{ 1.5 }} and {{ n + 1 }}", "3 and 1.5 and 4"),
        ('{{ row["odd name"] }}/{{ row.text }}', "odd/my invoice"),
        ("{% if nothing %}a{% else %}b{% endif %}", "b"),
        ("{{ nothing or 'none given' }}", "none given"),
        ("{% if nothing is none %}null{% endif %}", "null"),
        ("{{ text | upper | replace('MY', 'your') }}", "your INVOICE"),
        ("{{ '<b>' }}{{ text ~ '&' }}", "<b>my invoice&"),
        ("line\n{{ text }}\n", "line\nmy invoice"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
        ("no tag", "no tag"),
    ],
)
def test_a_template_over_the_columns(prompt: str, text: str) -> None:
    assert rendered(prompt) == text


@pytest.mark.parametrize("value", ["", " ", "0", "{{ text }}", "{% raw %}", "<|end|>", "a\x00b", "é🙂\u200d", "\r\n"])
def test_a_value_is_inserted_as_it_is(value: str) -> None:
    assert rendered("[{{ text }}]", {**ROW, "text": value}) == f"[{value}]"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (b"bytes", "bytes, not text"),
        (["a"], "list, not text"),
        ({"a": 1}, "dict, not text"),
        (date(2026, 1, 1), "date, not text"),
    ],
)
def test_a_value_that_is_no_text_is_an_error(value: Any, kind: str) -> None:
    row = {**ROW, "text": value}
    assert reason("Say {{ text }}", row) == f"the prompt cannot be made: a value of the template is {kind}"
    assert kind in reason("{{ row['text'] }}", row)
    assert builder("Say {% if text %}something{% endif %}").build([row])[0].error is None


def test_a_row_without_the_column_is_an_error() -> None:
    assert "text" in reason("{{ text }}", {})
    assert "nope" in reason("{{ row['nope'] }}")


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ nope }}",
        "{% if nope %}a{% endif %}",
        "{{ nope.x }}",
        "{% for i in nope %}a{% endfor %}",
        "{{ text ~ nope }}",
        "{{ lipsum() }}",
        "{% set a = lipsum %}{{ a }}",
    ],
)
def test_an_unknown_column_is_a_config_error_with_the_columns(prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.prompt uses (nope|lipsum), .* text, n, odd name, nothing$"):
        RowTemplate(prompt, COLUMNS)
    with pytest.raises(ConfigError, match="the columns are none"):
        RowTemplate(prompt, [])


@pytest.mark.parametrize(
    "prompt", ["{{ text", "{% if text %}", "{{ text | }}", "{{ text | nope }}", "{% nope %}", "{{ [1, 2] | random }}"]
)
def test_a_syntax_error_is_a_config_error_with_the_line(prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"^task\.prompt is no valid Jinja template: .* \(line 2\)$"):
        RowTemplate(f"a\n{prompt}", COLUMNS)


def test_the_columns_that_a_template_reads() -> None:
    assert RowTemplate("{{ text }}{% if n %}{% endif %}", COLUMNS).columns == ["n", "text"]
    assert RowTemplate("{{ row.text }}", COLUMNS).columns == COLUMNS
    assert RowTemplate("{% set n = 1 %}{{ n }}", COLUMNS).columns == []
    assert RowTemplate("{{ row }}", ["row", "text"]).columns == ["row"]


@pytest.mark.parametrize("name", ["range", "dict", "namespace", "lipsum", "row", "cycler"])
def test_a_column_may_have_the_name_of_a_jinja_function(name: str) -> None:
    template = RowTemplate(f"{{{{ {name} }}}}", [name, "text"])
    assert template.columns == [name]
    assert template.render({name: "value"}) == "value"


# --- sandbox -----------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ text.__class__ }}",
    "{{ text | attr('__class__') }}",
    "{{ n.__add__ }}",
    "{{ row.__class__ }}",
    "{{ '{0.__class__}'.format(text) }}",
    "{{ '%s' | format(text.__class__) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ lipsum }}",
    "{{ lipsum() }}",
    "{{ dict }}",
    "{{ range }}",
    "{{ text.upper }}",
    "{{ config }}",
    "{{ request }}",
    "{% include '/etc/passwd' %}",
    "{% include 'x' ignore missing %}{{ nothing }}",
    "{% import 'x' as y %}{{ y }}",
    "{% from 'x' import y %}{{ y }}",
    "{% extends 'x' %}",
    "{{ range(10**12) | list }}",
    "{% for i in range(10**12) %}a{% endfor %}",
    "{{ row.pop('text') }}",
    "{{ row.update({'text': 1}) }}",
    "{{ row.items() }}",
    "{% set row.text = 1 %}",
]


@pytest.mark.parametrize("prompt", ESCAPES)
def test_the_sandbox_gives_nothing_away(prompt: str) -> None:
    row = dict(ROW)
    try:
        template = builder(prompt)
    except ConfigError:
        return
    [made] = template.build([row])
    assert made.token_ids == ()
    assert made.error is not None
    assert row == ROW


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_a_bad_row_leaves_the_others_as_they_are(chat: bool) -> None:
    made = builder("Say {{ text }} {{ 6 / n }}", chat=chat)
    good = [{**ROW, "text": text} for text in ("one", "two two", "", "drei")]
    bad = [{**ROW, "n": 0}, {**ROW, "text": None}, {}, {**ROW, "n": "x"}]
    alone = [made.build([row])[0] for row in good]
    mixed = made.build([bad[0], good[0], bad[1], bad[2], good[1], good[2], bad[3], good[3]])
    assert [prompt for prompt in mixed if prompt.error is None] == alone
    assert [index for index, prompt in enumerate(mixed) if prompt.error is not None] == [0, 2, 3, 6]
    assert "division by zero" in str(mixed[0].error)
    assert made.build(bad)[1].error == mixed[2].error
    assert made.build([]) == []


@pytest.mark.parametrize("chat", [False, True])
def test_half_a_surrogate_pair_costs_only_its_own_row(chat: bool) -> None:
    made = builder("{{ text }}{% if n %}{{ '\\ud800' }}{% endif %}", chat=chat)
    bad, good = made.build([{"text": "a", "n": 1}, {"text": "a", "n": 0}])
    assert "surrogates not allowed" in str(bad.error)
    assert [good] == builder(chat=chat).build([{"text": "a"}])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUES = TEXT | st.none() | st.integers() | st.floats() | st.booleans() | st.binary(max_size=4) | st.lists(TEXT)


@settings(deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"text": VALUES, "n": VALUES}), max_size=6), chat=st.booleans())
def test_one_prompt_a_row_in_order_whatever_it_holds(rows: list[dict[str, Any]], chat: bool) -> None:
    made = builder("{{ text }}|{{ n }}", chat=chat).build(rows)
    assert len(made) == len(rows)
    for row, prompt in zip(rows, made, strict=True):
        printable = all(isinstance(row.get(name), (str, int, float)) for name in ("text", "n"))
        assert (prompt.error is None) == printable
        if printable:
            text = f"{row['text']}|{row['n']}"
            assert prompt.token_ids == tuple(chat_ids(text) if chat else oracle(text)["input_ids"])


# --- tokens ------------------------------------------------------------------------------------------------------


def chat_ids(text: str, system: str | None = None) -> list[int]:
    """The ids that transformers itself makes of the conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    encoded = oracle.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


@pytest.mark.parametrize("text", ["my invoice", "", " x ", "é🙂", "a\nb", "<|user|>"])
@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_a_chat_is_what_apply_chat_template_gives(text: str, system: str | None) -> None:
    [made] = builder(system=system, chat=True).build([{"text": text}])
    assert list(made.token_ids) == chat_ids(text, system)
    assert made.token_ids.count(oracle.bos_token_id) == 1
    assert made.token_ids[0] == oracle.bos_token_id
    assert builder(system=system).build([{"text": text}]) == [made], "chat is auto: this tokenizer has a template"


@pytest.mark.parametrize("text", ["my invoice", " x ", "é🙂", "a\nb"])
def test_plain_text_is_what_the_tokenizer_gives(text: str) -> None:
    [made] = builder("Say: {{ text }}", chat=False).build([{"text": text}])
    assert list(made.token_ids) == oracle(f"Say: {text}")["input_ids"]


def test_chat_arguments_reach_the_template(chat_template: Any) -> None:
    tokenizer = chat_template("{{ messages[0].content }}{% if thinking is defined and not thinking %} no{% endif %}")
    for arguments, text in (({}, "hello"), ({"thinking": False}, "hello no"), ({"thinking": True}, "hello")):
        settings = TaskSettings(kind="generate", prompt="{{ text }}", chat_args=arguments)
        [made] = PromptBuilder(tokenizer, settings, COLUMNS).build([{"text": "hello"}])
        assert list(made.token_ids) == oracle(text, add_special_tokens=False)["input_ids"]


def test_a_chat_without_a_template_is_a_config_error(chat_template: Any) -> None:
    tokenizer = chat_template(None)
    with pytest.raises(ConfigError, match=r"^task\.chat=true, but the tokenizer has no chat template"):
        PromptBuilder(tokenizer, TaskSettings(kind="generate", prompt="x", chat=True), COLUMNS)
    assert not PromptBuilder(tokenizer, TaskSettings(kind="generate", prompt="x"), COLUMNS).is_chat
    with pytest.raises(ConfigError, match=r"^task\.system is set, but the prompt is no chat"):
        PromptBuilder(tokenizer, TaskSettings(kind="generate", prompt="x", system="Be brief."), COLUMNS)


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        ("{{ raise_exception('no system message') }}", {}),
        ("{{ messages[0].nope.nope }}", {}),
        ("{{ messages[0].content }}", {"tokenize": True}),
        ("{{ messages[0].content }}", {"continue_final_message": True}),
    ],
)
def test_a_chat_template_that_refuses_is_a_config_error(
    template: str, arguments: dict[str, Any], chat_template: Any
) -> None:
    settings = TaskSettings(kind="generate", prompt="x", system="Be brief.", chat_args=arguments)
    with pytest.raises(ConfigError, match=r"chat template refuses the conversation \(.+\); drop task\.system"):
        PromptBuilder(chat_template(template), settings, COLUMNS)


@pytest.fixture
def chat_template(tmp_path: Any) -> Any:
    """The shipped tokenizer with another chat template, or with none."""

    def make(template: str | None) -> Tokenizer:
        changed = transformers.AutoTokenizer.from_pretrained(TINY)
        changed.chat_template = template
        changed.save_pretrained(tmp_path)
        return Tokenizer(str(tmp_path))

    return make


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"^model\.tokenizer: .* name one with model\.tokenizer="):
        Tokenizer(str(tmp_path))


# --- continuations -----------------------------------------------------------------------------------------------


def joint(prompt: str, label: str) -> tuple[int, ...]:
    """The label's part of the tokens of prompt and label as one text."""
    before, whole = (oracle(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + label))
    assert whole[: len(before)] == before, "the boundary is not kept"
    return tuple(whole[len(before) :])


@pytest.mark.parametrize("label", LABELS)
def test_a_label_behind_a_chat_is_cut_as_in_place(label: str) -> None:
    made = builder(chat=True, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "any text"}]
    prompt = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made.continuation(label) == joint(prompt, label)


@pytest.mark.parametrize("label", [f" {label}" for label in LABELS])
@pytest.mark.parametrize("tail", ["", "\nLabel:", " {# note #}topic", "{% if n %}{% endif %}?", "{{ '' -}}  \n :"])
def test_a_label_behind_a_plain_prompt_is_cut_as_in_place(tail: str, label: str) -> None:
    prompt = f"Which? {{{{ text }}}}{tail}"
    assert builder(prompt, chat=False).continuation(label) == joint(rendered(prompt), label)


@pytest.mark.parametrize(
    ("prompt", "tail"),
    [
        ("{{ text }}\nLabel:\n", "\nLabel:"),
        ("{{ text -}}  \n :", ":"),
        ("{{ text }} a{# note #} b", " a b"),
        ('{{ text }}, {"a": {"b": 1}}', ', {"a": {"b": 1}}'),
        ("{{ text }}", ""),
        ("{% if n %}a{% endif %}", ""),
        ("all constant", "all constant"),
        ("", ""),
    ],
)
def test_the_constant_text_that_every_prompt_ends_with(prompt: str, tail: str) -> None:
    assert RowTemplate(prompt, COLUMNS).tail == tail
    assert rendered(prompt).endswith(tail)


def test_a_label_that_merges_with_the_prompt_is_tokenized_alone(tmp_path: Any) -> None:
    """With merges a+b and :+b, no cut of "x:b" gives the prompt's own tokens, so the label's are its own."""
    vocab = {token: index for index, token in enumerate(["x", ":", "a", "b", "c", ":b", "ab"])}
    backend = RustTokenizer(models.BPE(vocab=vocab, merges=[(":", "b"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    made = PromptBuilder(tokenizer, TaskSettings(kind="label", prompt="{{ text }}:"), COLUMNS)
    assert tokenizer.encode(["x:", "x:b", "x:ab"], add_special_tokens=False) == [[0, 1], [0, 5], [0, 1, 6]]
    assert made.continuation("b") == (vocab["b"],)
    assert made.continuation("ab") == (vocab["ab"],)
    assert made.continuation("c") == (vocab["c"],)


# --- too long ----------------------------------------------------------------------------------------------------

LEFT, RIGHT = "truncate_left", "truncate_right"
HEAD, TAIL = "Which topic is this ticket about?\n\n", "\n\nOne word:"
NEWS = "My parcel is late, the 2nd time; who pays? Grüße 🙂\n"


@pytest.fixture(scope="module")
def adds_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The shipped tokenizer, which here begins plain text with <|bos|>, as Llama's does."""
    folder = tmp_path_factory.mktemp("bos")
    changed = transformers.AutoTokenizer.from_pretrained(TINY)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    changed.save_pretrained(folder)
    return Tokenizer(str(folder))


def cut_by_oracle(text: str, head: str, tail: str, room: int, side: str, *, bos: bool) -> list[int] | None:
    """Tokenize everything, then drop tokens that have nothing but the row's own text, which is between head and tail.

    A token that reaches into head or tail stays, and with it what lies beyond.
    """
    encoded = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = [*([0] if bos else []), *encoded["input_ids"]]
    spans = [*([(0, 0)] if bos else []), *encoded["offset_mapping"]]
    inside = [i for i, (begin, end) in enumerate(spans) if begin >= len(head) and begin < end <= len(text) - len(tail)]
    own = range(inside[0], inside[-1] + 1) if inside else range(0)
    over = len(ids) - room
    if over <= 0:
        return ids
    if over >= len(own):
        return None
    dropped = own[:over] if side == LEFT else own[-over:]
    return [token for i, token in enumerate(ids) if i not in dropped]


@settings(deadline=None, max_examples=150)
@given(
    text=st.text("ab \n<|>", max_size=60) | st.text(max_size=30) | st.integers(0, 9).map(lambda n: NEWS * n),
    room=st.integers(1, 80),
    side=st.sampled_from([LEFT, RIGHT]),
    kind=st.sampled_from(["chat", "plain", "bos"]),
    head=st.sampled_from(["", HEAD]),
    tail=st.sampled_from(["", TAIL]),
)
def test_a_long_prompt_loses_tokens_of_the_row_s_own_text(
    text: str, room: int, side: str, kind: str, head: str, tail: str, adds_bos: Tokenizer
) -> None:
    tokenizer = adds_bos if kind == "bos" else tiny
    task = TaskSettings(kind="generate", prompt=head + "{{ text }}" + tail, too_long=side, chat=kind == "chat")
    [made] = PromptBuilder(tokenizer, task, ["text"]).build([{"text": text}], [room])
    around = ("", "")
    if kind == "chat":
        framed = oracle.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
        around = tuple(framed.split("x"))
    whole = around[0] + head + text + tail + around[1]
    expected = cut_by_oracle(whole, around[0] + head, tail + around[1], room, side, bos=kind == "bos")
    if expected is None:
        assert made.token_ids == ()
        assert made.error == f"the template's own text has more tokens than the {room} there is room for"
    else:
        assert made == Prompt(tuple(expected))
        assert len(made.token_ids) <= room


@pytest.mark.parametrize("side", [LEFT, RIGHT])
@pytest.mark.parametrize("chat", [False, True])
def test_a_cut_prompt_fills_the_room_and_keeps_head_and_tail(chat: bool, side: str, adds_bos: Tokenizer) -> None:
    task = TaskSettings(kind="generate", prompt=f"{HEAD}{{{{ text }}}}{TAIL}", too_long=side, chat=chat, system=None)
    made = PromptBuilder(adds_bos, task, ["text"])
    short, long = made.build([{"text": "My parcel"}, {"text": "first " + NEWS * 20 + "last"}], [90, 90])
    assert len(short.token_ids) < 90 == len(long.token_ids)
    assert long.token_ids[0] == 0 and long.token_ids.count(0) == 1, "<|bos|> stays"
    text = adds_bos.decode([long.token_ids])[0]
    assert HEAD in text and TAIL in text
    assert ("first" in text, "last" in text) == ((False, True) if side == LEFT else (True, False))
    assert made.build([{"text": "x"}], [len(short.token_ids)])[0].error is None


def test_error_is_the_policy_unless_another_is_chosen() -> None:
    whole = builder(chat=False).build([{"text": NEWS * 20}], [10])[0]
    assert whole == builder(chat=False).build([{"text": NEWS * 20}])[0]
    assert len(whole.token_ids) > 10, "the engine says that it has no room"


def test_a_template_without_room_for_the_row_is_an_error() -> None:
    made = builder(f"{HEAD}{{{{ text }}}}", too_long=LEFT, chat=False)
    fitting, long = made.build([{"text": ""}, {"text": NEWS}], [len(tiny.encode([HEAD], False)[0])] * 2)
    assert fitting.error is None
    assert "the template's own text has more tokens" in str(long.error)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}. {{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    ],
)
def test_what_a_chat_template_makes_of_the_text_is_not_cut(template: str, chat_template: Any) -> None:
    """Where the row's own tokens cannot be told from the template's, some of the latter could go."""
    task = TaskSettings(kind="generate", prompt="{{ text }}", too_long=LEFT)
    short, long = PromptBuilder(chat_template(template), task, ["text"]).build(
        [{"text": "a"}, {"text": NEWS * 9}], [50, 50]
    )
    assert short.error is None
    assert "cannot be cut" in str(long.error) and "50" in str(long.error)


def test_blanks_that_a_chat_template_trims_are_no_text_of_the_template(chat_template: Any) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    task = TaskSettings(kind="generate", prompt="\n Ticket: {{ text }} \n", too_long=RIGHT)
    [made] = PromptBuilder(chat_template(template), task, ["text"]).build([{"text": NEWS * 9}], [40])
    whole = f"<|user|>\nTicket: {(NEWS * 9).strip()}<|end|>\n"
    assert list(made.token_ids) == cut_by_oracle(whole, "<|user|>\nTicket: ", "<|end|>\n", 40, RIGHT, bos=False)


def test_a_token_that_reaches_into_the_template_stays() -> None:
    """The template's last line end merges with the row's own ones; without it the question would not be set apart."""
    made = builder("Ticket:\n{{ text }}\n\nOne word:", chat=False, too_long=RIGHT)
    text = "a b c d e f g h\n\n"
    whole = tiny.encode([f"Ticket:\n{text}\n\nOne word:"], True)[0]
    [cut] = made.build([{"text": text}], [len(whole) - 3])
    assert tiny.decode([cut.token_ids])[0].endswith("\n\nOne word:")
    assert tiny.decode([cut.token_ids])[0].startswith("Ticket:\na b")


@settings(deadline=None, max_examples=100)
@given(
    pieces=st.lists(
        st.sampled_from([NEWS, "word ", "\n\n", "語", "é🙂", "<|end|>", "   ", "12 "]), min_size=1, max_size=8
    ),
    times=st.integers(1, 40),
    side=st.sampled_from(["error", LEFT, RIGHT]),
    room=st.integers(1, 60),
    chat=st.booleans(),
    head=st.sampled_from(["", HEAD]),
    tail=st.sampled_from(["", TAIL]),
)
def test_a_very_long_prompt_is_what_it_would_be_if_tokenized_whole(
    pieces: list[str], times: int, side: str, room: int, chat: bool, head: str, tail: str
) -> None:
    made = builder(head + "{{ text }}" + tail, too_long=side, chat=chat)
    row = {"text": "".join(pieces) * times}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LONG_TEXT": 100, "END": 64, "SEAM": 8}.items():
            patch.setattr(prompts, name, value)
        [ends] = made.build([row], [room], longest=60)
    [whole] = made.build([row], [room])
    if ends.error is None:
        assert ends == whole
    elif side == "error":
        assert ends.error == "the prompt has more than the 60 tokens there is room for"
        assert len(whole.token_ids) > 60
    else:
        assert ends.error == whole.error


MEMORY = """
import re, sys
from pipeline.models.tokenizer import Tokenizer
from pipeline.prompts import PromptBuilder
from pipeline.settings import TaskSettings
task = TaskSettings(kind="generate", prompt="{{ text }}", too_long=sys.argv[2])
built = PromptBuilder(Tokenizer(sys.argv[1]), task, ["text"])
rows = [{"text": "word " * 2_000_000}] + [{"text": "word " * 20_000}] * 10
rss = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = rss()
made = built.build(rows, [1000] * len(rows), longest=1024)
print((rss() - before) // 1024, {(p.error or "")[:40] + str(len(p.token_ids)) for p in made})
"""


@pytest.mark.parametrize("side", ["error", LEFT])
def test_memory_does_not_grow_with_the_length_of_prompts(side: str) -> None:
    """10 MB in one text, of which the tokenizer by itself would take a hundred times as much."""
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, TINY, side], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    mebibytes, made = ended.stdout.split(maxsplit=1)
    assert int(mebibytes) < 250
    if side == LEFT:
        assert made.strip() == "{'1000'}"
    else:
        assert "more than the 1024 tokens" in made


def test_texts_are_tokenized_in_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            sizes.append((len(texts), sum(map(len, texts))))
            return backend.encode_batch_fast(texts, **options)

    sizes: list[tuple[int, int]] = []
    backend = tiny._backend
    texts = [NEWS * (n % 5) for n in range(50)] + [NEWS * 20]
    expected = tiny.encode(texts, True)
    monkeypatch.setattr(tiny, "_backend", Backend())
    monkeypatch.setattr("pipeline.models.tokenizer.BATCH_CHARACTERS", 300)
    assert tiny.encode(texts, True) == expected == [oracle(text)["input_ids"] for text in texts]
    assert all(size <= 300 or count == 1 for count, size in sizes)
    assert 5 < len(sizes) < 40


def test_a_column_whose_name_is_no_identifier_is_hinted_at() -> None:
    with pytest.raises(ConfigError, match=r"a column whose name is no identifier is written row\['its name'\]$"):
        RowTemplate("{{ odd name }}", [*COLUMNS, "odd name"])
