"""The plan: what a run settles before it reads weights, as dry_run prints it and plan.json keeps it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.job import Job
from pipeline.output.durable import failing_run
from pipeline.output.store import PLAN_JSON

if TYPE_CHECKING:
    from pipeline.models.runtime import Runtime


def plan_of(job: Job, runtime: Runtime) -> dict[str, Any]:
    """The plan: configuration, files, rows, chunks left, shapes and memory."""
    return {
        "config": job.config.resolved,
        "runs": runtime.resolved()
        | {"resolved.kernel_reason": runtime.kernel_reason, "resolved.attention_reason": runtime.attention_reason},
        "files": [{"path": f.path, "rows": f.rows, "bytes": f.size} for f in job.files],
        "rows": job.num_rows,
        "chunks": len(job.chunks),
        "chunks_left": len(job.pending()),
        "shapes": runtime.shapes.as_dict(),
        "static_shapes": [shape.describe() for shape in runtime.shapes.shapes],
        "memory_bytes": runtime.memory.as_dict(),
    }


def write_plan(job: Job, runtime: Runtime) -> None:
    """Leave the plan beside the results, to look at; raises RunFailed if it cannot be written."""
    with failing_run(job.output.shown(PLAN_JSON)):
        job.output.replace(PLAN_JSON, (json.dumps(plan_of(job, runtime), indent=2, default=str) + "\n").encode())
