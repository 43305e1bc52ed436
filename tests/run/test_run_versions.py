"""output.on_change=new: what changed is answered in a version of its own, beside what was there."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo import run_echo
from harness import TINY, call, disk_state, ended, nothing_left_over, put_run_json, results, run_json, start, write
from stores import Place

from pipeline import merge, status, verify
from pipeline.config import load_config
from pipeline.job import Job
from pipeline.versions import open_job, with_job

CONTRACT = {"results", "stats", "run.json", "plan.json", "report.html", "journal", "claims"}
"""What an output folder holds without output.on_change=new."""


def args(data: Path, out: Path | str, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={TINY}", f"data.path={data}", f"output.dir={out}", "quant=none",
        "data.chunk_rows=2", "task.chat=false", "output.on_change=new", *more,
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "in" / "a.parquet", {"prompt": list("abc")}).parent


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def completions(folder: Path) -> list[str]:
    texts: list[str] = results(folder)["completion"].to_pylist()
    return texts


def latest(out: Path) -> Any:
    return json.loads((out / "latest.json").read_text())["version"]


def test_other_settings_have_a_version_of_their_own(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = args(data, out)
    second = [*first, "task.prompt='new {{ prompt }}'"]
    run_echo(monkeypatch, *first).done()
    assert {path.name for path in out.iterdir()} == CONTRACT | {"latest.json", "latest", "v0001"}
    assert latest(out) == 1
    assert completions(out / "latest") == completions(out)
    before = {name: state for name, state in disk_state(out).items() if not name.startswith("latest")}
    changed = run_echo(monkeypatch, *second).done()
    assert f"version 2 in {out / 'v0002'}: {out} was made otherwise (task.prompt: " in changed.err
    assert str(out / "v0002" / "results") in changed.out
    assert completions(out / "v0002") == [f"new {text}" for text in "abc"]
    assert {path.name for path in (out / "v0002").iterdir()} == CONTRACT
    assert nothing_left_over(out / "v0002")
    assert {name: state for name, state in disk_state(out).items() if name in before} == before
    assert latest(out) == 2
    assert completions(out / "latest") == completions(out / "v0002")
    kept = disk_state(out)
    assert str(out / "v0002" / "results") in run_echo(monkeypatch, *second).done().out
    assert f"{out / 'results'} (3 rows" in run_echo(monkeypatch, *first).done().out
    assert disk_state(out) == kept, "both are done, and the newest stays the latest"
    assert sorted(pq.read_table(out / "results")["completion"].to_pylist()) == list("abc"), "version 1 by itself"


def test_without_it_the_layout_is_the_contracts_and_a_change_is_refused(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = args(data, out, "output.on_change=refuse")
    run_echo(monkeypatch, *command).done()
    assert {path.name for path in out.iterdir()} == CONTRACT
    refusal = run_echo(monkeypatch, *command, "sampling.seed=7").refusal()
    assert "or output.on_change=new for a version beside it" in refusal
    assert (
        "output.on_change must be one of refuse, new"
        in run_echo(monkeypatch, *command[:-1], "output.on_change=x").refusal()
    )


def test_a_file_that_changed_and_one_that_came_back(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_echo(monkeypatch, *args(data, out)).done()
    kept = (data / "a.parquet").read_bytes()
    for version, columns in enumerate(({"prompt": list("xyz")}, {"prompt": list("uvw"), "more": [1, 2, 3]}), 2):
        write(data / "a.parquet", columns)
        write(data / f"{version}.parquet", columns)
        run_echo(monkeypatch, *args(data, out)).done()
        folder = out / f"v000{version}"
        assert completions(folder)[-3:] == columns["prompt"]
        assert latest(out) == version
        (data / f"{version}.parquet").unlink()
    (data / "a.parquet").write_bytes(kept)
    assert f"{out / 'results'} (3 rows" in run_echo(monkeypatch, *args(data, out)).done().out
    assert latest(out) == 3
    assert not (out / "v0004").exists()


def test_new_files_go_on_in_the_version_they_fit(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = args(data, out, "sampling.seed=7")
    run_echo(monkeypatch, *args(data, out)).done()
    run_echo(monkeypatch, *second).done()
    write(data / "b.parquet", {"prompt": ["d"]})
    run_echo(monkeypatch, *second).done()
    assert (len(completions(out)), len(completions(out / "v0002"))) == (3, 4)
    run_echo(monkeypatch, *args(data, out)).done()
    assert len(completions(out)) == 4
    assert not (out / "v0003").exists()


def test_another_device_is_another_version(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only shows when the device is taken, too."""
    from pipeline.models.runtime import Runtime

    run_echo(monkeypatch, *args(data, out)).done()
    write(data / "b.parquet", {"prompt": ["d"]})
    here = Runtime.resolved
    monkeypatch.setattr(Runtime, "resolved", lambda self: here(self) | {"resolved.device": "cuda"})
    changed = run_echo(monkeypatch, *args(data, out)).done()
    assert 'made otherwise (resolved.device: "cpu" -> "cuda")' in changed.err
    assert (len(completions(out)), len(completions(out / "v0002"))) == (3, 4)
    assert run_json(out / "v0002")["fingerprint"]["resolved.device"] == "cuda"
    assert run_json(out)["files"][-1]["name"] == "a.parquet"


