"""What came out of a run: totals over all Parts, kept in run.json, and the lines that say so at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from pipeline.errors import RunFailed
from pipeline.job import Job
from pipeline.output import manifest as manifests
from pipeline.output.claims import Claims
from pipeline.output.durable import failing_run
from pipeline.output.journal import sweep as sweep_journal
from pipeline.output.manifest import RunManifest
from pipeline.output.store import JOURNAL, RESULTS
from pipeline.stats import last_stats, stats_since, together


def summarize(job: Job, claims: Claims) -> dict[str, Any]:
    """Totals over all Parts, whichever process wrote them; RunFailed if these are not as many rows as the input has."""
    totals = job.sink(claims.attempt).totals(chunk.id for chunk in job.chunks)
    if totals.get("rows", 0) != job.num_rows:
        raise RunFailed(
            f"{job.output.shown(RESULTS)} has a Part for every chunk, but with {totals.get('rows', 0):,} rows in all, "
            f"and the input has {job.num_rows:,}; python -m pipeline.verify says which are wrong: remove these to have "
            "their rows done again"
        )
    counted = ("rows", "error_rows", "prompt_tokens", "completion_tokens", "target_tokens")
    summary: dict[str, Any] = {"chunks": len(job.chunks), **{key: totals.get(key, 0) for key in counted}}
    if summary["error_rows"]:
        from pipeline.evaluate.errors import commonest_errors

        summary["errors"] = commonest_errors(job.output.dataset(RESULTS))
    truth = job.config.task.truth
    if truth is not None:
        from pipeline.evaluate.truth import accuracy

        judged = accuracy(job.output.dataset(RESULTS), truth)
        summary["accuracy"] = {"column": truth, "rows": judged.judged, "correct": judged.correct, "value": judged.value}
    _keep(job, claims, summary)
    return summary


def clear_away(job: Job, claims: Claims) -> None:
    """Remove what is left in journal/ of a run that is done; whoever was killed after its last commit could not."""
    assert job.manifest is not None and job.manifest.summary is not None
    with failing_run(job.output.shown(JOURNAL)):
        leftovers = job.output.names(JOURNAL)
    if leftovers and not claims.others():
        _keep(job, claims, job.manifest.summary)


def _keep(job: Job, claims: Claims, summary: Mapping[str, Any]) -> None:
    """Keep the summary in run.json, and clear away what killed processes left.

    While others have a chunk in hand, as with `retry` by several, it may not stay true; they write theirs.
    """

    def concluded(manifest: RunManifest) -> RunManifest:
        _sweep(job, claims)  # while nobody else may write run.json
        return replace(manifest, summary=None if claims.others() else summary)

    job.take(manifests.update(job.output, claims, concluded))


def _sweep(job: Job, claims: Claims) -> None:
    """Remove leftovers unless somebody is at work, in chunks that this process need not know."""
    if not claims.others():
        with failing_run(job.output.shown(JOURNAL)):
            job.output.sweep()
            sweep_journal(job.output, job.committed())


def summary_lines(job: Job, summary: Mapping[str, Any], since: datetime | None) -> list[str]:
    """What the end of a run prints."""
    lines = [
        f"results    {job.output.shown(RESULTS)} ({summary['rows']:,} rows, {summary['error_rows']:,} of them errors, "
        f"in {_count(max(1, summary['chunks']), 'part')})"
    ]
    if summary.get("errors"):
        worst = summary["errors"][0]
        lines.append(f"errors     most often, in {_count(worst['rows'], 'row')}: {worst['error']}")
    lines += [f"{name:<10} {value}" for name, value in _speed(job, since)]
    judged = summary.get("accuracy")
    if judged and judged["value"] is not None:
        lines.append(f"accuracy   {100 * judged['value']:.1f} % of {judged['rows']:,} rows (column {judged['column']})")
    return lines


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _speed(job: Job, since: datetime | None) -> Iterator[tuple[str, str]]:
    """Rates of the last process that has left its stats, or of all since a time, which worked at once."""
    found = last_stats(job.output)
    if found is None:
        return
    name, last, processes = found
    whose = f", the last of {processes} processes" if processes > 1 else ""
    beside = [] if since is None else stats_since(job.output, since)
    if len(beside) > 1:
        last, whose = together(beside), f", {len(beside)} processes together"
    kinds = {kind: last[f"{kind}_tokens"] for kind in ("prompt", "completion", "target")}
    tokens = " + ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count or kind != "target")
    if last.get("journaled_rows"):
        tokens += f", {last['journaled_tokens']:,} of them journaled by processes before,"
    yield (
        "speed",
        f"{last['rows_per_s']:,.1f} rows/s, {last['tokens_per_s']:,.0f} tokens/s "
        f"({tokens} tokens in {last['generate_s']:.1f} s, after {last['load_s']:.1f} s of loading{whose})",
    )
    yield "stats", job.output.shown(name)
