"""PEFT's LoRA adapters on disk: which modules a folder changes, and by which tensors. No torch here.

With `adapter_config.py` the only place that knows PEFT's names. LoRA is Hu et al. 2021, its rank-stabilized scaling
Kalajdzievski 2023, DoRA Liu et al. 2024.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from pipeline.errors import ConfigError
from pipeline.models.adapter_config import CONFIG, AdapterConfig, read_config
from pipeline.models.checkpoint import FLOAT_DTYPES, HASHED_FILES, Checkpoint, TensorInfo, from_hub, read_header
from pipeline.models.small_files import tokenizer_file

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins every tensor's name; the model's own name of its module follows."""
UNUSED = ".original_module."
"""In the names of the base's own tensors that lie beside those which take their place."""
DOWNLOADED = [CONFIG, WEIGHTS, *HASHED_FILES]
RANK_MULTIPLE = 16
"""Ranks are padded with zeros to a multiple of this, so that BLAS treats a product alike for any number of rows."""
LEAVES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_magnitude_vector": "magnitude",
}
"""How the name of a tensor of an update ends, and which tensor it is."""


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
    def num_bytes(self) -> int:
        """Bytes once loaded: float32, the rank padded."""
        padded = self.rank + -self.rank % RANK_MULTIPLE
        vectors = sum(math.prod(info.shape) for info in (self.bias, self.magnitude) if info is not None)
        return 4 * (padded * (self.down.shape[1] + self.up.shape[0]) + vectors)


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
    config: AdapterConfig

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
            Whole(path=path, leaf=part, info=info, shared=not self.config.copies(path))
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
    def tokenizer(self) -> Checkpoint | None:
        """The folder as a tokenizer's, None if it brings none."""
        found = tokenizer_file(self.folder)
        return None if found is None else Checkpoint(name=self.name, folder=self.folder, config={})

    def identity(self) -> dict[str, str]:
        """Hashes of its two files."""
        hashes = {}
        for name in (CONFIG, WEIGHTS):
            with (self.folder / name).open("rb") as stream:
                hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        return hashes

    def num_bytes(self, itemsize: int) -> int:
        """Bytes on the device: updates in float32, whole tensors in the model's dtype of `itemsize` bytes."""
        updates = sum(update.num_bytes for update in self.updates)
        return updates + sum(itemsize * math.prod(tensor.info.shape) for tensor in self.whole)

    def describe(self) -> str:
        """One phrase for the log, the stats and the plan."""
        ranks = sorted({update.rank for update in self.updates})
        kind = "DoRA" if any(update.magnitude for update in self.updates) else "LoRA"
        spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "0"
        whole = f" and {_count(len(self.whole), 'whole tensor')}" if self.whole else ""
        return f"{kind} of rank {spread} on {_count(len(self.updates), 'module')}{whole}"

    def trained_elsewhere(self, model_path: str) -> str | None:
        """A sentence where the base model it names has another name than the one it runs on."""
        names = [Path(name.rstrip("/")).name.lower() for name in (self.config.base, model_path)]
        if not self.config.base or names[0] == names[1]:
            return None
        return f"model.adapter={self.name} was trained on {self.config.base} and runs on model.path={model_path}"

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
        rank, scaling = self.config.rank_and_scaling(path)
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
        if info is None and self.config.is_dora:
            self._lacks(path, "magnitude")
        if info is not None and (is_embedding or "up_bias" in parts):
            self._refuse_tensor(info, "is DoRA's of an embedding or of a LoRA with a bias, which is not supported")
        if info is not None and not self.config.is_dora:
            self._refuse_tensor(info, f"is DoRA's, but {CONFIG} says use_dora: false")
        return info

    def _lacks(self, path: str, part: str) -> NoReturn:
        suffix = next(suffix for suffix, name in LEAVES.items() if name == part)
        raise ConfigError(f"{self.folder / WEIGHTS} lacks tensor {PREFIX}{path}{suffix}; save the adapter again")

    def _refuse_tensor(self, info: TensorInfo, reason: str) -> NoReturn:
        raise ConfigError(f"{info.file}: tensor {info.name} {reason}; save the adapter again with PEFT")


def open_adapter(path: str, revision: str | None = None) -> Adapter:
    """Open a folder, or a hub id (downloaded, or taken from the local cache); raises ConfigError if it cannot run."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = from_hub(path, revision, "model.adapter", DOWNLOADED)
    adapter = Adapter(path, folder, read_config(path, folder))
    _check_weights_are_there(adapter)
    return adapter


def _check_weights_are_there(adapter: Adapter) -> None:
    if (adapter.folder / WEIGHTS).is_file():
        return
    pickled = sorted(file.name for file in adapter.folder.glob("*.bin"))
    found = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else f"no {WEIGHTS}"
    raise ConfigError(
        f"model.adapter={adapter.name} has {found}; save it with PEFT's save_pretrained(..., safe_serialization=True)"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
