"""The commands beside a run: what is done of it, and its Parts as fewer files."""

from __future__ import annotations

import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import disk_state, parts, results, run_here, write

from pipeline import merge, status

NUM_ROWS = 23


def args(model: Path, data: Path, out: Path) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none",
        "data.chunk_rows=5", "sampling.max_new_tokens=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of 23 rows in 5 Parts, and its command; one of the rows is an error."""
    folder = tmp_path_factory.mktemp("done")
    texts = [f"row {i}" for i in range(NUM_ROWS)]
    texts[3] = None  # type: ignore[call-overload]
    data = write(folder / "in" / "a.parquet", {"prompt": pa.array(texts, pa.string())})
    command = args(small_model, data.parent, folder / "out")
    run_here(*command).done()
    return folder / "out", command


def said(main: object, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(list(arguments))  # type: ignore[operator]
    out, err = capsys.readouterr()
    return code, out, err


def test_a_finished_run_in_one_line(done: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    out, command = done
    before = disk_state(out)
    assert said(status.main, *command, capsys=capsys) == (0, f"{out}: 23 of 23 rows done, 1 errors\n", "")
    code, line, _ = said(status.main, *command, "--since", str(time.time()), capsys=capsys)
    assert (code, line) == (0, f"{out}: 23 of 23 rows done, 1 errors, 0 rows new\n")
    code, line, _ = said(status.main, *command, "--since", str(time.time() - 3600), capsys=capsys)
    assert line.endswith("23 rows new\n")
    assert said(status.main, *command, "max_error_rate=0.01", capsys=capsys)[0] == 3
    assert disk_state(out) == before


def test_what_is_not_done(
    done: tuple[Path, list[str]], small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = done
    other = [*command[:3], f"output.dir={tmp_path / 'none'}", *command[4:]]
    assert said(status.main, *other, capsys=capsys) == (75, f"{tmp_path / 'none'}: not begun, 23 rows to do\n", "")
    assert not (tmp_path / "none").exists()
    data = out.parent / "in" / "b.parquet"
    write(data, {"prompt": ["new 1", "new 2"]})
    try:
        code, line, _ = said(status.main, *command, capsys=capsys)
        assert code == 75
        assert line == f"{out}: 23 of 25 rows done, 1 errors, 1 of 6 chunks left, 0 of them in work\n"
        assert said(merge.main, *command, "--rows=10", capsys=capsys)[0] == 75
    finally:
        data.unlink()


def test_a_damaged_part_is_found(
    done: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = done
    part = parts(out)[1]
    kept = part.read_bytes()
    try:
        part.write_bytes(kept[:-100])
        code, _, err = said(status.main, *command, capsys=capsys)
        assert code == 1 and part.name in err
        metadata = pq.read_schema(parts(out)[0]).metadata
        pq.write_table(pq.read_table(parts(out)[0]).slice(0, 3).replace_schema_metadata(metadata), part)
        code, _, err = said(status.main, *command, capsys=capsys)
        assert code == 1, "a Part of another chunk, or with rows missing"
    finally:
        part.write_bytes(kept)


@pytest.mark.parametrize(("rows", "sizes"), [(10, [10, 10, 3]), (23, [23]), (1000, [23]), (1, [1] * 23)])
def test_merged_files_hold_the_same_rows_in_order(
    rows: int, sizes: list[int], done: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = done
    target = tmp_path / "merged"
    assert said(merge.main, *command, f"--rows={rows}", f"--to={target}", capsys=capsys)[0] == 0
    files = sorted(target.iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == sizes
    assert pa.concat_tables([pq.read_table(file) for file in files]).equals(results(out))
    both = f"from '{target}/*.parquet' except all from '{out}/results/*.parquet'"
    assert duckdb.sql(both).fetchall() == []
    told = {key.decode() for file in files for key in pq.read_metadata(file).metadata if key.startswith(b"pipeline.")}
    assert told == {"pipeline.run_id", "pipeline.fingerprint"}, "of the run, nothing of one of its Parts"
    assert list(tmp_path.iterdir()) == [target], "nothing half-made is left"


def test_a_merge_replaces_the_one_before_and_nothing_else(
    done: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command = done
    for rows, count in ((5, 5), (20, 2)):
        assert said(merge.main, *command, f"--rows={rows}", f"--to={tmp_path / 'm'}", capsys=capsys)[0] == 0
        assert len(list((tmp_path / "m").iterdir())) == count
    (tmp_path / "m" / "mine.txt").write_text("x")
    code, _, err = said(merge.main, *command, "--rows=5", f"--to={tmp_path / 'm'}", capsys=capsys)
    assert code == 2 and "holds other files" in err
    assert len(list((tmp_path / "m").iterdir())) == 3
    assert said(merge.main, *command, "--rows=0", capsys=capsys)[0] == 2


def test_a_dataset_without_rows_is_merged_too(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "in.parquet", {"prompt": pa.array([], pa.string())})
    command = args(small_model, data, tmp_path / "out")
    run_here(*command).done()
    assert said(status.main, *command, capsys=capsys)[:2] == (0, f"{tmp_path / 'out'}: 0 of 0 rows done, 0 errors\n")
    assert said(merge.main, *command, "--rows=5", capsys=capsys)[0] == 0
    merged = pq.read_table(tmp_path / "out" / "merged" / "merged-000000.parquet")
    assert merged.equals(results(tmp_path / "out"))
