"""The store that `output.dir` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.data.files import is_url, local_path
from pipeline.errors import ConfigError
from pipeline.output.store import STORES
from pipeline.redaction import redacted_url

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipeline.output.store import Store


def open_store(output_dir: str, storage_options: Mapping[str, Any]) -> Store:
    """A local folder, which is not touched yet, or an object store, which has been reached; else ConfigError."""
    if is_url(output_dir):
        from pipeline.output.remote import RemoteStore

        return RemoteStore(output_dir, storage_options)
    from pipeline.output.local import LocalStore

    return LocalStore(local_folder(output_dir))


def local_folder(output_dir: str) -> Path:
    """The folder of this machine that `output.dir` names; ConfigError if that is a URL, or nearly one."""
    scheme, colon, _ = output_dir.partition(":")
    if is_url(output_dir):
        raise ConfigError(f"output.dir={redacted_url(output_dir)} is no folder of this machine; name one")
    if colon and scheme in STORES:
        raise ConfigError(
            f"output.dir={output_dir} is neither a URL nor a likely folder; write {scheme}://bucket/folder"
        )
    return local_path(output_dir)
