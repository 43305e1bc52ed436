"""report.html: a finished run to look at, in one file without scripts or anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import size_text
from pipeline.output.durable import failing_run
from pipeline.output.store import REPORT_HTML, RESULTS, Store
from pipeline.redaction import redacted, redacted_url
from pipeline.stats import all_stats

if TYPE_CHECKING:
    from pipeline.output.manifest import RunManifest

MOST_PROCESSES = 100
MOST_FILES = 500
TEMPLATE = Path(__file__).with_name("report.html.jinja")
ADDED = ("rows", "error_rows", "prompt_tokens", "completion_tokens", "target_tokens")


def write_report(store: Store, manifest: RunManifest, summary: Mapping[str, Any]) -> None:
    """Leave the report beside the results; RunFailed if it cannot be written."""
    processes, left_out = all_stats(store, MOST_PROCESSES)
    page = report_page(manifest, summary, processes, left_out, store.shown(RESULTS))
    with failing_run(store.shown(REPORT_HTML)):
        store.replace(REPORT_HTML, page.encode("utf-8", "replace"))


def report_page(
    manifest: RunManifest,
    summary: Mapping[str, Any],
    processes: Sequence[Mapping[str, Any]],
    left_out: int,
    results: str,
) -> str:
    """The page; `processes` are rows of the stats, of which the `left_out` oldest are not among them."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_clean
    )
    environment.filters |= {"size": size_text, "number": _number, "shown": _shown}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        run=manifest,
        summary=summary,
        share=100 * summary["error_rows"] / max(1, summary["rows"]),
        errors=summary.get("errors", ()),
        judged=summary.get("accuracy"),
        results=results,
        processes=processes,
        left_out=left_out,
        total={key: sum(one[key] for one in processes) for key in ADDED},
        files=manifest.files[:MOST_FILES],
        files_left_out=max(0, len(manifest.files) - MOST_FILES),
        settled={k.removeprefix("resolved."): v for k, v in manifest.fingerprint.items() if k.startswith("resolved.")},
        settings=dict(_flat(redacted(dict(manifest.config)))),
        informational=dict(sorted(manifest.informational.items())),
    )


def _clean(value: Any) -> Any:
    """Whatever is put on the page, without credentials in URLs."""
    return redacted_url(value) if isinstance(value, str) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Maps in maps as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _shown(value: Any) -> str:
    """A setting as JSON has it, texts as they are."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
