"""The checkpoint's tokenizer behind the few calls the pipeline makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError

BATCH_CHARACTERS = 2**21
"""Tokenized at once: while it works, the tokenizer takes about a hundred bytes for each."""


class Tokenizer:
    """Text to token ids and back; chat messages to the text that the model was trained on."""

    def __init__(self, folder: str, trust_remote_code: bool = False) -> None:
        """Load a fast tokenizer from a folder; raises ConfigError if there is none."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.tokenizer: {folder} has no tokenizer that transformers can read ({first_line}); "
                "name one with model.tokenizer=..."
            ) from error
        if not self._tokenizer.is_fast:
            raise ConfigError(
                f"model.tokenizer: {folder} has only a slow tokenizer; convert it to tokenizer.json or name another"
            )

        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template it brings, None without one."""
        return self.template_for({})

    def template_for(self, arguments: Mapping[str, Any]) -> str | None:
        """The template that a conversation with these arguments is rendered with; None if there is none to choose."""
        try:
            return str(self._tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools")))
        except ValueError:
            return None

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def end_token_id(self) -> int | None:
        """The token that it says ends a text, None if it names none."""
        token: int | None = self._tokenizer.eos_token_id
        return token

    def chat(self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> str:
        """The conversation as text, up to where the assistant's answer begins; special tokens included."""
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **arguments
        )
        assert isinstance(text, str)
        return text

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text, in batches in the tokenizer's own threads, neither padded nor truncated."""
        ids: list[list[int]] = []
        for batch in _batches(texts):
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
            ids += [encoding.ids for encoding in encodings]
        return ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and for each token where in the text it begins and ends."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence, special tokens left out."""
        texts: list[str] = self._backend.decode_batch([list(ids) for ids in token_ids], skip_special_tokens=True)
        return texts


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts that have not much more characters together than a batch may have, unless one alone has."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
