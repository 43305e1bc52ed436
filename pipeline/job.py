"""A run before the device is taken: its input, its output folder, what is done and what is left. No torch here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, cached_property
from typing import Any

import pyarrow as pa

from pipeline import __version__, fingerprint
from pipeline.asked_columns import check_columns, check_output_apart, columns_named, run_labels
from pipeline.data.open import open_source
from pipeline.data.source import Chunk, FoundFile, Source, SourceFile, chunks_within, unfinished_chunk
from pipeline.errors import ConfigError, Interrupted, OutputDiffers, Overtaken, RunFailed, SchemaDiffers
from pipeline.models.adapter import Adapter, open_adapter
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.output import manifest as manifests
from pipeline.output.claims import Claims
from pipeline.output.durable import failing_run
from pipeline.output.journal import Journal
from pipeline.output.journal import sweep as sweep_journal
from pipeline.output.manifest import RunManifest
from pipeline.output.open import open_store
from pipeline.output.part import read_footer
from pipeline.output.registration import as_registered, continued, more_in, redo_of, register, with_redo
from pipeline.output.schema import results_schema
from pipeline.output.sink import Sink, committed_parts, part_path
from pipeline.output.store import JOURNAL, RUN_JSON, Store
from pipeline.settings import RunConfig
from pipeline.template import RowTemplate


class Job:
    """Opens everything that can be looked at cheaply; raises ConfigError on whatever does not fit together."""

    def __init__(
        self, config: RunConfig, output: Store | None = None, version: int = 1, *, looks_only: bool = False
    ) -> None:
        """`output` is the one of `output.dir`, or of a version of it, if it is open already.

        Raises OutputDiffers where it was made with other settings or of other input. Who `looks_only` at what was
        registered is told of new files that a run would refuse (`refused`).
        """
        self.config = config
        self.version = version
        self.because = ""
        """Why there is this version."""
        self.has_worked = False
        """Whether this process has answered rows, and left its stats."""
        self._looks_only = looks_only
        self.refused: dict[str, str] = {}
        """New files that a run would refuse, by name, with what it would say."""
        self._is_settled = False  # whether the files are those of run.json, whatever else there is
        self.announce: Callable[[], None] = lambda: None
        """Called before run.json is made."""
        self.resolved: Mapping[str, Any] | None = None
        self.output: Store = output or open_store(config.output.dir, config.output.storage_options)
        answered = bool(self.committed())  # looked at first: whoever commits has made run.json before
        stored = manifests.find(self.output)
        self.checkpoint = open_checkpoint(config.model.path, config.model.revision)
        named = config.model.adapter
        self.adapter: Adapter | None = None if named is None else open_adapter(named, config.model.adapter_revision)
        self.tokenizer = self._tokenizer_checkpoint()
        self.asked = fingerprint.requested(config, self.checkpoint, self.tokenizer, self.adapter)
        self.source: Source = open_source(config.data)
        if stored is not None:
            self._check_asked(stored)
            self.source.fix_schema(stored.input_schema)
        self.count = cache(self.source.count)
        self.grown = cache(self.source.grown)
        self.found: list[FoundFile] = self._find(stored)
        self.input_schema: pa.Schema = self._input_schema()
        check_columns(config, self.input_schema)
        check_output_apart(config)
        if config.task.messages is None:
            RowTemplate(config.task.prompt, self.input_schema.names)
        self.schema: pa.Schema = results_schema(
            self.input_schema, config.output.columns, config.task.kind, {}, config.on_request, run_labels(config)
        )
        self.manifest: RunManifest | None = None
        self.failed: dict[str, str] = {}
        """Chunks whose Part has errors that are to be done again, and the attempt that wrote that Part: errors of
        half-written rows that have been continued, and all of them with `retry`."""
        if stored is not None:
            self._adopt(stored)
        elif answered:
            raise ConfigError(
                f"output.dir {self.output.shown()} has results but no run.json to say what they were made with; "
                "restore run.json, or use another output.dir"
            )

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """The registered files; before this process has begun, as it would register them."""
        if self._is_settled and self.manifest is not None:
            return as_registered(self.manifest, self.found, self.committed())
        return self._register(self.manifest or self.fresh_manifest({}, {}, {}))

    @cached_property
    def continued(self) -> frozenset[str]:
        """Chunks of a row that was half-written and is to be done again, now that it goes on."""
        return frozenset() if self.manifest is None else frozenset(continued(self.manifest.files, self.files))

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All chunks of the run in row order, up to `data.limit` rows."""
        return chunks_within(self.files, self.config.data.chunk_rows, self.config.data.limit)

    @property
    def num_rows(self) -> int:
        """Rows of the whole run."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def tokenizer_is_adapters(self) -> bool:
        """Whether the adapter brings the tokenizer."""
        return self.adapter is not None and self.tokenizer.folder == self.adapter.folder

    def notes(self) -> list[str]:
        """What is worth knowing of the version, the libraries and the adapter, a sentence each."""
        notes = [f"version {self.version} in {self.output.shown()}: {self.because}"] if self.because else []
        others = [] if self.manifest is None else manifests.other_versions(self.manifest, fingerprint.versions())
        if others:
            notes.append(
                f"libraries have changed since the run began ({', '.join(others)}); rows can differ in their last bits "
                "from those that are done, and run.json says so"
            )
        return [*notes, *self._notes_of_adapter()]

    def _notes_of_adapter(self) -> list[str]:
        if self.adapter is None:
            return []
        elsewhere = self.adapter.trained_elsewhere(self.config.model.path)
        brings = f"the tokenizer, its chat template and its end token are those that model.adapter={self.adapter.name} "
        return [
            *([] if elsewhere is None else [elsewhere]),
            *([f"{brings}brings; model.tokenizer names another"] if self.tokenizer_is_adapters else []),
        ]

    def committed(self) -> set[str]:
        """Ids of the chunks that have a Part."""
        return committed_parts(self.output)

    def pending(self) -> list[Chunk]:
        """Chunks without a Part, or with one whose errors are to be done again; those of this shard first."""
        committed = self.committed() - self.failed.keys() - self.continued
        first = len(self.chunks) * self.config.shard.index // self.config.shard.count
        ordered = self.chunks[first:] + self.chunks[:first]
        return [chunk for chunk in ordered if chunk.id not in committed]

    def is_answered(self) -> bool:
        """Whether every row has its answer; a dataset without rows, when it has its empty Part."""
        return self.manifest is not None and not self.pending() and bool(self.chunks or self.committed())

    def fresh_manifest(
        self, resolved: Mapping[str, Any], shapes: Mapping[str, Any], noted: Mapping[str, Any]
    ) -> RunManifest:
        """The manifest of a first run; `noted` is for its reader."""
        return RunManifest(
            run_id=uuid.uuid4().hex,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            pipeline_version=__version__,
            fingerprint={**self.asked, **resolved},
            informational={**fingerprint.versions(), **noted},
            files=(),
            chunk_rows=self.config.data.chunk_rows,
            schema=self.schema,
            input_schema=self.input_schema,
            engine=shapes,
            config=self.config.resolved,
        )

    def check_resolved(self, resolved: Mapping[str, Any]) -> None:
        """Refuse to resume on another device, dtype or kernel than the results were made with."""
        self.resolved = resolved
        if self.manifest is not None:
            manifests.check(
                self.manifest.fingerprint,
                {**self.asked, **resolved},
                self.output.shown(),
                started=bool(self.committed()),
            )

    def start(
        self, claims: Claims, resolved: Mapping[str, Any], shapes: Mapping[str, Any], noted: Mapping[str, Any]
    ) -> None:
        """Create run.json, or adopt the one that another process has just made, and register the files."""
        if self.manifest is None:
            self.announce()
            fresh = self.fresh_manifest(resolved, shapes, noted)
            fresh = replace(fresh, files=self._register(fresh))
            manifest, created = manifests.create_or_load(self.output, fresh)
        else:
            manifest, created = manifests.load(self.output), False
        if not created:
            if self.manifest is None and not manifest.input_schema.equals(self.input_schema):
                raise Overtaken
            self._adopt(manifest)
            self.check_resolved(resolved)
            if self.files != manifest.files or manifests.with_versions(manifest, fingerprint.versions()) != manifest:
                manifest = self._register_all(claims)
            if self.failed:  # whose Parts will change under the summary
                manifest = manifests.update(self.output, claims, lambda manifest: replace(manifest, summary=None))
        self.source.fix_schema(self.input_schema)
        self._is_settled = True
        self._take(manifest)

    def keep_to_registered(self) -> str | None:
        """Leave aside what nobody has registered yet; returns what that is, for a sentence."""
        if self.manifest is None:
            return None
        now, chunks, again = self.files, self.chunks, self.continued
        self._is_settled = True
        self._take(self.manifest)
        return more_in(now, self.files) if again or chunks != self.chunks else None

    def take_over(self) -> bool:
        """Take over what other processes have registered since this one did, so that all have the same to do.

        Returns whether there was any. Raises Interrupted where it cannot be read here, RunFailed where run.json is
        another one.
        """
        if not self._is_settled or self.manifest is None:
            return False
        manifest = self._check_still_ours()
        if manifest.files == self.manifest.files:
            return False
        try:
            self.found = list(self.source.find())
            self._refuse(manifest, new_ones=False)
            as_registered(manifest, self.found, self.committed())
        except ConfigError as error:
            raise Interrupted(
                f"other processes have registered more input, which this one cannot take: {error}"
            ) from error
        self._take(manifest)
        return True

    def is_as_registered(self, chunk: Chunk) -> bool:
        """False for an unfinished row that another process has found continued since this one looked."""
        file = self._file_of(chunk)
        if unfinished_chunk(file) != chunk:
            return True
        now = {file.ordinal: file.size for file in self._check_still_ours().files}
        return now.get(file.ordinal) == file.size

    def sink(self, attempt: str) -> Sink:
        """The writer of this run's Parts, which name the run and its fingerprint in their schema's metadata."""
        asked = self.config.output
        return Sink(
            self.output,
            self.schema.with_metadata(self._identity()),
            attempt,
            asked.compression,
            asked.row_group_rows,
            self._check_still_ours,
        )

    def journal(self, attempt: str) -> Journal:
        """What keeps rows of this run's chunks until they are committed."""
        return Journal(self.output, self._identity(), attempt)

    def content_of(self, chunk: Chunk) -> str:
        """What changes with the content of a chunk's file."""
        return self._file_of(chunk).digest

    def _file_of(self, chunk: Chunk) -> SourceFile:
        return next(file for file in self.files if file.ordinal == chunk.file_ordinal)

    def _identity(self) -> dict[str, str]:
        """The run, and the settings that can change its rows."""
        assert self.manifest is not None
        return self.manifest.part_metadata()

    def _check_still_ours(self) -> RunManifest:
        """run.json as it is now; RunFailed when it has been removed or replaced while this process worked."""
        assert self.manifest is not None
        now = None
        with suppress(FileNotFoundError, ValueError):
            now = manifests.read(self.output)
        if now is None or now.run_id != self.manifest.run_id:
            raise RunFailed(
                f"{self.output.shown(RUN_JSON)} is not the one this process started with any more; nothing is written "
                "under other settings; run the same command again"
            )
        return now

    def summarize(self, claims: Claims, summary: Mapping[str, Any]) -> None:
        """Keep the run's summary in run.json, and clear away what killed processes left.

        While others have a chunk in hand, as with `retry` by several, it may not stay true; they write theirs.
        """

        def concluded(manifest: RunManifest) -> RunManifest:
            self._sweep(claims)  # while nobody else may write run.json
            return replace(manifest, summary=None if claims.others() else summary)

        self._take(manifests.update(self.output, claims, concluded))

    def clear_away(self, claims: Claims) -> None:
        """Remove what is left in journal/ of a run that is done; whoever was killed after its last commit could not."""
        assert self.manifest is not None and self.manifest.summary is not None
        with failing_run(self.output.shown(JOURNAL)):
            leftovers = self.output.names(JOURNAL)
        if leftovers and not claims.others():
            self.summarize(claims, self.manifest.summary)

    def _sweep(self, claims: Claims) -> None:
        """Remove leftovers unless somebody is at work, in chunks that this process need not know."""
        if not claims.others():
            with failing_run(self.output.shown(JOURNAL)):
                self.output.sweep()
                sweep_journal(self.output, self.committed())

    def _register_all(self, claims: Claims) -> RunManifest:
        """Have run.json name the files as they are now, and the Parts of rows that have been continued since.

        The file of such a row that another process has in hand stays registered as it is, for the next run.
        """
        held: list[str] = []

        def changed(manifest: RunManifest) -> RunManifest:
            files = self._register(manifest)
            for chunk_id, before in continued(manifest.files, files).items():
                if claims.try_claim(chunk_id):
                    held.append(chunk_id)
                else:
                    files = tuple(before if file.ordinal == before.ordinal else file for file in files)
            files = with_redo(files, held, self._attempts)
            known = manifests.with_versions(manifest, fingerprint.versions())
            return replace(known, files=files, summary=None if held else known.summary)

        self._register(manifests.load(self.output))  # reads what has to be read while nobody waits for run.json
        try:
            return manifests.update(self.output, claims, changed)
        finally:
            for chunk_id in held:
                claims.release(chunk_id)

    def _attempts(self, chunk_ids: Iterable[str]) -> dict[str, str]:
        """The attempts that wrote the Parts of those chunks that have one."""
        wanted = list(chunk_ids)
        there = self.committed() if wanted else set()
        parts = {id_: read_footer(self.output, {}, part_path(id_)) for id_ in wanted if id_ in there}
        return {chunk_id: part.attempt for chunk_id, part in parts.items()}

    def _register(self, manifest: RunManifest) -> tuple[SourceFile, ...]:
        """The files of a run.json as they are now; looked for again if another process has seen more than this one."""
        sizes = {file.name: file.size for file in self.found}
        if any(sizes.get(file.name, -1) < file.size for file in manifest.files):
            self.found = self._find(manifest)
        return register(manifest, self.found, self.committed(), self.count, self.grown)

    def _adopt(self, manifest: RunManifest) -> None:
        """Take over a run.json after making sure that it is of this run and fits the input."""
        self._check_asked(manifest)
        if not (manifest.schema.equals(self.schema) and manifest.input_schema.equals(self.input_schema)):
            raise OutputDiffers(
                f"output.dir {self.output.shown()} has results of another schema than the input would give now; "
                "restore the input's columns, or use another output.dir, or output.on_change=new",
                "the input has other columns",
            )
        self._take(manifest)

    def _check_asked(self, manifest: RunManifest) -> None:
        """Refuse a run.json that was made with other settings."""
        asked_then = {k: v for k, v in manifest.fingerprint.items() if not k.startswith("resolved.")}
        manifests.check(asked_then, self.asked, self.output.shown(), started=bool(self.committed()))

    def _find(self, stored: RunManifest | None) -> list[FoundFile]:
        """The input files as they are now; OutputDiffers if one has other columns than the run began with."""
        if stored is None:
            return list(self.source.find())
        try:
            found = list(self.source.find())
            self._refuse(stored, new_ones=not self._looks_only)
        except SchemaDiffers as error:
            raise OutputDiffers(str(error)) from error
        known = {file.name for file in stored.files}
        return [file for file in found if file.name in known or self._is_countable(file)]

    def _refuse(self, manifest: RunManifest, *, new_ones: bool) -> None:
        """Raise for the registered files that the source has refused, and for `new_ones` if they are not only told."""
        known = {file.name for file in manifest.files}
        for name, error in self.source.refused.items():
            if new_ones or name in known:
                raise error
            self.refused[name] = str(error)

    def _is_countable(self, found: FoundFile) -> bool:
        """Whether a new file's rows can be counted; who only looks is told if not."""
        if self._looks_only and found.rows is None:
            try:
                self.count(found)
            except ConfigError as error:
                self.refused[found.name] = str(error)
                return False
        return True

    def _take(self, manifest: RunManifest) -> None:
        self.manifest = manifest
        for name in ("files", "chunks", "continued"):
            self.__dict__.pop(name, None)
        halves = redo_of(manifest.files)
        now = self._attempts(halves)
        self.failed |= {chunk_id: attempt for chunk_id, attempt in halves.items() if now.get(chunk_id) == attempt}

    def _input_schema(self) -> pa.Schema:
        """The source's; a dataset without rows or known columns has those that the run speaks of, as text."""
        schema = self.source.schema()
        if schema.names or any(self.count(file).rows if file.rows is None else file.rows for file in self.found):
            return schema
        return pa.schema([(name, pa.string()) for name in columns_named(self.config)])

    def _tokenizer_checkpoint(self) -> Checkpoint:
        """The one asked for, else the adapter's own, else the model's."""
        name = self.config.model.tokenizer
        if name is not None:
            return open_checkpoint(name)
        own = None if self.adapter is None else self.adapter.tokenizer
        return self.checkpoint if own is None else own
