"""pipeline.verify finds every kind of damage to an output, says of lost inputs, and answers rows again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Ended, call, disk_state, label_args, parts, put_run_json, run_here, run_json, write
from stores import Place

from pipeline import verify

NUM_ROWS = 23


def args(model: Path, data: Path, out: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none",
        "data.chunk_rows=5", "sampling.max_new_tokens=3", "sampling.temperature=1.0", "engine.slots=8",
    ]  # fmt: skip


def verified(*arguments: str | Path) -> Ended:
    return call(verify.main, *map(str, arguments))


@pytest.fixture(scope="module")
def finished(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of 23 rows in 5 Parts of two files with NaN, nulls and an error row, made with several answers a row."""
    folder = tmp_path_factory.mktemp("finished")
    for name, rows in (("a", 13), ("b", 10)):
        texts = [None if i == 3 else f"{name} row {i}" for i in range(rows)]
        columns = {"prompt": pa.array(texts, pa.string()), "x": [float("nan")] * rows}
        write(folder / "in" / f"{name}.parquet", columns)
    command = [*args(small_model, folder / "in", str(folder / "out")), "sampling.n=2", "sampling.logprobs=2"]
    run_here(*command).done()
    return folder, command


@pytest.fixture
def copy(finished: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """The run's output, to be damaged."""
    return Path(shutil.copytree(finished[0] / "out", tmp_path / "out"))


def test_a_whole_output_is_found_whole_and_stays_as_it_is(finished: tuple[Path, list[str]]) -> None:
    folder, command = finished
    before = disk_state(folder)
    line = f"{folder / 'out'}: 23 rows in 5 of 5 parts, nothing wrong\n"
    assert verified(folder / "out").done().out == line
    assert verified(*command).done().out == line, "by the command line of the run"
    assert disk_state(folder) == before


def test_what_is_no_output_is_refused(tmp_path: Path, copy: Path) -> None:
    assert "is no output of a run: it has no run.json" in verified(tmp_path / "none").refusal()
    (copy / "run.json").unlink()
    assert "results, but no run.json" in verified(copy).refusal()
    assert not (tmp_path / "none").exists()


def flip(part: Path, at: int = 40, bit: int = 1) -> None:
    content = bytearray(part.read_bytes())
    content[at] ^= bit  # by default in the first page
    part.write_bytes(content)


def replace_in(part: Path, old: bytes, new: bytes) -> None:
    """Other bytes of the same length in the footer."""
    before, found, after = part.read_bytes().rpartition(old)
    assert found and len(old) == len(new)
    part.write_bytes(before + new + after)


def rewrite(part: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The Part with other rows, and its footer's own words but the footer's hash, as older versions wrote it."""
    with pq.ParquetFile(part) as file:
        table, said = change(file.read()), file.metadata.metadata
    rewritten(part, table, {key: said[key] for key in (b"pipeline.counts", b"pipeline.attempt", b"pipeline.pages")})


def rewritten(where: Any, table: pa.Table, said: dict[bytes, bytes]) -> None:
    named = {key: value for key, value in table.schema.metadata.items() if key in RUN_KEYS}
    with pq.ParquetWriter(where, table.schema.with_metadata(named)) as writer:
        writer.write_table(table.replace_schema_metadata(named))
        writer.add_key_value_metadata(said)


RUN_KEYS = (b"pipeline.run_id", b"pipeline.fingerprint")


def column(name: str, values: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        field = table.schema.field(at)
        return table.set_column(at, field, pa.array(values(table[name].to_pylist()), field.type))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), r"is missing: rows 5 to 9 of a.parquet"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-50]), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "a bit": (flip, "cannot be read"),
    "a row less": (lambda p: rewrite(p, lambda t: t.slice(0, 4)), "holds 4 rows in row groups of [4]"),
    "a row twice": (
        lambda p: rewrite(p, lambda t: pa.concat_tables([t.slice(0, 1), t.slice(0, 1), t.slice(2)])),
        "row 1 is 000000-000000000005, and should be 000000-000000000006",
    ),
    "other schema": (lambda p: rewrite(p, lambda t: t.drop_columns(["error"])), "has the columns prompt: string"),
    "counts": (lambda p: rewrite(p, column("prompt_tokens", lambda v: [9, *v[1:]])), "committed with prompt_tokens="),
    "reason": (lambda p: rewrite(p, column("finish_reason", lambda v: ["x", *v[1:]])), "finish_reason x"),
    "an answer": (lambda p: rewrite(p, column("completion", lambda v: ["?", *v[1:]])), "has other bytes than were"),
    "a bit between pages": (lambda p: flip(p, 20), "has other bytes than were committed"),
    "a statistic": (lambda p: replace_in(p, b"a row 9", b"a row 7"), "has another footer than was committed"),
    "the footer's hash": (
        lambda p: replace_in(p, b"pipeline.footer", b"pipeline.fooler"),
        "has pipeline.fooler in its",
    ),
    "a flag": (lambda p: flip(p, -9), "has another footer than was committed"),
    "error": (lambda p: rewrite(p, column("finish_reason", lambda v: ["error", *v[1:]])), "error without an error"),
    "other input": (lambda p: rewrite(p, column("prompt", lambda v: ["?", *v[1:]])), "holds other rows than"),
    "another chunk's": (lambda p: shutil.copy(parts(p.parents[1])[0], p), "should be 000000-000000000005"),
    "a file more": (lambda p: shutil.copy(p, p.with_name("extra.parquet")), "is no Part of a chunk"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(kind: str, copy: Path) -> None:
    damage, said = DAMAGES[kind]
    damage(parts(copy)[1])
    found = verified(copy)
    assert found.code == 1, found.out
    assert said in found.out and "wrong: " in found.out
    assert "Traceback" not in found.err


def test_parts_of_an_older_version_are_found_whole(copy: Path) -> None:
    """Without a hash of their footer; what else they say is looked at."""
    for part in parts(copy):
        rewrite(part, lambda table: table)
        with pq.ParquetFile(part) as file:
            said = file.metadata.metadata
        content = part.read_bytes()
        before = content[: -8 - int.from_bytes(content[-8:-4], "little")]
        pages = hashlib.blake2b(before, digest_size=32).hexdigest()
        part.write_bytes(content.replace(said[b"pipeline.pages"], pages.encode()))
    verified(copy, "--replay=5").done()


def test_what_cannot_be_read_is_not_answered_again(copy: Path) -> None:
    for number, kind in enumerate(("a row less", "a statistic", "cut")):
        DAMAGES[kind][0](parts(copy)[number])
    found = verified(copy, "--replay=100")
    assert found.code == 1 and "Traceback" not in found.err
    assert "note: 10 rows were answered again" in found.out


@pytest.mark.parametrize("change", [('"chunk_rows": 5', '"chunk_rows": 6'), ('"rows": 13', '"rows": 12'), ("}", "")])
def test_a_damaged_run_json_is_refused_by_everybody(
    finished: tuple[Path, list[str]], copy: Path, change: tuple[str, str]
) -> None:
    """Else a run would go on with other chunks, whose rows are there already, or without some rows."""
    text = (copy / "run.json").read_text()
    assert change[0] in text
    (copy / "run.json").write_text(text.replace(change[0], change[1], 1))
    assert "has a run.json that cannot be read" in verified(copy).refusal()
    before = disk_state(copy)
    assert "run.json that cannot be read" in run_here(*finished[1], f"output.dir={copy}").refusal()
    assert disk_state(copy) == before


def test_a_part_of_another_run_and_a_false_summary_are_found(copy: Path) -> None:
    changed = run_json(copy)
    changed["summary"]["rows"] = 24
    changed["run_id"] = "0" * 32
    put_run_json(copy, changed)
    out = verified(copy, "--first=3").out
    assert "says pipeline.run_id=" in out
    assert out.splitlines()[3].startswith("wrong: 3 more (--first 6"), out
    assert "run.json says rows=24 of all Parts, and they have 23" in verified(copy).out


def test_inputs_that_are_gone_are_said_and_changed_ones_are_wrong(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(finished[0], folder)
    (folder / "in" / "b.parquet").unlink()
    found = verified(folder / "out", f"data.path={folder / 'in'}").done()
    assert f"note: {finished[0] / 'in' / 'b.parquet'} is gone" in found.out
    write(folder / "in" / "a.parquet", {"prompt": ["new"], "x": [0.5]})
    found = verified(folder / "out", f"data.path={folder / 'in'}")
    assert found.code == 1 and "a.parquet is not the file that was registered" in found.out
    found = verified(folder / "out", f"data.path={folder / 'nowhere'}").done()
    assert "note: the input was not compared: data.path" in found.out


def test_an_input_whose_rows_cannot_be_read_any_more_is_wrong(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Its footer, by which it is known, is whole."""
    folder = shutil.copytree(finished[0], tmp_path / "moved")
    flip(folder / "in" / "a.parquet", 4, 0xFF)  # the header of the first page
    found = verified(folder / "out", f"data.path={folder / 'in'}")
    assert found.code == 1 and f"data.path {folder / 'in' / 'a.parquet'}: row group 0, column prompt," in found.out
    assert "wrong: not all rows could be compared: " in found.out and found.out.endswith("5 of 5 parts, 1 wrong\n")


def test_rows_are_answered_again_and_differences_told(
    finished: tuple[Path, list[str]], copy: Path, other_small_model: Path
) -> None:
    whole = verified(finished[0] / "out", "--replay=9", "--seed=3").done()
    assert "note: 9 rows were answered again" in whole.out
    changed = column("cumulative_logprob", lambda v: [v[0] + 1e-15 * abs(v[0]), *v[1:]])
    rewrite(parts(copy)[0], changed)
    found = verified(copy, "--replay=100")
    assert found.code == 1
    assert found.out.count("wrong: ") == 2, found.out
    assert "has other bytes than were committed" in found.out
    assert "row 000000-000000000000: cumulative_logprob was -" in found.out
    found = verified(copy, "--replay=1", f"model.path={other_small_model}")
    assert found.code == 1 and "no row could be answered again: " in found.out and "model.files" in found.out


def test_labels_lines_and_a_lost_prompt_file_are_answered_again(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "one"}\nno row\n{"text": null}\n{"text": "three \\u00e4"}\n')
    (tmp_path / "prompt.jinja").write_text("Say\n{{ text }}:")
    command = [*args(small_model, tmp_path / "in.jsonl", str(tmp_path / "out"))[:4], "quant=none", "data=jsonl"]
    command += [f"task.prompt_file={tmp_path / 'prompt.jinja'}", "data.chunk_rows=3", "output.row_group_rows=2"]
    run_here(*command, *label_args()).done()
    (tmp_path / "prompt.jinja").unlink()
    assert verified(tmp_path / "out", "--replay=4").done().out.endswith("4 rows in 2 of 2 parts, nothing wrong\n")


@pytest.mark.parametrize("rows", [0, 7])
def test_outputs_anywhere_and_without_rows(small_model: Path, tmp_path: Path, place: Place, rows: int) -> None:
    texts = [f"row {i}" for i in range(rows)]
    data = write(tmp_path / "in.parquet", {"prompt": pa.array(texts, pa.string())})
    run_here(*args(small_model, data, "x"), *place.args()).done()
    options = [argument for argument in place.args() if not argument.startswith("output.dir")]
    whole = verified(place.url, *options, "--replay=2").done()
    assert f"{rows} rows in {max(1, -(-rows // 5))} of" in whole.out
    assert ("note: 2 rows were answered again" in whole.out) == bool(rows)
    part = max(name for name in place.files() if name.startswith("results/"))
    place.remove(part)
    assert verified(place.url, *options).code == 1
