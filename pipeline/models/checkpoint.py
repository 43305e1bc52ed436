"""A checkpoint on disk: where it is, what its config says, which tensors it holds. No torch here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

WEIGHT_SAMPLES = 16
SAMPLE_BYTES = 65536
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that a weight may have which no statistics go with."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
HASHED_FILES = (
    "config.json", "generation_config.json", "quantize_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's place and shape, from the header of its safetensors file; `offset` is its first byte in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset: int

    def read(self) -> bytes:
        """The tensor's bytes, for those that are small."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.num_bytes)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder in the Hugging Face layout, weights in safetensors."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name; raises ConfigError on a missing, truncated or foreign weight file."""
        return {info.name: info for file in self.weight_files for info in read_header(file)}

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, as the index names them, or all of the folder."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [n for n in names if not (self.folder / n).is_file()]
            if missing:
                raise ConfigError(f"model.path={self.name}: {index.name} names {missing[0]}, which is not there")
            return [self.folder / n for n in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(pattern))
        remedy = "save it with save_pretrained(..., safe_serialization=True)"
        found = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else "no *.safetensors file"
        raise ConfigError(f"model.path={self.name} has {found}; {remedy}")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json holds; empty without one."""
        file = self.folder / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """What the checkpoint says of its quantization; config.json wins over quantize_config.json (older tools)."""
        file = self.folder / "quantize_config.json"
        return (read_json(file) if file.is_file() else {}) | (self.config.get("quantization_config") or {})

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: eos_token_id of generation_config.json, else of config.json."""
        stored = self.generation_config.get("eos_token_id")
        stored = self.config.get("eos_token_id") if stored is None else stored
        if stored is None:
            return ()
        return tuple(stored) if isinstance(stored, list) else (int(stored),)

    def identity(self, whole: bool = False) -> dict[str, str]:
        """What tells this checkpoint from another: hashes of its small files, and of samples of its weights.

        With `whole`, of all of its weights, which takes as long as reading them.
        """
        hash_of = _whole_hash if whole else _sampled_hash
        return self.file_hashes() | {file.name: hash_of(file) for file in self.weight_files}

    def file_hashes(self) -> dict[str, str]:
        """Hashes of config, tokenizer and index, where they exist."""
        files = [self.folder / name for name in HASHED_FILES]
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files if f.is_file()}


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a hub id (downloaded, or taken from the local cache); raises ConfigError."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = from_hub(path, revision)
    file = folder / "config.json"
    if not file.is_file():
        _refuse_adapter(path, folder)
        raise ConfigError(f"model.path={path} has no config.json; name a folder in the Hugging Face layout")
    return Checkpoint(name=path, folder=folder, config=read_json(file))


def _refuse_adapter(path: str, folder: Path) -> None:
    file = folder / "adapter_config.json"
    if file.is_file():
        base = read_json(file).get("base_model_name_or_path") or "its base model"
        raise ConfigError(f"model.path={path} is an adapter, no model; use model.path={base} model.adapter={path}")


def is_here(path: str, revision: str | None = None) -> bool:
    """Whether a model is a folder, or a hub id that has been downloaded; nothing is fetched."""
    if Path(path).expanduser().is_dir() or not HUB_ID.fullmatch(path):
        return True  # what is neither is refused, with the remedy, when it is opened
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(path, revision=revision, allow_patterns=DOWNLOADED, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def from_hub(
    path: str, revision: str | None, key: str = "model.path", files: Sequence[str] = tuple(DOWNLOADED)
) -> Path:
    """The local copy of a hub repository's `files`; raises ConfigError naming `key`, whose value `path` is."""
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"{key}={path} does not exist; name a folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{key}={path} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check {key} and its revision, or download it where there is a network "
            f"(`hf download {path}`) and name its folder"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object's content; raises ConfigError if the file holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object; fetch the checkpoint again")
    return content


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file; raises ConfigError on a truncated or foreign one.

    Format: 8 bytes little-endian length, then a JSON object of name to dtype, shape and offsets (safetensors).
    """
    broken = ConfigError(f"{file} is truncated or no safetensors file; fetch the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise broken
        content = stream.read(length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        infos = [
            TensorInfo(name, file, header[name]["dtype"], tuple(header[name]["shape"]), end - first, 8 + length + first)
            for name, (first, end) in places.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken from error
    if any(8 + length + end > size for _, end in places.values()):
        raise broken
    return infos


def _whole_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _sampled_hash(file: Path) -> str:
    """Size and a hash of the first MiB and of samples spread over the file: cheap for 100 GB of weights."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        for sample in range(1, WEIGHT_SAMPLES + 1):
            stream.seek(max(0, size * sample // WEIGHT_SAMPLES - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return f"{size}:{digest.hexdigest()[:16]}"
