"""The store that `output.dir` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.data.files import is_url, local_path
from pipeline.errors import ConfigError
from pipeline.output.store import STORES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.output.store import Store


def open_store(output_dir: str, storage_options: Mapping[str, Any]) -> Store:
    """A local folder, which is not touched yet, or an object store, which has been reached; else ConfigError."""
    if is_url(output_dir):
        from pipeline.output.remote import RemoteStore

        return RemoteStore(output_dir, storage_options)
    from pipeline.output.local import LocalStore

    scheme, colon, _ = output_dir.partition(":")
    if colon and scheme in STORES:
        raise ConfigError(
            f"output.dir={output_dir} is neither a URL nor a likely folder; write {scheme}://bucket/folder"
        )
    return LocalStore(local_path(output_dir))
