"""The files of `data.path` as a process finds them, beside those that run.json names."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, OutputDiffers, SchemaDiffers
from pipeline.output import registration

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from pipeline.data.source import FoundFile, Source, SourceFile
    from pipeline.output.manifest import RunManifest


class InputFiles:
    """What was found when somebody looked last; rows of a file are counted once."""

    def __init__(self, source: Source, *, looks_only: bool) -> None:
        """Nothing is found yet. Who `looks_only` is told of new files that a run would refuse."""
        self._source = source
        self._looks_only = looks_only
        self._count = cache(source.count)
        self._grown = cache(source.grown)
        self.found: list[FoundFile] = []
        self.refused: dict[str, str] = {}
        """New files that a run would refuse, by name, with what it would say."""

    def find(self, manifest: RunManifest | None) -> None:
        """Look at the files as they are now; OutputDiffers if one has other columns than the run began with."""
        if manifest is None:
            self.found = list(self._source.find())
            return
        try:
            found = list(self._source.find())
            self._refuse(manifest, new_ones=not self._looks_only)
        except SchemaDiffers as error:
            raise OutputDiffers(str(error)) from error
        known = {file.name for file in manifest.files}
        self.found = [file for file in found if file.name in known or self._is_countable(file)]

    def find_registered(self, manifest: RunManifest, committed: AbstractSet[str]) -> None:
        """Look again, for the files that others have registered; ConfigError where they cannot be taken."""
        self.found = list(self._source.find())
        self._refuse(manifest, new_ones=False)
        self.as_registered(manifest, committed)

    def register(self, manifest: RunManifest, committed: AbstractSet[str]) -> tuple[SourceFile, ...]:
        """The files of a run.json as they are now; looked for again if another process has seen more than this one."""
        sizes = {file.name: file.size for file in self.found}
        if any(sizes.get(file.name, -1) < file.size for file in manifest.files):
            self.find(manifest)
        return registration.register(manifest, self.found, committed, self._count, self._grown)

    def as_registered(self, manifest: RunManifest, committed: AbstractSet[str]) -> tuple[SourceFile, ...]:
        """The files of a run.json where they are now, whatever else there is."""
        return registration.as_registered(manifest, self.found, committed)

    def has_rows(self) -> bool:
        """Whether there is any row."""
        return any(self._count(file).rows if file.rows is None else file.rows for file in self.found)

    def _refuse(self, manifest: RunManifest, *, new_ones: bool) -> None:
        """Raise for the registered files that the source has refused, and for `new_ones` if they are not only told."""
        known = {file.name for file in manifest.files}
        for name, error in self._source.refused.items():
            if new_ones or name in known:
                raise error
            self.refused[name] = str(error)

    def _is_countable(self, found: FoundFile) -> bool:
        """Whether a new file's rows can be counted; who only looks is told if not."""
        if self._looks_only and found.rows is None:
            try:
                self._count(found)
            except ConfigError as error:
                self.refused[found.name] = str(error)
                return False
        return True
