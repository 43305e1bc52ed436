"""A row's columns to text: a Jinja template in Jinja's sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import ConfigError

UNEXPECTED_WORD = "expected token 'end of print statement', got"
"""How Jinja says that a second word follows a name, as in {{ odd name }}."""
ROW = "row"
"""A template's name for the whole row, for columns whose names are no identifiers; `_row` if a column has this name."""


class NotText(TypeError):
    """A value in a template's output that is null or no text."""


def names_in(source: str) -> list[str]:
    """The columns that a template speaks of; none where it is no valid template."""
    environment = ImmutableSandboxedEnvironment()
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError:
        return []
    return sorted(names - {ROW, f"_{ROW}", *environment.globals})


class NullColumn:
    """A null in a template: false in a condition, none in a test, and an error wherever it would be printed."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, NullColumn)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self, *spec: object) -> str:
        raise NotText("a value of the template is null")

    __repr__ = __format__ = __iter__ = __len__ = __html__ = __str__  # all of them print


NullColumn.__name__ = "null"  # what Python says of it in a row's error: unsupported operand type(s): 'int' and 'null'
NULL = NullColumn()


class RowTemplate:
    """A Jinja template over a row's columns, in Jinja's sandbox: no attributes, files or environment.

    Text and numbers may be printed; a null or any other value makes the row an error. `head` and `tail`
    are the constant texts that every prompt begins and ends with.
    """

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """Parse the template; raises ConfigError on a syntax error or a name that is no column."""
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_printable, autoescape=False
        )
        del environment.globals["lipsum"], environment.filters["random"]  # equal rows get equal prompts
        environment.tests["none"] = lambda value: value is None or value is NULL
        environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _json_null}
        for name in columns:
            environment.globals.pop(name, None)  # a column may be called range or dict
        try:
            parsed = environment.parse(source)
            names = meta.find_undeclared_variables(parsed)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            hint = "; a column whose name is no identifier is written row['its name']"
            raise ConfigError(
                f"task.prompt is no valid Jinja template: {error.message} (line {error.lineno})"
                f"{hint if str(error.message).startswith(UNEXPECTED_WORD) else ''}"
            ) from error
        self._row = f"_{ROW}" if ROW in columns else ROW
        unknown = sorted(names - {*columns, self._row})
        if unknown:
            raise ConfigError(
                f"task.prompt uses {unknown[0]}, which is no column; the columns are {', '.join(columns) or 'none'}"
            )
        self.columns = list(columns) if self._row in names - set(columns) else sorted(names)
        parts = [part for node in parsed.body for part in (node.nodes if isinstance(node, nodes.Output) else [node])]
        self.head = "".join(_constant(parts))
        self.tail = "".join(reversed([*_constant(reversed(parts))]))
        self._joined = _joiner(parts)

    def render(self, row: Mapping[str, Any]) -> str:
        """The row's text; raises whatever a template can raise on a bad row."""
        if self._joined is not None:
            return self._joined(row)
        marked = _marked(row)
        return self._template.render({self._row: marked, **marked})


def _printable(value: Any) -> Any:
    """What a template may print; undefined values pass, to raise their own error."""
    if isinstance(value, (str, int, float, jinja2.Undefined)):
        return value
    kind = "null" if value is None or value is NULL else f"{type(value).__name__}, not text"
    raise NotText(f"a value of the template is {kind}")


def _marked(value: Any) -> Any:
    """A value with NULL for every null in it."""
    if isinstance(value, Mapping):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner) for inner in value]
    return NULL if value is None else value


def _json_null(value: Any) -> None:
    """What `tojson` makes of a null, which JSON has a word for; TypeError for anything else it does not know."""
    if value is not NULL:
        raise TypeError(f"{type(value).__name__} is not JSON")


def _constant(parts: Iterable[nodes.Node]) -> list[str]:
    """The texts of the leading parts that are constant."""
    constant = takewhile(lambda part: isinstance(part, nodes.TemplateData), parts)
    return [part.data for part in constant if isinstance(part, nodes.TemplateData)]


def _joiner(parts: Sequence[nodes.Node]) -> Callable[[Mapping[str, Any]], str] | None:
    """A template of constant texts and bare columns as a join, many times faster than Jinja; None for any other."""
    if not all(
        isinstance(part, nodes.TemplateData | nodes.Name) and getattr(part, "name", "") not in (ROW, f"_{ROW}")
        for part in parts
    ):
        return None
    pieces = [
        (True, part.name) if isinstance(part, nodes.Name) else (False, part.data)
        for part in parts
        if isinstance(part, nodes.TemplateData | nodes.Name)
    ]

    def joined(row: Mapping[str, Any]) -> str:
        return "".join(str(_printable(row[piece])) if is_column else piece for is_column, piece in pieces)

    return joined
