"""safetensors files written tensor by tensor, with an index where there are several."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

ALIGNMENT = 8
ENTRY_BYTES = 120
"""More than a tensor's entry in the header has beside its name: dtype, shape and offsets."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class ShardWriter:
    """Tensors to `model.safetensors`, or to several files of at most `shard_bytes` and their index, as they come.

    Format: 8 bytes little-endian length, a JSON header of so many bytes, the tensors (safetensors). Room for the
    header is left at the beginning of a file and filled at its end. Tensors whose size is no multiple of 8 bytes,
    which are few and small, wait for the end of their file, so that all others begin at one.
    """

    def __init__(self, folder: Path, header_bytes: int, shard_bytes: int) -> None:
        """`header_bytes` is at least what `entry_bytes` says of all tensors that will be added."""
        self._folder = folder
        self._room = -(-header_bytes // ALIGNMENT) * ALIGNMENT + 64
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, dict[str, object]]] = []
        self._uneven: dict[str, Tensor] = {}
        self._file: BinaryIO | None = None
        self._end = 0
        self.total_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._close_shard()
            self._name_files()
        elif self._file is not None:
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any device; its name has not been added before."""
        if self._file is not None and self._end + tensor.nbytes > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._shards.append({})
            self._file = self._path(len(self._shards)).open("xb")
            self._file.seek(8 + self._room)
            self._end = 0
        if tensor.nbytes % ALIGNMENT:
            self._uneven[name] = tensor.cpu().clone()
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]  # numpy's arrays are buffers
        offsets = [self._end, self._end + tensor.nbytes]
        self._shards[-1][name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._end += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _close_shard(self) -> None:
        if self._file is None:
            return
        for name, tensor in sorted(self._uneven.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        self._uneven.clear()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}).encode()
        assert len(header) <= self._room, "more tensors than header_bytes was for"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number}.partial"

    def _name_files(self) -> None:
        """The names that Hugging Face's tools look for, which say how many files there are."""
        count = len(self._shards)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        )
        for number, name in enumerate(names, start=1):
            self._path(number).rename(self._folder / name)
        if count > 1:
            places = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def entry_bytes(name: str) -> int:
    """How much room a tensor's entry in the header takes at most."""
    return len(json.dumps(name)) + ENTRY_BYTES
