"""A conversation as the text a chat model was trained on: the tokenizer's chat template, applied fast."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes

from pipeline.errors import ConfigError
from pipeline.models.tokenizer import Tokenizer

PROBES = (
    "x", "  two words\n", "<think>\nno\n</think> {{ braces }} \\n", "\n# a\n\n- b\n", "Long. " * 2000, "É 7?", "42",
    "UPPER",
)  # fmt: skip
"""User messages that tell whether a template passes any text through as it is, or without outer blanks."""
STRIPS = (str, str.strip, str.rstrip, str.lstrip)
"""What a template does with the blanks around a message."""
CONVERSATION_KEYS = ("role", "type")
"""What is compared with these is no text of a message."""
CASES = {"lower", "upper", "title", "capitalize", "casefold", "swapcase"}
"""Filters and methods behind which a template may find a text that the message has in other letters."""
DATE = "strftime_now"
"""What templates call for the present moment."""
DIRECTIVES = ("-d", "-m", "-H", "-I", *"aAbBcdHIjmMpSUwWxXyYzZ")
"""What a template may ask of it, each behind a percent sign."""


class ChatFrame:
    """The chat template around one user message.

    Most templates put constant text before and after the message. Where rendering the probes shows
    that, `head` and `tail` are those texts and a message costs a concatenation; otherwise they are
    empty and each message is rendered, as is one with a text that the template may look for.
    """

    def __init__(
        self, tokenizer: Tokenizer, system: str | None, arguments: Mapping[str, Any], now: datetime | None = None
    ) -> None:
        """Raises ConfigError if the template refuses such a conversation; `now` is the present moment to it."""
        self._tokenizer = tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        template = tokenizer.template_for(arguments)
        self.is_dated = template is not None and DATE in template
        if template is not None and self.is_dated:
            arguments = {**arguments, "chat_template": at_moment(template, now or datetime.now(UTC))}
        self._arguments = arguments
        try:
            rendered = [self._render(probe) for probe in PROBES]
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(
                f"the tokenizer's chat template refuses the conversation ({_first_line(error)}); "
                "drop task.system or task.chat_args, or use task.chat=false"
            ) from error
        sought = sought_texts(template)
        self._sought = sought or frozenset()
        self._any_case = template is not None and changes_case(template)
        self.head, _, self.tail = rendered[0].rpartition(PROBES[0])
        fitting = [s for s in STRIPS if rendered == [self.head + s(probe) + self.tail for probe in PROBES]]
        self._strip: Callable[[str], str] = next(iter(fitting), str)
        self._framed = bool(fitting) and sought is not None
        if not self._framed:
            self.head = self.tail = ""

    def text(self, message: str) -> str:
        """The conversation with one user message, up to where the answer begins."""
        if not self.frames(message):
            return self._render(message)
        return self.head + self._strip(message) + self.tail

    @property
    def is_constant(self) -> bool:
        """Whether the text around a message is known."""
        return self._framed

    def around(self, head: str, tail: str) -> tuple[str, str]:
        """What a text begins and ends with whose message begins with `head` and ends with `tail`."""
        return self.head + self._strip(head + PROBES[0])[:-1], self._strip(PROBES[0] + tail)[1:] + self.tail

    def frames(self, message: str) -> bool:
        """Whether the conversation is `head`, the message and `tail`."""
        return self._framed and bool(message.strip()) and not self._is_sought_in(message)

    def _is_sought_in(self, message: str) -> bool:
        if self._any_case:
            message = message.casefold()
            return any(text.casefold() in message for text in self._sought)
        return any(text in message for text in self._sought)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A whole conversation, with the system text in front unless it brings its own."""
        own_system = bool(messages) and messages[0].get("role") == "system"
        return self._tokenizer.chat([*([] if own_system else self._system), *messages], self._arguments)

    def _render(self, message: str) -> str:
        return self._tokenizer.chat([*self._system, {"role": "user", "content": message}], self._arguments)


def read_messages(value: Any) -> list[dict[str, str]]:
    """A row's messages: a list of role and content, or such a list as JSON text; ValueError for anything else."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise ValueError("the messages are no list of role and content")
    messages = []
    for item in value:
        kept = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else {}
        if not isinstance(kept.get("role"), str) or not isinstance(kept.get("content"), str):
            raise ValueError("a message has no role or no content that is text")
        messages.append(kept)
    return messages


def at_moment(template: str, now: datetime) -> str:
    """A template that takes `now` for the present moment, through a macro of the function's name in front of it."""
    shown = [f"replace({json.dumps('%' + d)}, {json.dumps(now.strftime('%' + d))})" for d in DIRECTIVES]
    return f"{{% macro {DATE}(form) %}}{{{{ {' | '.join(['form', *shown])} }}}}{{% endmacro %}}\n{template}"


