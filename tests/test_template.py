"""Rows to text: the fast path against Jinja itself, and nulls, which are never printed."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.template import RowTemplate

COLUMNS = ["text", "n", "null", "tags", "about", "range", "odd name"]
TEXT = st.text(max_size=12)
PRINTED = TEXT | st.integers() | st.floats() | st.booleans()
VALUES = PRINTED | st.none() | st.binary(max_size=3) | st.lists(PRINTED, max_size=2) | st.dates() | st.decimals()
ROWS = st.fixed_dictionaries(dict.fromkeys(COLUMNS, VALUES))
CONSTANT = st.text("ab {}%#\n\r\t'\"\\<é🙂", max_size=8)
TAGS = [
    "{{ text }}",
    "{{n}}",
    "{{- null -}}",
    "{{ tags }}",
    "{{ range }}",
    "{# note #}",
    "{% raw %}{{ x }}{% endraw %}",
]
TEMPLATES = st.lists(CONSTANT | st.sampled_from(TAGS), max_size=6).map("".join)


def parsed(source: str) -> RowTemplate | None:
    """The template; None where the random text is no template, or not one of bare columns."""
    from pipeline.errors import ConfigError

    try:
        template = RowTemplate(source, COLUMNS)
    except ConfigError:
        return None
    return template if template._joined is not None else None


def outcome(template: RowTemplate, row: dict[str, Any]) -> tuple[str, str]:
    try:
        return "text", template.render(row)
    except (AttributeError, TypeError, ValueError, ArithmeticError, jinja2.TemplateError) as error:
        return type(error).__name__, str(error)


@settings(deadline=None, max_examples=300)
@given(source=TEMPLATES, row=ROWS)
def test_the_fast_path_gives_what_jinja_gives(source: str, row: dict[str, Any]) -> None:
    fast = parsed(source)
    if fast is None:
        return
    slow = RowTemplate(source, COLUMNS)
    slow._joined = None
    assert outcome(fast, row) == outcome(slow, row)


@settings(deadline=None, max_examples=300)
@given(source=TEMPLATES, row=st.fixed_dictionaries(dict.fromkeys(COLUMNS, PRINTED)))
def test_a_row_without_nulls_gives_what_plain_jinja_gives(source: str, row: dict[str, Any]) -> None:
    """Numbers and booleans as Jinja prints them, by an environment that knows nothing of this project."""
    template = parsed(source)
    if template is not None:
        expected = ImmutableSandboxedEnvironment().from_string(source).render(row)
        assert template.render(row) == expected
        assert expected.startswith(template.head) and expected.endswith(template.tail)
        assert len(template.head) <= len(expected)


def test_templates_of_bare_columns_take_the_fast_path() -> None:
    for source in ("{{ text }}", "a\n{{ text }} b {{ n }}\n", "all constant", "", "{# x #}{{ range }}"):
        assert parsed(source) is not None, source
    for source in ("{{ text | trim }}", "{% if n %}a{% endif %}", "{{ row.text }}", "{{ row }}", "{{ 'a' }}"):
        assert parsed(source) is None, source


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (-0.0, "-0.0"), (1e22, "1e+22"), (0.1 + 0.2, "0.30000000000000004"), (float("nan"), "nan"),
        (float("inf"), "inf"), (True, "True"), (2**70, str(2**70)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["{{ n }}", "{% if true %}{{ n }}{% endif %}", "{{ row.n }}", "{{ n ~ '' }}"])
def test_numbers_print_as_in_jinja(source: str, value: Any, text: str) -> None:
    assert RowTemplate(source, COLUMNS).render({"n": value}) == text
    assert ImmutableSandboxedEnvironment().from_string(source).render(n=value, row={"n": value}) == text


# --- nulls -------------------------------------------------------------------------------------------------------

ROW: dict[str, Any] = {
    "text": "hi", "n": 2, "null": None, "tags": ["a", None], "about": {"who": None, "year": 7}, "range": None,
    "odd name": None,
}  # fmt: skip
PRINTING = [
    "{{ null }}",
    "{{ range }}",
    "{{ row['odd name'] }}",
    "{{ row.null | trim }}",
    "{{ null | trim }}",
    "{{ null | upper }}",
    "{{ null | replace('a', 'b') }}",
    "{{ null | string }}",
    "{{ null | e }}",
    "{{ null | safe }}",
    "{{ null | join(',') }}",
    "{{ null | list }}",
    "{{ null | length }}",
    "{{ null | first }}",
    "{{ null | pprint }}",
    "{{ null | urlencode }}",
    "{{ null | truncate(3) }}",
    "{{ null | indent }}",
    "{{ null | default('given') }}",
    "{{ null ~ '!' }}",
    "{{ 'a' ~ null ~ 'b' }}",
    "{{ 'a' + null }}",
    "{{ '%s' % null }}",
    "{{ '%s' | format(null) }}",
    "{{ '{}'.format(null) }}",
    "{{ '{:>5}'.format(null) }}",
    "{{ [text, null] | join(', ') }}",
    "{{ [null] | string }}",
    "{{ tags | join(', ') }}",
    "{{ tags | string }}",
    "{{ row | string }}",
    "{{ about.who }}",
    "{{ about['who'] ~ '' }}",
    "{{ about | string }}",
    "{% for tag in tags %}{{ tag }}{% endfor %}",
    "{% for letter in null %}{{ letter }}{% endfor %}",
    "{% set other = null %}{{ other }}",
    "{{ null and 'a' }}",
    "{{ null if true else '' }}",
    "{{ null < 3 }}",
    "{{ null + 1 }}",
    "{{ null.year }}",
    "{{ null['year'] }}",
    "{% macro say(x) %}{{ x }}{% endmacro %}{{ say(null) }}",
    "{% filter upper %}{{ null }}{% endfilter %}",
]


@pytest.mark.parametrize("source", PRINTING)
def test_a_null_is_an_error_wherever_it_would_be_printed(source: str) -> None:
    kind, text = outcome(RowTemplate(source, COLUMNS), ROW)
    assert kind != "text", text
    assert "\n" not in text and text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'none given' if null is none else null }}", "none given"),
        ("{{ null is none }}{{ null is not none }}", "TrueFalse"),
        ("{{ null == none }}{{ none == null }}{{ null != none }}", "TrueTrueFalse"),
        ("{{ null == null }}{{ null == range }}{{ null == '' }}{{ null == 0 }}", "TrueTrueFalseFalse"),
        ("{{ null in [none] }}{{ none in tags }}{{ null in ['a'] }}", "TrueTrueFalse"),
        ("{{ null or 'nothing' }}", "nothing"),
        ("{{ not null }}", "True"),
        ("{% if null %}a{% elif null is none %}b{% endif %}", "b"),
        ("{{ null | default('given', true) }}", "given"),
        ("{{ null is defined }}{{ null is string }}{{ null is number }}", "TrueFalseFalse"),
        ("{{ null is iterable }}{{ null is sequence }}{{ null is mapping }}", "FalseFalseFalse"),
        ("{% for tag in tags if tag is not none %}{{ tag }}{% endfor %}", "a"),
        ("{{ tags | select | join(',') }}", "a"),
        ("{{ tags | reject('none') | join(',') }}", "a"),
        ("{{ row.null is none }}{{ about.who is none }}{{ about.year }}", "TrueTrue7"),
        ("{{ row['odd name'] or 'none' }}", "none"),
        ("{{ null | int }}", "0"),
        ("{{ null | tojson }} {{ tags | tojson }}", 'null ["a", null]'),
        ("{{ about | tojson }}", '{"who": null, "year": 7}'),
        ("{% for x in null or [] %}x{% endfor %}done", "done"),
        ("{{ {null: 'key'}[none] }}", "key"),
    ],
)
def test_a_null_can_be_asked_for(source: str, text: str) -> None:
    assert RowTemplate(source, COLUMNS).render(ROW) == text


FILTERS = sorted(set(ImmutableSandboxedEnvironment().filters) - {"random"})
CONVERTED = {"int": "0", "float": "0.0", "tojson": "null"}
"""What filters that turn anything into a number or JSON make of a null."""


@pytest.mark.parametrize("name", FILTERS)
def test_no_filter_prints_a_null_as_none(name: str) -> None:
    kind, text = outcome(RowTemplate(f"{{{{ null | {name} }}}}", COLUMNS), ROW)
    if kind == "text":
        assert text == CONVERTED.get(name, ""), "as Jinja has it for an empty list"
