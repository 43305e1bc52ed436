"""A row's columns to prompt token ids: Jinja template, chat template, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import ConfigError
from pipeline.models.tokenizer import Tokenizer
from pipeline.settings import TaskSettings

ROW = "row"
"""A template's name for the whole row, for columns whose names are no identifiers."""
ANCHOR = "x"
"""Stands for a row's own text where only the text around it matters."""


class NotText(ValueError):
    """A value in a template's output that is null or no text."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt, or the reason why it has none."""

    token_ids: tuple[int, ...] = ()
    error: str | None = None


def names_in(source: str) -> list[str]:
    """The columns that a template speaks of; none where it is no valid template."""
    environment = ImmutableSandboxedEnvironment()
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError:
        return []
    return sorted(names - {ROW, *environment.globals})


class RowTemplate:
    """A Jinja template over a row's columns, in Jinja's sandbox: no attributes, files or environment.

    Text and numbers may be printed; a null or any other value makes the row an error.
    """

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """Parse the template; raises ConfigError on a syntax error or a name that is no column."""
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_printable, autoescape=False
        )
        del environment.globals["lipsum"], environment.filters["random"]  # equal rows get equal prompts
        for name in columns:
            environment.globals.pop(name, None)  # a column may be called range or dict
        try:
            parsed = environment.parse(source)
            names = meta.find_undeclared_variables(parsed)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"task.prompt is no valid Jinja template: {error.message} (line {error.lineno})"
            ) from error
        unknown = sorted(names - {*columns, ROW})
        if unknown:
            raise ConfigError(
                f"task.prompt uses {unknown[0]}, which is no column; the columns are {', '.join(columns) or 'none'}"
            )
        self.columns = list(columns) if ROW in names - set(columns) else sorted(names)
        self.tail = _constant_tail(parsed)

    def render(self, row: Mapping[str, Any]) -> str:
        """The row's text; raises whatever a template can raise on a bad row."""
        return self._template.render({ROW: row, **row})


class PromptBuilder:
    """Rows to prompts, a chunk at a time, so that the tokenizer works in batches."""

    def __init__(self, tokenizer: Tokenizer, settings: TaskSettings, columns: Sequence[str]) -> None:
        """Raises ConfigError on a template that does not fit the columns, or a chat without a template."""
        self._tokenizer = tokenizer
        self._settings = settings
        self._template = RowTemplate(settings.prompt, columns)
        self.is_chat = tokenizer.has_chat_template if settings.chat is None else settings.chat
        if self.is_chat and not tokenizer.has_chat_template:
            raise ConfigError("task.chat=true, but the tokenizer has no chat template; use task.chat=auto or false")
        if not self.is_chat and settings.system is not None:
            raise ConfigError(
                "task.system is set, but the prompt is no chat; put the text into task.prompt, or use a chat model"
            )
        if self.is_chat:
            self._check_chat_template()

    @property
    def columns(self) -> list[str]:
        """The columns that the template reads."""
        return self._template.columns

    def build(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """The prompt of each row; a row that cannot be rendered gets an error and costs no other row anything."""
        texts = [self._text(row) for row in rows]
        good = [text for text in texts if isinstance(text, str)]
        encoded = iter(self._tokenizer.encode(good, add_special_tokens=not self.is_chat))
        return [text if isinstance(text, Prompt) else Prompt(tuple(next(encoded))) for text in texts]

    def continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that continues any row's prompt.

        Tokenized behind the constant text that every prompt ends with, so that it is cut as it would be
        in place; alone where the boundary is not kept.
        """
        anchor = self._around(ANCHOR) if self.is_chat else ANCHOR + self._template.tail
        before, whole = self._tokenizer.encode([anchor, anchor + text], add_special_tokens=False)
        if whole[: len(before)] == before:
            return tuple(whole[len(before) :])
        return tuple(self._tokenizer.encode([text], add_special_tokens=False)[0])

    def _text(self, row: Mapping[str, Any]) -> str | Prompt:
        try:
            text = self._template.render(row)
            text = self._around(text) if self.is_chat else text
            text.encode()  # half a surrogate pair would break the tokenizer's whole batch
            return text
        except Exception as error:  # noqa: BLE001  # the one handler of the house: a bad row becomes an error row
            return Prompt(error=f"the prompt cannot be made: {_reason(error)}")

    def _around(self, text: str) -> str:
        """The text as a user's message in the chat template."""
        messages = [{"role": "user", "content": text}]
        if self._settings.system is not None:
            messages.insert(0, {"role": "system", "content": self._settings.system})
        return self._tokenizer.chat(messages, self._settings.chat_args)

    def _check_chat_template(self) -> None:
        try:
            self._around(ANCHOR)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the tokenizer's chat template refuses the conversation ({_reason(error)}); "
                "drop task.system or task.chat_args, or use task.chat=false"
            ) from error


def _printable(value: Any) -> Any:
    """What a template may print; undefined values pass, to raise their own error."""
    if isinstance(value, (str, int, float, jinja2.Undefined)):
        return value
    kind = "null" if value is None else f"{type(value).__name__}, not text"
    raise NotText(f"a value of the template is {kind}")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _constant_tail(template: nodes.Template) -> str:
    """The constant text that ends whatever the template gives."""
    last = template.body[-1] if template.body else None
    parts = last.nodes if isinstance(last, nodes.Output) else []
    constant = takewhile(lambda part: isinstance(part, nodes.TemplateData), reversed(parts))
    return "".join(part.data for part in reversed([*constant]) if isinstance(part, nodes.TemplateData))
