"""PEFT's LoRA adapters on disk: what a folder changes in which modules. No torch here; knows PEFT's names.

Formats: peft's `adapter_config.json` and `adapter_model.safetensors`; LoRA is Hu et al. 2021, its rank-stabilized
scaling Kalajdzievski 2023, DoRA Liu et al. 2024.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import ConfigError
from pipeline.models.checkpoint import (
    FLOAT_DTYPES,
    HASHED_FILES,
    Checkpoint,
    TensorInfo,
    from_hub,
    read_header,
    read_json,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins every tensor's name; the model's own name of its module follows."""
UNUSED = ".original_module."
"""In the names of the base's own tensors that lie beside those which take their place."""
DOWNLOADED = [CONFIG, WEIGHTS, *HASHED_FILES]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LEAVES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_magnitude_vector": "magnitude",
}
"""How the name of a tensor of an update ends, and which tensor it is."""
REFUSED = (
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
"""Settings under which the update is not the plain product, or the base model not the plain one."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` under which training began by taking the first update out of the base's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What is added to a module's result: scaling * (x down^T) up^T (+ bias), with down [R, K] and up [N, R].

    Of an embedding, x is one-hot: K are its rows and N its columns. `magnitude` [N] is DoRA's length of each
    output's weights.
    """

    path: str
    down: TensorInfo
    up: TensorInfo
    scaling: float
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def tensors(self) -> list[TensorInfo]:
        """All of it."""
        return [info for info in (self.down, self.up, self.bias, self.magnitude) if info is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A tensor that takes the place of the base model's own; `shared` if also where another module is tied to it."""

    path: str
    leaf: str
    info: TensorInfo
    shared: bool

    @property
    def is_vocabulary(self) -> bool:
        """Whether it has one row for each token: an embedding or an output head."""
        return self.leaf == "weight" and any(part in self.path.rpartition(".")[2] for part in ("embed", "head"))


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's folder; reading its tensors' names and shapes waits for the first use."""

    name: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)

    @cached_property
    def updates(self) -> tuple[LowRank, ...]:
        """One for each module that has tensors; raises ConfigError naming the tensor that is missing or unknown."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for info in self._tensors.values():
            path, part = self._place(info)
            if part in LEAVES.values():
                found.setdefault(path, {})[part] = info
        return tuple(self._update(path, parts) for path, parts in sorted(found.items()))

    @cached_property
    def whole(self) -> tuple[Whole, ...]:
        """Tensors of modules_to_save, of resized vocabularies, and trained biases."""
        places = {self._place(info): info for info in self._tensors.values()}
        return tuple(
            Whole(path=path, leaf=part, info=info, shared=not self._is_saved_whole(path))
            for (path, part), info in places.items()
            if part not in LEAVES.values()
        )

    @property
    def vocab(self) -> int | None:
        """Tokens of the embedding and output head that it brings; None if it brings none."""
        rows = {tensor.info.shape[0]: tensor.info for tensor in self.whole if tensor.is_vocabulary}
        if len(rows) > 1:
            one, other, *_ = rows.values()
            raise ConfigError(
                f"{one.file}: tensor {one.name} has {one.shape[0]} rows, but {other.name} has {other.shape[0]}; "
                "both must have one for each token"
            )
        return next(iter(rows), None)

    @property
    def base(self) -> str:
        """The model it was trained on, by the name its training knew; empty if it does not say."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def tokenizer(self) -> Checkpoint | None:
        """The folder as a tokenizer's, None if it brings none."""
        has_one = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        return Checkpoint(name=self.name, folder=self.folder, config={}) if has_one else None

    def identity(self) -> dict[str, str]:
        """Hashes of its two files."""
        hashes = {}
        for name in (CONFIG, WEIGHTS):
            with (self.folder / name).open("rb") as stream:
                hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        return hashes

    def num_bytes(self, itemsize: int) -> int:
        """Bytes on the device: updates in float32, whole tensors in the model's dtype of `itemsize` bytes."""
        updates = sum(4 * math.prod(info.shape) for update in self.updates for info in update.tensors)
        return updates + sum(itemsize * math.prod(tensor.info.shape) for tensor in self.whole)

    def describe(self) -> str:
        """One phrase for the log, the stats and the plan."""
        ranks = sorted({update.rank for update in self.updates})
        kind = "DoRA" if any(update.magnitude for update in self.updates) else "LoRA"
        spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "0"
        whole = f" and {len(self.whole)} whole tensors" if self.whole else ""
        return f"{kind} of rank {spread} on {len(self.updates)} modules{whole}"

    def trained_elsewhere(self, model_path: str) -> str | None:
        """A sentence where the base model it names has another name than the one it runs on."""
        names = [Path(name.rstrip("/")).name.lower() for name in (self.base, model_path)]
        if not self.base or names[0] == names[1]:
            return None
        return f"model.adapter={self.name} was trained on {self.base} and runs on model.path={model_path}"

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        infos = read_header(self.folder / WEIGHTS)
        tensors = {info.name: info for info in infos if UNUSED not in info.name}
        if not tensors:
            raise ConfigError(f"{self.folder / WEIGHTS} holds no tensors; save the adapter again")
        return tensors

    def _place(self, info: TensorInfo) -> tuple[str, str]:
        """A tensor's module, by its path in the model, and which of its tensors it is."""
        if not info.name.startswith(PREFIX):
            self._refuse_tensor(info, f"does not begin with {PREFIX}, as PEFT's LoRA tensors do")
        if info.dtype not in FLOAT_DTYPES:
            self._refuse_tensor(info, f"has dtype {info.dtype}, which is no plain floating point")
        name = info.name.removeprefix(PREFIX)
        for suffix, part in LEAVES.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix), part
        if ".lora_" in name or name.count(".") == 0:
            self._refuse_tensor(info, "is none that LoRA or DoRA has")
        path, _, leaf = name.rpartition(".")
        return path.removesuffix(".base_layer").removesuffix(".modules_to_save"), leaf

    def _update(self, path: str, parts: Mapping[str, TensorInfo]) -> LowRank:
        is_embedding = any(part.startswith("embedding") for part in parts)
        names = ("embedding_down", "embedding_up") if is_embedding else ("down", "up")
        down, up = (self._matrix(path, parts, name) for name in names)
        rank, scaling = self._rank_and_scaling(path)
        for info, found in ((down, down.shape[0]), (up, up.shape[1])):
            if found != rank:
                self._refuse_tensor(info, f"has shape {list(info.shape)}, but {CONFIG} says rank {rank}")
        return LowRank(
            path=path,
            down=down,
            up=up,
            scaling=scaling,
            bias=parts.get("up_bias"),
            magnitude=self._magnitude(path, parts, is_embedding=is_embedding),
            is_embedding=is_embedding,
        )

    def _matrix(self, path: str, parts: Mapping[str, TensorInfo], part: str) -> TensorInfo:
        if part not in parts:
            self._lacks(path, part)
        if len(parts[part].shape) != 2:
            self._refuse_tensor(parts[part], f"has shape {list(parts[part].shape)}, which is no matrix")
        return parts[part]

    def _magnitude(self, path: str, parts: Mapping[str, TensorInfo], *, is_embedding: bool) -> TensorInfo | None:
        info = parts.get("magnitude")
        if info is None and self.config.get("use_dora"):
            self._lacks(path, "magnitude")
        if info is not None and (is_embedding or "up_bias" in parts):
            self._refuse_tensor(info, "is DoRA's of an embedding or of a LoRA with a bias, which is not supported")
        if info is not None and not self.config.get("use_dora"):
            self._refuse_tensor(info, f"is DoRA's, but {CONFIG} says use_dora: false")
        return info

    def _lacks(self, path: str, part: str) -> NoReturn:
        suffix = next(suffix for suffix, name in LEAVES.items() if name == part)
        raise ConfigError(f"{self.folder / WEIGHTS} lacks tensor {PREFIX}{path}{suffix}; save the adapter again")

    def _rank_and_scaling(self, path: str) -> tuple[int, float]:
        """A module's own by the first pattern that its path ends with, else the adapter's."""
        rank = _by_pattern(self.config.get("rank_pattern") or {}, path, self.config.get("r", 8))
        alpha = _by_pattern(self.config.get("alpha_pattern") or {}, path, self.config.get("lora_alpha", 8))
        return int(rank), alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _is_saved_whole(self, path: str) -> bool:
        """A module of modules_to_save is a copy of its own: what was tied to it stays with the base's weight."""
        return any(f".{name}." in f".{path}." for name in self.config.get("modules_to_save") or ())

    def _refuse_tensor(self, info: TensorInfo, reason: str) -> NoReturn:
        raise ConfigError(f"{info.file}: tensor {info.name} {reason}; save the adapter again with PEFT")


def open_adapter(path: str, revision: str | None = None) -> Adapter:
    """Open a folder, or a hub id (downloaded, or taken from the local cache); raises ConfigError if it cannot run."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = from_hub(path, revision, "model.adapter", DOWNLOADED)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"model.adapter={path} has no {CONFIG}; name a folder that PEFT's save_pretrained has written"
        )
    adapter = Adapter(path, folder, read_json(folder / CONFIG))
    _check_config(adapter)
    _check_weights_are_there(adapter)
    return adapter


def _check_config(adapter: Adapter) -> None:
    """Refuse what is not LoRA as it is computed here."""
    config, key = adapter.config, f"model.adapter={adapter.name}"
    kind = str(config.get("peft_type") or "an unnamed kind")
    if kind != "LORA":
        raise ConfigError(f"{key} is a PEFT adapter of type {kind}, which is not supported; supported is LORA")
    for name in REFUSED:
        if config.get(name):
            raise ConfigError(f"{key} was made with {name}, which is not supported; supported are LoRA and DoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ConfigError(
            f"{key} has init_lora_weights={start}, which changes the base model's weights; convert it to plain LoRA "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    _check_numbers(adapter)


def _check_numbers(adapter: Adapter) -> None:
    """Ranks must be integers above 0, alphas numbers, and patterns regular expressions."""
    values = {
        "r": [adapter.config.get("r", 8), *(adapter.config.get("rank_pattern") or {}).values()],
        "lora_alpha": [adapter.config.get("lora_alpha", 8), *(adapter.config.get("alpha_pattern") or {}).values()],
    }
    for name, found in values.items():
        for value in found:
            whole = isinstance(value, int) and value > 0
            if isinstance(value, bool) or not (whole if name == "r" else isinstance(value, (int, float))):
                raise ConfigError(f"{adapter.folder / CONFIG}: {name} is {value!r}; fetch the adapter again")
    for pattern in (*(adapter.config.get("rank_pattern") or {}), *(adapter.config.get("alpha_pattern") or {})):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{adapter.folder / CONFIG}: pattern {pattern!r} is no regular expression") from error


def _check_weights_are_there(adapter: Adapter) -> None:
    if (adapter.folder / WEIGHTS).is_file():
        return
    pickled = sorted(file.name for file in adapter.folder.glob("*.bin"))
    found = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else f"no {WEIGHTS}"
    raise ConfigError(
        f"model.adapter={adapter.name} has {found}; save it with PEFT's save_pretrained(..., safe_serialization=True)"
    )


def _by_pattern(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), otherwise)
