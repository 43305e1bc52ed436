"""report.html: whole, by itself, escaped, without credentials, and up to date wherever the output is."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from stores import Place

from pipeline.data.source import SourceFile
from pipeline.evaluate import errors
from pipeline.output.manifest import RunManifest
from pipeline.report.page import MOST_FILES, report_page, write_report
from pipeline.stats import RunStats, write_stats

EVIL = '<script>alert("x")</script>\'&amp;{{ 7 * 7 }}'
VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """The texts of a page, and a check that its elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def manifest(num_files: int = 1) -> RunManifest:
    files = [
        SourceFile(ordinal=n, name=f"{n}", path=f"/in/{n}{EVIL}", size=2048, rows=7, digest="abc", ends=(3, 5))
        for n in range(num_files)
    ]
    return RunManifest(
        run_id="0a1b",
        created="2024-05-01T12:00:00+00:00",
        pipeline_version="0.1.0",
        fingerprint={"resolved.kernel": "bitsandbytes", "task.prompt": EVIL},
        informational={"versions.torch": "2.11", "batch_invariant": True},
        files=tuple(files),
        chunk_rows=10,
        schema=pa.schema([]),
        input_schema=pa.schema([]),
        engine={"classes": [[64, 256]]},
        config={
            "task": {"prompt": EVIL, "labels": {}},
            "data": {"path": "s3://me:geheim@host/in?sig=geheim2", "storage_options": {"secret": "geheim3"}},
        },
    )


def summary(**more: object) -> dict[str, object]:
    counts = {"prompt_tokens": 12345, "completion_tokens": 3, "target_tokens": 0}
    return {"chunks": 2, "rows": 1234, "error_rows": 2, "errors": [{"error": EVIL, "rows": 2}], **counts, **more}


def stats(**more: object) -> RunStats:
    started = datetime(2024, 5, 1, tzinfo=UTC)
    return RunStats(run_id="r", attempt="a", host=EVIL, started_at=started, rows=600, rows_per_s=12.34, **more)  # type: ignore[arg-type]


def texts(place: Place) -> list[str]:
    return Page(place.files()["report.html"].decode()).texts


def test_the_page_says_what_came_out(place: Place) -> None:
    write_stats(place.store(), stats(), [])
    write_report(place.store(), manifest(), summary(accuracy={"column": "t", "rows": 9, "correct": 8, "value": 8 / 9}))
    told = texts(place)
    assert "1,234 rows in 2 parts," in told and "2 of them errors (0.16 %)" in told
    for text in (
        "12,345",
        "bitsandbytes",
        "2.11",
        "true",
        "[[64, 256]]",
        "88.89 % of 9 rows",
        "600",
        "12.3",
        "2.0 KiB",
    ):
        assert text in told, text
    assert EVIL in told, "as text: of the error, the host and the prompt"
    assert told.count(EVIL) == 3
    write_stats(place.store(), stats(pid=2), [])
    write_report(place.store(), manifest(), summary())
    assert "together" not in texts(place), "the same process again"


def test_nothing_runs_and_nothing_comes_from_elsewhere() -> None:
    page = report_page(manifest(), summary(), [], 0, f"s3://me:geheim@bucket/{EVIL}")
    found = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & found.tags
    assert not {"src", "href", "onclick", "style"} & found.attributes
    assert "url(" not in page and "@import" not in page
    assert "geheim" not in page
    assert "49" not in found.texts


def test_long_lists_are_cut_and_say_so() -> None:
    page = Page(report_page(manifest(MOST_FILES + 7), summary(), [], 3, "x"))
    assert "and 7 more, in run.json." in page.texts
    assert "The latest 0 of 3." in page.texts


def test_no_heavy_import_is_needed() -> None:
    assert "pipeline.report.page" in sys.modules
    assert Path(sys.modules["pipeline.report.page"].__file__ or "").with_name("report.html.jinja").is_file()


def test_the_commonest_errors_of_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The common ones are found although each row beside them has a reason of its own."""
    monkeypatch.setattr(errors, "MOST_APART", 50)
    reasons = [reason for n in range(400) for reason in (f"only {n}", "often", *(["half"] if n % 2 else []), None)]
    batches = [pa.record_batch({"error": reasons[n : n + 20]}) for n in range(0, len(reasons), 20)]
    found = errors.commonest_errors(ds.dataset(pa.Table.from_batches(batches)), 3)
    assert found[:2] == [{"error": "often", "rows": 400}, {"error": "half", "rows": 200}]
    assert len(found) == 3 and found[2]["error"].startswith("only ")
    none = ds.dataset(pa.table({"error": pa.nulls(3, pa.string())}))
    assert errors.commonest_errors(none) == []