def is_one_message(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation is what a prompt makes: one message, of the user."""
    return len(messages) == 1 and messages[0]["role"] == "user"


def sought_texts(template: str | None) -> frozenset[str] | None:
    """The texts that a chat template may look for in a message; None if it cannot be told.

    All texts that it compares with or gives to methods, filters, tests and macros, itself or by a name,
    but for those that roles are compared with, and blanks to be stripped, which the probes begin and end with.
    """
    tree = None if template is None else _parsed(template)
    if tree is None:
        return None
    spared = [node.arg for node in tree.find_all(nodes.Getitem)]
    for comparison in tree.find_all(nodes.Compare):
        if any(map(_is_role, [comparison.expr, *(operand.expr for operand in comparison.ops)])):
            spared += comparison.find_all(nodes.Const)
    spared += [argument for call in tree.find_all(nodes.Call) if _is_strip(call) for argument in call.args]
    excepted = {id(node) for node in spared}
    looking = _looking(tree)
    found = [c.value for node in looking for c in _all(node, nodes.Const) if id(c) not in excepted]
    found += [text.data for node in looking for text in _all(node, nodes.TemplateData)]
    return frozenset(text for text in found if isinstance(text, str) and text)


def changes_case(template: str) -> bool:
    """Whether a chat template changes letters, so that it may find a text that is written otherwise."""
    tree = _parsed(template)
    names = [] if tree is None else [f.name for f in tree.find_all(nodes.Filter)]
    return tree is not None and not CASES.isdisjoint([*names, *(g.attr for g in tree.find_all(nodes.Getattr))])


def _parsed(template: str) -> nodes.Template | None:
    try:
        return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(template)
    except jinja2.TemplateSyntaxError:  # tags that only transformers knows
        return None


def _looking(tree: nodes.Template) -> list[nodes.Node]:
    """What is compared and what is given to calls, and what the names in it stand for."""
    looking: list[nodes.Node] = list(tree.find_all(nodes.Compare))
    calls: list[Any] = list(tree.find_all((nodes.Call, nodes.Filter, nodes.Test)))
    looking += [argument for call in calls for argument in (*call.args, *call.kwargs)]
    meanings = _meanings(tree)
    known: set[str] = set()
    for node in looking:  # which grows
        for name in _names(node) - known:
            known.add(name)
            looking += meanings.get(name, [])
    return looking


def _meanings(tree: nodes.Template) -> dict[str, list[nodes.Node]]:
    """What a template sets each name to."""
    meanings: dict[str, list[nodes.Node]] = {}
    pairs: list[tuple[nodes.Node, nodes.Node]] = [(a.target, a.node) for a in tree.find_all(nodes.Assign)]
    pairs += [(block.target, part) for block in tree.find_all(nodes.AssignBlock) for part in block.body]
    pairs += [(loop.target, loop.iter) for loop in tree.find_all(nodes.For)]
    pairs += [pair for scope in tree.find_all(nodes.With) for pair in zip(scope.targets, scope.values, strict=True)]
    for macro in tree.find_all(nodes.Macro):
        pairs += [(argument, default) for argument in macro.args for default in macro.defaults]
    for target, value in pairs:
        for name in _names(target):
            meanings.setdefault(name, []).append(value)
    return meanings


def _names(node: nodes.Node) -> set[str]:
    """Variables and attributes in an expression, or that it is assigned to."""
    names = {name.name for name in _all(node, nodes.Name)} | {part.attr for part in _all(node, nodes.Getattr)}
    return names | {part.attr for part in _all(node, nodes.NSRef)}


def _all(node: nodes.Node, kind: type[Any]) -> list[Any]:
    """The nodes of a kind in a node, itself included."""
    return [*([node] if isinstance(node, kind) else []), *node.find_all(kind)]


def _is_role(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value in CONVERSATION_KEYS
    return getattr(node, "attr", getattr(node, "name", None)) in CONVERSATION_KEYS


def _is_strip(call: nodes.Call) -> bool:
    strips = getattr(call.node, "attr", None) in ("strip", "lstrip", "rstrip")
    return strips and all(isinstance(a, nodes.Const) and not str(a.value).strip(" \n") for a in call.args)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