def test_a_version_that_was_only_begun_is_anybodys(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody was killed before its run.json."""
    run_echo(monkeypatch, *args(data, out)).done()
    open_job(load_config([*args(data, out), "sampling.seed=1"])).announce()
    assert [path.name for path in (out / "versions").iterdir()] == ["v0002.json"]
    run_echo(monkeypatch, *args(data, out, "sampling.seed=2")).done()
    assert run_json(out / "v0002")["fingerprint"]["sampling.seed"] == 2
    assert latest(out) == 2


def test_versions_may_be_removed(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not the last leaves its number empty; the last is made anew under its own."""
    for seed in range(3):
        run_echo(monkeypatch, *args(data, out, f"sampling.seed={seed}")).done()
    shutil.rmtree(out / "v0002")
    run_echo(monkeypatch, *args(data, out, "sampling.seed=1")).done()
    assert not (out / "v0002").exists()
    assert run_json(out / "v0004")["fingerprint"]["sampling.seed"] == 1
    shutil.rmtree(out / "v0004")
    run_echo(monkeypatch, *args(data, out, "sampling.seed=9")).done()
    assert run_json(out / "v0004")["fingerprint"]["sampling.seed"] == 9
    assert json.loads((out / "latest.json").read_text())["run_id"] == run_json(out / "v0004")["run_id"]
    assert completions(out / "latest") == list("abc")


def test_settings_that_are_refused_begin_nothing(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_echo(monkeypatch, *args(data, out)).done()
    assert "task.system is set, but" in run_echo(monkeypatch, *args(data, out, "task.system=x")).err
    assert not (out / "versions").exists()


def test_the_commands_beside_the_run_know_the_version(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = args(data, out, "sampling.seed=7", "sampling.logprobs=true")
    run_echo(monkeypatch, *args(data, out)).done()
    before = disk_state(out)
    assert call(status.main, *second).out == f"{out / 'v0002'}: not begun, 3 rows to do\n"
    assert json.loads(run_echo(monkeypatch, *second, "dry_run=true").done().out)["chunks_left"] == 2
    assert disk_state(out) == before, "looking begins nothing"
    run_echo(monkeypatch, *second).done()
    assert call(status.main, *second).done().out == f"{out / 'v0002'}: 3 of 3 rows done, 0 errors\n"
    assert call(verify.main, *second).done().out.startswith(f"{out / 'v0002'}: 3 rows")
    assert f"note: version 2 is beside it, in {out / 'v0002'}" in call(verify.main, str(out)).done().out
    call(merge.main, *second, "--rows=10").done()
    assert (out / "v0002" / "merged").is_dir() and not (out / "merged").exists()


def test_all_who_start_at_once_agree(data: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*args(data, "x", *place.args()), "sampling.logprobs=true"]
    run_echo(monkeypatch, *command).done()
    settings = [load_config([*command, f"sampling.seed={seed}"]) for seed in (1, 2)]
    together = Barrier(6, timeout=60)

    def begin(job: Job) -> int:
        if together.n_waiting < 6 and not together.broken:
            with suppress(BrokenBarrierError):
                together.wait(0.5)
        with job.output.claims() as claims:
            job.start(claims, {"resolved.device": "cpu"}, {}, {})
        return job.version

    with ThreadPoolExecutor(6) as pool:
        began = list(pool.map(lambda n: (n % 2, with_job(settings[n % 2], begin)), range(6)))
    assert len(set(began)) == 2, began
    assert {version for _, version in began} == {2, 3}
    files = place.files()
    for which, version in set(began):
        run = json.loads(files[f"v{version:04d}/run.json"])
        assert run["fingerprint"]["sampling.seed"] == which + 1
    assert json.loads(files["latest.json"])["version"] == 1, "nothing of the others is done"


def test_other_libraries_are_told_and_marked(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no reason to refuse."""
    command = args(data, out, "output.on_change=refuse")
    run_echo(monkeypatch, *command).done()
    run = run_json(out)
    now = run["informational"]["versions.torch"]
    run["informational"]["versions.torch"] = "2.0"
    put_run_json(out, run)
    quiet = run_echo(monkeypatch, *command).done()
    assert "libraries" not in quiet.err, "nothing is computed with them"
    write(data / "b.parquet", {"prompt": ["d"]})
    told = run_echo(monkeypatch, *command).done()
    assert f"libraries have changed since the run began (torch 2.0 -> {now})" in told.err
    assert run_json(out)["informational"]["other_versions"] == [f"torch 2.0 -> {now}"]
    assert run_json(out)["informational"]["versions.torch"] == "2.0"


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_version(data: Path, out: Path) -> None:
    """Real ones, and then two as one run."""
    write(data / "many.parquet", {"prompt": [f"row {n}" for n in range(40)]})
    for settings in ([], ["sampling.seed=1"]):
        processes = [
            start(*args(data, out, "sampling.max_new_tokens=4", "shard.wait_s=60", *settings)) for _ in range(3)
        ]
        assert [ended(process).code for process in processes] == [0, 0, 0]
    ended(start(*args(data, out, "sampling.max_new_tokens=5", "launcher.processes=2"))).done()
    assert [path.name for path in sorted((out / "versions").iterdir())] == ["v0002.json", "v0003.json"]
    for folder in (out, out / "v0002", out / "v0003"):
        call(verify.main, str(folder)).done()
    assert latest(out) == 3
    shutil.rmtree(out / "v0002")
    assert isinstance(pq.read_table(out / "latest" / "results"), pa.Table)
