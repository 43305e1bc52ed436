"""`python -m pipeline.status [overrides] [--since T] [--registered]`: what is done of a run, checked, in one line.

Takes the command line of the run; `--since` (seconds since 1970) adds how many rows were answered after that time.
New input counts as rows to do, and is 2 where a run would refuse it. With `--registered` it is only said: the rows are
those of the files that the run had found when it, or a task of it, was last started.
Computes nothing and reads no weights. Exit codes are those of the run: 0 all rows done, 3 with too many errors,
75 not done, 1 a damaged or foreign Part, 2 what a run would refuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from pipeline import config
from pipeline.command import guarded
from pipeline.console import Console
from pipeline.errors import RunFailed
from pipeline.job import Job
from pipeline.output.registration import refused_since
from pipeline.output.store import RESULTS
from pipeline.process import ExitCode
from pipeline.settings import RunConfig
from pipeline.stats import stats_since
from pipeline.versions import open_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at the run of the given command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--since", type=float, help="seconds since 1970")
    parser.add_argument("--registered", action="store_true", help="leave aside what came since the run looked")
    parser.add_argument("overrides", nargs="*", help="as for python -m pipeline")
    asked = parser.parse_args(arguments)
    return guarded(
        lambda console, _: status(config.load_config(asked.overrides), asked.since, console, asked.registered)
    )


def status(settings: RunConfig, since: float | None, console: Console, registered: bool = False) -> ExitCode:
    """Print the line; raises ConfigError where the output does not fit the command line, RunFailed on a bad Part."""
    job = open_job(settings, looks_only=True)
    if job.manifest is None:
        console.result(f"{job.output.shown()}: not begun, {job.num_rows:,} rows to do")
        return ExitCode.NOT_DONE
    more = job.keep_to_registered() if registered else None
    pending = {chunk.id for chunk in job.pending()}
    done = [chunk for chunk in job.chunks if chunk.id not in pending]
    with job.output.claims() as claims:
        held = claims.others() if pending else 0
        totals = job.sink(claims.attempt).totals(chunk.id for chunk in done)
    rows, errors = sum(chunk.num_rows for chunk in done), totals.get("error_rows", 0)
    if totals.get("rows", 0) != rows:
        raise RunFailed(f"{job.output.shown(RESULTS)} holds {totals.get('rows', 0):,} rows where {rows:,} should be")
    said = [f"{rows:,} of {job.num_rows:,} rows done", f"{errors:,} errors"]
    said += [] if since is None else [f"{_rows_since(job, since):,} rows new"]
    said += [f"{len(pending):,} of {len(job.chunks):,} chunks left, {held:,} of them in work"] if pending else []
    said += [] if more is None else [more]
    said += [*job.source.left, *map(refused_since, job.input.refused.values())]
    console.result(f"{job.output.shown()}: {', '.join(said)}")
    if job.input.refused and not registered:
        return ExitCode.BAD_CONFIG
    if not job.is_answered():
        return ExitCode.NOT_DONE
    return ExitCode.TOO_MANY_ERRORS if errors > settings.max_error_rate * max(1, rows) else ExitCode.DONE


def _rows_since(job: Job, since: float) -> int:
    return sum(one["rows"] for one in stats_since(job.output, datetime.fromtimestamp(since, UTC)))


if __name__ == "__main__":
    sys.exit(main())
