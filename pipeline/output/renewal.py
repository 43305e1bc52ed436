"""run.json made to name the files as they are now, with rows that go on behind what was read of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.output import manifest as manifests
from pipeline.output.part import read_footer
from pipeline.output.registration import continued, with_redo
from pipeline.output.sink import committed_parts, part_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pipeline.data.source import SourceFile
    from pipeline.output.claims import Claims
    from pipeline.output.manifest import RunManifest
    from pipeline.output.store import Store


def renew(
    store: Store,
    claims: Claims,
    register: Callable[[RunManifest], tuple[SourceFile, ...]],
    versions: Mapping[str, str],
) -> RunManifest:
    """Have run.json name the files as they are now, and the Parts of rows that have been continued since.

    The file of such a row that another process has in hand stays registered as it is, for the next run. `register`
    gives a run.json's files as they are now, `versions` are those of the libraries. Raises what `manifest.update` does.
    """
    held: list[str] = []

    def changed(manifest: RunManifest) -> RunManifest:
        files = register(manifest)
        for chunk_id, before in continued(manifest.files, files).items():
            if claims.try_claim(chunk_id):
                held.append(chunk_id)
            else:
                files = tuple(before if file.ordinal == before.ordinal else file for file in files)
        files = with_redo(files, held, lambda chunk_ids: attempts_of(store, chunk_ids))
        known = manifests.with_versions(manifest, versions)
        return replace(known, files=files, summary=None if held else known.summary)

    register(manifests.load(store))  # reads what has to be read while nobody waits for run.json
    try:
        return manifests.update(store, claims, changed)
    finally:
        for chunk_id in held:
            claims.release(chunk_id)


def attempts_of(store: Store, chunk_ids: Iterable[str]) -> dict[str, str]:
    """The attempts that wrote the Parts of those chunks that have one."""
    wanted = list(chunk_ids)
    there = committed_parts(store) if wanted else set()
    parts = {id_: read_footer(store, {}, part_path(id_)) for id_ in wanted if id_ in there}
    return {chunk_id: part.attempt for chunk_id, part in parts.items()}
