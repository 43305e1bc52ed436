"""`python -m pipeline.verify OUT [key=value ...] [--replay N]`: whether an output is what its run.json says.

Every input row is there once, and as it was: Parts are read to their end and compared with run.json and with the
input files; of files that are gone it is said. OUT is the folder or URL of the output; without it, the command line is
that of the run. Further key=value change what run.json says of the run, where data or model have moved to, or
credentials, which run.json does not hold. `--replay N` answers N rows again, drawn with `--seed`, on this machine.
Exit codes: 0 all is well, 1 something is wrong, 2 OUT is no output, 75 nothing is wrong, but a row that was
half-written has been continued, and is still to be answered again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config
from pipeline.command import guarded
from pipeline.compared_input import compare_input
from pipeline.console import Console
from pipeline.data.files import is_url
from pipeline.data.source import Chunk, chunks_within
from pipeline.errors import ConfigError
from pipeline.findings import Report
from pipeline.output import manifest as manifests
from pipeline.output.durable import failing_run
from pipeline.output.open import open_store
from pipeline.output.registration import redo_of
from pipeline.output.sink import NO_ROWS, committed_parts, part_name, part_path
from pipeline.output.store import RESULTS, RUN_JSON
from pipeline.process import ExitCode, Stopping
from pipeline.settings import RunConfig
from pipeline.versions import numbers_of, open_job, version_name

if TYPE_CHECKING:
    from pipeline.output.manifest import RunManifest
    from pipeline.output.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify the output of the given command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replay", type=int, default=0, help="rows to answer again")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of these rows")
    parser.add_argument("--first", type=int, default=20, help="problems to show")
    parser.add_argument("arguments", nargs="+", metavar="OUT | key=value")
    asked = parser.parse_intermixed_args(arguments)
    report = Report(asked.first)
    return guarded(
        lambda console, stopping: verify(asked.arguments, asked.replay, asked.seed, report, console, stopping)
    )


def verify(
    arguments: Sequence[str], replays: int, seed: int, report: Report, console: Console, stopping: Stopping
) -> ExitCode:
    """Look at everything, and say what is wrong; ConfigError for what is no output, RunFailed for a lost store."""
    if replays < 0:
        raise ConfigError(f"--replay must be 0 or more, got {replays}")
    output, manifest, settings = _opened(arguments)
    chunks = chunks_within(manifest.files, manifest.chunk_rows, manifest.fingerprint.get("data.limit"))
    committed = committed_parts(output)
    report.notes += _versions(output)
    report.problems += _names(output, manifest, chunks, committed)
    there = [chunk for chunk in chunks or [NO_ROWS] if chunk.id in committed]
    totals, readable = _read_parts(output, manifest, there, report)
    if len(there) == len(chunks) and chunks:
        report.problems += _totals(manifest, totals, len(chunks))
    halves = _half_rows(output, manifest, readable)
    report.pending += [_half_row(output, manifest, chunk) for chunk in halves]
    readable = [chunk for chunk in readable if chunk not in halves]
    compare_input(output, manifest, settings, readable, report)
    if replays and chunks:
        from pipeline.replay import replay

        try:
            replay(settings, output, readable, replays, seed, report, stopping)
        except ConfigError as error:
            report.problems.append(f"no row could be answered again: {error}")
    report.show(console)
    rows = f"{totals['rows']:,} rows in {len(there):,} of {max(1, len(chunks)):,} parts"
    left = f", {len(report.pending):,} pending" if report.pending else ""
    console.result(f"{output.shown()}: {rows}, {len(report.problems) or 'nothing'} wrong{left}")
    if report.problems:
        return ExitCode.FAILED
    return ExitCode.NOT_DONE if report.pending else ExitCode.DONE


def _opened(arguments: Sequence[str]) -> tuple[Store, RunManifest, RunConfig]:
    """The output that is named, with the configuration of its run.json, or that of the run's command line."""
    first, overrides = arguments[0], arguments[1:]
    if "=" in first and not is_url(first.partition("=")[0]) and not Path(first).is_dir():
        settings = config.load_config(arguments)
        output = _output_of(settings)
        return output, _manifest_of(output), settings
    output = open_store(first, config.override_values(overrides).get("output", {}).get("storage_options", {}))
    manifest = _manifest_of(output)
    return output, manifest, config.stored_config(manifest.config, manifest.fingerprint, first, overrides)


