"""Datasets saved by `datasets`, compared with `datasets` itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from reading import read_all, registered, rows_of

from pipeline.data import hub
from pipeline.data.hub import HubAsked, HubSource
from pipeline.data.source import Chunk, chunks_of
from pipeline.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def dataset(rows: int = 2500) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "id": range(rows),
            "text": [f"text {n}" if n % 5 else None for n in range(rows)],
            "tags": [["t"] * (n % 3) for n in range(rows)],
            "label": [n % 2 for n in range(rows)],
        },
        features=datasets.Features(
            {
                "id": datasets.Value("int64"),
                "text": datasets.Value("string"),
                "tags": datasets.List(datasets.Value("string")),
                "label": datasets.ClassLabel(names=["no", "yes"]),
            }
        ),
    )


def save_indexed(folder: Path, rows: datasets.Dataset, order: list[int]) -> Path:
    """As older versions of `datasets` save a dataset that was filtered or shuffled: with its index."""
    rows.save_to_disk(str(folder), num_shards=3)
    table = pa.table({"indices": pa.array(order, pa.uint64())})
    with pa.OSFile(str(folder / "indices.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]}))
    return folder


@pytest.mark.parametrize("chunk_rows", [1, 333, 1000, 9999])
def test_a_saved_dataset_gives_its_rows_in_order_and_its_shards_as_files(tmp_path: Path, chunk_rows: int) -> None:
    saved = dataset(150 if chunk_rows == 1 else 2500)
    saved.save_to_disk(str(tmp_path / "d"), num_shards=3)
    source = HubSource(str(tmp_path / "d"))
    assert [file.name for file in source.find()] == [f"data-{n:05d}-of-00003.arrow" for n in range(3)]
    assert rows_of(source, chunk_rows) == list(saved)
    assert str(source.schema().field("label").type) == "int64"
    assert not source.schema().metadata


def test_chunks_come_in_any_order(tmp_path: Path) -> None:
    saved = dataset()
    saved.save_to_disk(str(tmp_path / "d"))
    source = HubSource(str(tmp_path / "d"), columns=["text", "id"])
    (file,) = registered(source)
    chunks = random.Random(1).sample(chunks_of(file, 170), 15)
    for chunk, rows in zip(chunks, source.read(file, chunks), strict=True):
        expected = saved.select(range(chunk.first_row, chunk.first_row + chunk.num_rows))
        assert rows.table.to_pydict() == {"text": list(expected["text"]), "id": list(expected["id"])}


def test_an_index_is_respected_as_one_file(tmp_path: Path) -> None:
    order = random.Random(3).choices(range(2500), k=1700)
    saved = dataset()
    source = HubSource(str(save_indexed(tmp_path / "d", saved, order)))
    (file,) = registered(source)
    assert (file.name, file.rows) == ("d", 1700)
    assert rows_of(source, 450) == list(saved.select(order))
    back = Chunk(file_ordinal=0, first_row=5, num_rows=7)
    far = Chunk(file_ordinal=0, first_row=1690, num_rows=10)
    parts = [rows.table["id"].to_pylist() for rows in source.read(file, [far, back])]
    assert parts == [order[1690:], order[5:12]]


def test_filtered_and_shuffled_datasets_as_saved_today(tmp_path: Path) -> None:
    saved = dataset().filter(lambda row: row["id"] % 3 == 0).shuffle(seed=5)
    saved.save_to_disk(str(tmp_path / "d"), num_shards=2)
    assert rows_of(HubSource(str(tmp_path / "d")), 100) == list(saved)


def test_a_split_of_a_dictionary(tmp_path: Path) -> None:
    splits = {"train": dataset(20), "test": dataset(7)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    for split, rows in splits.items():
        assert rows_of(HubSource(str(tmp_path / "d"), asked=HubAsked(split=split))) == list(rows)
    for split in (None, "dev"):
        with pytest.raises(ConfigError, match=r"data\.split is .*, and the splits of .* are train, test; name one"):
            HubSource(str(tmp_path / "d"), asked=HubAsked(split=split)).find()
    datasets.DatasetDict({"only": dataset(3)}).save_to_disk(str(tmp_path / "one"))
    assert rows_of(HubSource(str(tmp_path / "one"))) == list(dataset(3))
    with pytest.raises(ConfigError, match=r"data\.split=train, but .* is saved without splits"):
        HubSource(str(tmp_path / "d" / "test"), asked=HubAsked(split="train")).find()


def test_an_empty_dataset_has_its_columns(tmp_path: Path) -> None:
    dataset(0).save_to_disk(str(tmp_path / "d"))
    table, _ = read_all(HubSource(str(tmp_path / "d")))
    assert (table.num_rows, table.column_names) == (0, ["id", "text", "tags", "label"])


def test_several_folders(tmp_path: Path) -> None:
    for name in ("b", "a"):
        dataset(3).save_to_disk(str(tmp_path / name))
    source = HubSource([str(tmp_path / "b"), str(tmp_path / "a")])
    assert sorted(Path(file.name).parent.name for file in source.find()) == ["a", "b"]
    assert rows_of(source) == list(dataset(3)) * 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "is no file or folder on this machine"),
        ("file", "is no file or folder|holds no dataset"),
        ("other folder", r"holds no dataset of save_to_disk \(state\.json is missing\)"),
        ("columns", r"data\.columns names nope, which .* does not have; its columns are id, text, tags, label"),
        ("cut", r"cannot be read \("),
    ],
)
def test_what_is_no_saved_dataset_is_one_sentence(tmp_path: Path, case: str, message: str) -> None:
    dataset(50).save_to_disk(str(tmp_path / "columns"))
    dataset(50).save_to_disk(str(tmp_path / "cut"))
    shard = tmp_path / "cut" / "data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:100])
    (tmp_path / "other folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=message) as error:
        HubSource(str(tmp_path / case), columns=["nope"] if case == "columns" else None).find()
    assert "\n" not in str(error.value)


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    dataset(50).save_to_disk(str(tmp_path / "d"))
    source = HubSource(str(tmp_path / "d"))
    (file,) = registered(source)
    dataset(51).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="is not the registered file any more"):
        next(iter(source.read(file, chunks_of(file, 10))))


def test_a_hub_id_is_read_from_the_files_that_datasets_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    dataset(30).to_parquet(str(tmp_path / "files" / "train.parquet"))
    dataset(9).to_parquet(str(tmp_path / "files" / "test.parquet"))
    asked: list[Any] = []
    original = datasets.load_dataset_builder

    def local(path: str, name: str | None, revision: str | None) -> Any:
        asked.append((path, name, revision))
        return original(str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    source = HubSource("org/data", asked=HubAsked(name="default", split="test", revision="v1"))
    assert rows_of(source, 4) == list(dataset(9))
    assert asked == [("org/data", "default", "v1")] * 2
    with pytest.raises(ConfigError, match=r"the splits of org/data are (train, test|test, train); name one"):
        HubSource("org/data").find()


def test_a_hub_id_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ConfigError, match=r"data\.path org/data is no folder .* \(Couldn't reach .*\); check") as error:
        HubSource("org/data").find()
    assert "\n" not in str(error.value)
    assert hub.prepared_files.__doc__
