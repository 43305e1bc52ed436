"""A row's columns to prompt token ids: template or messages, chat template, tokenizer, length policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.chat import ChatFrame, is_one_message, read_messages
from pipeline.errors import ConfigError
from pipeline.models.tokenizer import Tokenizer
from pipeline.settings import TaskSettings
from pipeline.template import RowTemplate

ANCHOR = "x"
"""Stands for a row's own text where only the text around it matters."""
LONG_TEXT = 2**20
"""Characters from which on a prompt is tokenized at its ends alone where these are too long already."""
END = 2**16
"""Characters of an end that are looked at first."""
SEAM = 64
"""Tokens beside a place where a text was cut that may be others than in the whole text."""
AFTER_HEAD = ("x", " the", "7", "\n", "É", '"', "- a", "語")
"""What a row's own text may begin with: tells which tokens of the constant text before it stay as they are."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt, or the reason why it has none."""

    token_ids: tuple[int, ...] = ()
    error: str | None = None


class Turns(str):
    """A conversation of several messages, of whose text no part is the row's own as a whole."""

    __slots__ = ()


class PromptBuilder:
    """Rows to prompts, a chunk at a time, so that the tokenizer works in batches."""

    def __init__(
        self, tokenizer: Tokenizer, settings: TaskSettings, columns: Sequence[str], now: datetime | None = None
    ) -> None:
        """Raises ConfigError on a template that does not fit the columns, or a chat without a template.

        `now` is what a chat template takes for the present moment.
        """
        self._tokenizer = tokenizer
        self._too_long = settings.too_long
        self._messages = settings.messages
        self._template = RowTemplate(settings.prompt if settings.messages is None else "", columns)
        self.is_chat = tokenizer.has_chat_template if settings.chat is None else settings.chat
        if self.is_chat and not tokenizer.has_chat_template:
            raise ConfigError("task.chat=true, but the tokenizer has no chat template; use task.chat=auto or false")
        for key, value in (("system", settings.system), ("messages", settings.messages)):
            if not self.is_chat and value is not None:
                raise ConfigError(
                    f"task.{key} is set, but the prompt is no chat; use task.prompt, or a model with a chat template"
                )
        self._frame = ChatFrame(tokenizer, settings.system, settings.chat_args, now) if self.is_chat else None

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt is made of."""
        return self._template.columns if self._messages is None else [self._messages]

    @property
    def is_dated(self) -> bool:
        """Whether prompts depend on the present moment."""
        return self._frame is not None and self._frame.is_dated

    def build(
        self,
        rows: Sequence[Mapping[str, Any]],
        rooms: Sequence[int | None] | None = None,
        longest: int | None = None,
    ) -> list[Prompt]:
        """The prompt of each row; a row that cannot be rendered gets an error and costs no other row anything.

        Prompts longer than their room in tokens are cut if the length policy says so. With `longest`, the
        most tokens that any prompt may have, memory does not grow with a text beyond that.
        """
        texts = [self._text(row, longest) for row in rows]
        good = [text for text in texts if isinstance(text, str)]
        encoded = iter(self._tokenizer.encode(good, add_special_tokens=not self.is_chat))
        return [
            text if isinstance(text, Prompt) else self._fitted(text, next(encoded), room)
            for text, room in zip(texts, rooms or [None] * len(texts), strict=True)
        ]

    def continuations(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts that each continue any row's prompt.

        Tokenized behind the constant text that every prompt ends with, so that they are cut as they would
        be in place; alone where the boundary is not kept.
        """
        anchor = self._frame.text(ANCHOR) if self._frame is not None else ANCHOR + self._template.tail
        before, *wholes = self._tokenizer.encode([anchor, *(anchor + text for text in texts)], add_special_tokens=False)
        kept = [whole[: len(before)] == before for whole in wholes]
        cut = [text for text, is_kept in zip(texts, kept, strict=True) if not is_kept]
        alone = iter(self._tokenizer.encode(cut, add_special_tokens=False))
        return [
            tuple(whole[len(before) :] if is_kept else next(alone)) for whole, is_kept in zip(wholes, kept, strict=True)
        ]

    def continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of one text that continues any row's prompt."""
        return self.continuations([text])[0]

    def constant_head(self) -> tuple[int, ...]:
        """Token ids that prompts begin with, whatever the row: of the constant text before the row's own.

        The last of that text's tokens may depend on what follows; those that do are left out.
        """
        head = "" if self._messages is not None else self._constant_texts()[0]
        if not head:
            return ()
        encoded = self._tokenizer.encode([head + after for after in AFTER_HEAD], add_special_tokens=not self.is_chat)
        same = 0
        while all(len(ids) > same and ids[same] == encoded[0][same] for ids in encoded):
            same += 1
        return tuple(encoded[0][:same])

    def _text(self, row: Mapping[str, Any], longest: int | None) -> str | Prompt:
        try:
            text = self._render(row)
            text.encode()  # half a surrogate pair would break the tokenizer's whole batch
        except Exception as error:  # noqa: BLE001  # the one handler of the house: a bad row becomes an error row
            return Prompt(error=f"the prompt cannot be made: {_reason(error)}")
        return text if longest is None or len(text) < LONG_TEXT else self._ends(text, longest)

    def _render(self, row: Mapping[str, Any]) -> str:
        if self._messages is not None:
            assert self._frame is not None
            messages = read_messages(row[self._messages])
            text = self._frame.conversation(messages)
            return text if is_one_message(messages) else Turns(text)
        text = self._template.render(row)
        return text if self._frame is None else self._frame.text(text)

    def _ends(self, text: str, longest: int) -> str | Prompt:
        """A text that is far too long without its middle, of which no token would stay; or why it has no prompt."""
        head, tail = self._constant_texts()
        width = max(END, len(head), len(tail))
        while 2 * width < len(text):
            ends = text[:width], text[-width:]
            if all(len(ids) > longest + SEAM for ids in self._tokenizer.encode(ends, add_special_tokens=False)):
                if self._too_long == "error" or not self._can_cut(text, head, tail):
                    return Prompt(error=f"the prompt has more than the {longest} tokens there is room for")
                return "".join(ends)
            width *= 2
        return text

    def _fitted(self, text: str, token_ids: Sequence[int], room: int | None) -> Prompt:
        """The prompt, cut by the length policy: the row's own tokens go, the template's constant text stays."""
        if room is None or self._too_long == "error" or len(token_ids) <= room:
            return Prompt(tuple(token_ids))
        head, tail = self._constant_texts()
        if not self._can_cut(text, head, tail):
            what = (
                "it has several messages"
                if isinstance(text, Turns)
                else ("the chat template's own text cannot be told from the row's")
            )
            return Prompt(
                error=f"the prompt has {len(token_ids)} tokens, there is room for {room}, and it cannot be cut because "
                f"{what}"
            )
        ids, spans = self._tokenizer.encode_with_offsets(text, add_special_tokens=not self.is_chat)
        own = [i for i, (begin, end) in enumerate(spans) if len(head) <= begin < end <= len(text) - len(tail)]
        first, last = (own[0], own[-1] + 1) if own else (len(ids), len(ids))
        left = room - first - (len(ids) - last)
        if left < 1:
            return Prompt(error=f"the template's own text has more tokens than the {room} there is room for")
        kept = ids[last - left : last] if self._too_long == "truncate_left" else ids[first : first + left]
        return Prompt((*ids[:first], *kept, *ids[last:]))

    def _constant_texts(self) -> tuple[str, str]:
        head, tail = self._template.head, self._template.tail
        return (head, tail) if self._frame is None else self._frame.around(head, tail)

    def _can_cut(self, text: str, head: str, tail: str) -> bool:
        known = (self._frame is None or self._frame.is_constant) and not isinstance(text, Turns)
        return known and len(head) + len(tail) <= len(text) and text.startswith(head) and text.endswith(tail)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