def _output_of(settings: RunConfig) -> Store:
    if settings.output.on_change == "new":
        return open_job(settings, looks_only=True).output
    return open_store(settings.output.dir, settings.output.storage_options)


def _manifest_of(output: Store) -> RunManifest:
    with failing_run(output.shown()):
        if not output.exists(RUN_JSON):
            has = "results, but no run.json to hold them against" if output.names(RESULTS) else "no run.json"
            raise ConfigError(f"{output.shown()} is no output of a run: it has {has}; name the folder of run.json")
    return manifests.load(output)


def _versions(output: Store) -> Iterator[str]:
    for number in numbers_of(output)[1:]:
        yield f"version {number} is beside it, in {output.shown(version_name(number))}, and is verified by itself"


def _names(output: Store, manifest: RunManifest, chunks: Sequence[Chunk], committed: set[str]) -> Iterator[str]:
    """Chunks without a Part, and what lies among the Parts and is none of a chunk."""
    files = {file.ordinal: file.name for file in manifest.files}
    for chunk in chunks:
        if chunk.id not in committed:
            rows = (
                f"rows {chunk.first_row:,} to {chunk.first_row + chunk.num_rows - 1:,} of {files[chunk.file_ordinal]}"
            )
            yield f"{output.shown(part_path(chunk.id))} is missing: {rows}"
    expected = {part_name(chunk.id) for chunk in (*chunks, NO_ROWS)}  # a dataset may have had no rows once
    if not chunks and not committed:
        yield f"{output.shown(part_path(NO_ROWS.id))} is missing, which holds the schema of a dataset without rows"
    with failing_run(output.shown(RESULTS)):
        others = sorted(set(output.names(RESULTS)) - expected)
    for name in others:
        yield f"{output.shown(RESULTS)}/{name} is no Part of a chunk of run.json"


def _read_parts(
    output: Store, manifest: RunManifest, chunks: Sequence[Chunk], report: Report
) -> tuple[Counter[str], list[Chunk]]:
    """The counts of all Parts, as many read at a time as the store is quick at, and the chunks whose rows are there."""
    from pipeline.output.inspection import inspect_part

    schema = manifest.schema.with_metadata(manifest.part_metadata())
    totals: Counter[str] = Counter()
    readable: list[Chunk] = []
    with ThreadPoolExecutor(output.reads_at_once) as pool:
        for chunk, found in zip(chunks, pool.map(partial(inspect_part, output, schema), chunks), strict=True):
            totals.update(found.counts)
            report.problems += found.problems
            readable += [chunk] if found.is_read else []
    return totals, readable


def _half_rows(output: Store, manifest: RunManifest, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Those whose Part is still the one that was made of half a row, which has been continued since."""
    from pipeline.output.part import read_footer

    attempts = redo_of(manifest.files)
    return [
        chunk
        for chunk in chunks
        if chunk.id in attempts and read_footer(output, {}, part_path(chunk.id)).attempt == attempts[chunk.id]
    ]


def _half_row(output: Store, manifest: RunManifest, chunk: Chunk) -> str:
    name = next(file.name for file in manifest.files if file.ordinal == chunk.file_ordinal)
    return (
        f"row {chunk.first_row:,} of {name} was half-written when it was answered, and has been continued; the next "
        f"run puts its answer into {output.shown(part_path(chunk.id))}"
    )


def _totals(manifest: RunManifest, totals: Counter[str], chunks: int) -> Iterator[str]:
    """Where the summary in run.json, if it is of all Parts, says something else than they do."""
    summary = manifest.summary or {}
    for key in ("rows", "error_rows", "prompt_tokens", "completion_tokens", "target_tokens"):
        if summary.get("chunks") == chunks and summary.get(key, totals[key]) != totals[key]:
            yield f"{RUN_JSON} says {key}={summary[key]:,} of all Parts, and they have {totals[key]:,}"


if __name__ == "__main__":
    sys.exit(main())
