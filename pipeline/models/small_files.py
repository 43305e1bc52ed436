"""Small files of a checkpoint's folder: tokenizer, chat template, and what goes along with a copy. No torch here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.settings import ModelSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""One of these is the tokenizer."""
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
OF_TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "chat_template*", "*.model", "*.jinja")
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
REPLACED = (
    "config.json",
    "quantize_config.json",
    "*.safetensors.index.json",
    "*.bin.index.json",
    "adapter_config.json",
)


def tokenizer_folder(checkpoint: Checkpoint, settings: ModelSettings) -> Path:
    """Where the tokenizer's files are: with the checkpoint, or where `model.tokenizer` says; may raise ConfigError."""
    return checkpoint.folder if settings.tokenizer is None else open_checkpoint(settings.tokenizer).folder


def tokenizer_file(folder: Path) -> str | None:
    """The name of the tokenizer's own file, None without one."""
    return next((name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def has_chat_template(folder: Path) -> bool:
    """Whether a chat template comes with the tokenizer, in a file or in its configuration."""
    config = folder / "tokenizer_config.json"
    in_config = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return in_config or any((folder / name).is_file() for name in CHAT_TEMPLATES)


def copy_small_files(checkpoint: Path, tokenizer: Path, target: Path) -> None:
    """What is neither weights nor config.json, to the folder of a copy; the tokenizer's files from its own folder."""
    for folder, of_tokenizer in ((tokenizer, True), (checkpoint, False)):
        for file in sorted(folder.iterdir()):
            wanted = _matches(file, COPIED) and not _matches(file, REPLACED)
            if wanted and file.is_file() and _matches(file, OF_TOKENIZER) == of_tokenizer:
                shutil.copyfile(file, target / file.name)


def _matches(file: Path, patterns: Iterable[str]) -> bool:
    return any(file.match(pattern) for pattern in patterns)
