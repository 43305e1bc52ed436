"""Object stores and networks at their worst: lost answers, stores that replace, wrong addresses, told credentials."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from stores import BUCKET, KEY, SECRET, Place, Request, S3Server, s3_place

from pipeline.data.source import Chunk
from pipeline.errors import ConfigError, RunFailed
from pipeline.output import remote
from pipeline.output.open import open_store
from pipeline.output.remote import RemoteStore
from pipeline.output.sink import Sink

NAME = "results/part.bin"


@pytest.fixture
def here(s3: S3Server, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A place of its own on the S3 server, whose faults end with the test."""
    with s3.failing(None):
        yield s3_place(s3, f"{request.node.name.partition('[')[0]}-{time.monotonic_ns()}")


def uploads(place: Place) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and request.path.endswith(NAME)


# Answers that get lost


def test_an_upload_whose_answer_was_lost_is_ours(s3: S3Server, here: Place) -> None:
    """It is carried out, the connection ends, the library tries again and is told that the name is taken."""
    lost: list[str] = []

    def lose_the_first_answer(request: Request) -> Sequence[bytes] | None:
        answer = request.carry_out()
        if uploads(here)(request) and not lost:
            lost.append(request.path)
            return None
        return answer

    store = here.store()
    s3.fault = lose_the_first_answer
    assert store.create(NAME, b"mine")
    assert lost
    assert s3.requests.count(("PUT", lost[0])) == 2, "the library under us tried again"
    assert not here.store().create(NAME, b"other")
    assert here.files() == {NAME: b"mine"}


def test_an_upload_that_was_overtaken_while_its_answer_was_lost_is_not_ours(s3: S3Server, here: Place) -> None:
    def overtaken(request: Request) -> Sequence[bytes] | None:
        if not uploads(here)(request):
            return request.carry_out()
        s3.fault = None
        here.put(NAME, b"other")
        return None

    store = here.store()
    s3.fault = overtaken
    assert not store.create(NAME, b"mine")
    assert here.files() == {NAME: b"other"}


def test_a_server_error_after_the_upload_is_found_out(s3: S3Server, here: Place) -> None:
    def fail_late(request: Request) -> Sequence[bytes] | None:
        if uploads(here)(request):
            here.put_many({NAME: b"mine"})
            return request.refuse(403, "AccessDenied")
        return request.carry_out()

    store = here.store()
    s3.fault = fail_late
    assert store.create(NAME, b"mine")


def test_an_upload_that_failed_is_an_error_and_leaves_nothing(s3: S3Server, here: Place) -> None:
    store = here.store()
    s3.fault = lambda request: request.refuse(403, "AccessDenied") if uploads(here)(request) else request.carry_out()
    with pytest.raises(OSError, match="AccessDenied by the test"):
        store.create(NAME, b"mine")
    with pytest.raises(OSError, match="AccessDenied by the test"):
        store.replace(NAME, b"mine")
    s3.fault = None
    assert here.files() == {}


@pytest.mark.parametrize(("status", "code"), [(409, "ConditionalRequestConflict"), (409, "OperationAborted")])
def test_two_requests_that_met_are_tried_again(s3: S3Server, here: Place, status: int, code: str) -> None:
    refused: list[int] = []

    def meet(request: Request) -> Sequence[bytes] | None:
        if uploads(here)(request) and len(refused) < 2:
            refused.append(1)
            return request.refuse(status, code)
        return request.carry_out()

    store = here.store()
    s3.fault = meet
    assert store.create(NAME, b"mine")
    assert len(refused) == 2
    assert here.files() == {NAME: b"mine"}


def test_a_name_that_was_freed_meanwhile_is_tried_again(s3: S3Server, here: Place) -> None:
    here.put(NAME, b"other")

    def remove_when_found_taken(request: Request) -> Sequence[bytes] | None:
        answer = request.carry_out()
        if uploads(here)(request):
            s3.fault = None
            here.remove(NAME)
        return answer

    store = here.store()
    s3.fault = remove_when_found_taken
    assert store.create(NAME, b"mine")
    assert here.files() == {NAME: b"mine"}


def test_a_store_that_does_not_say_which_condition_failed_is_understood(s3: S3Server, here: Place) -> None:
    """S3 names the condition; others say 412 without it, which s3fs does not take for FileExistsError."""

    def terse(request: Request) -> Sequence[bytes] | None:
        taken = uploads(here)(request) and request.environ.get("HTTP_IF_NONE_MATCH") and NAME in here.files()
        return request.refuse(412, "PreconditionFailed") if taken else request.carry_out()

    one, other = here.store(), here.store()
    assert one.create(NAME, b"first")
    s3.fault = terse
    assert not other.create(NAME, b"second")
    assert here.files() == {NAME: b"first"}


# Stores that cannot do it


def test_a_store_that_replaces_although_asked_not_to_is_refused(s3: S3Server, here: Place) -> None:
    def ignorant(request: Request) -> Sequence[bytes] | None:
        request.environ.pop("HTTP_IF_NONE_MATCH", None)
        return request.carry_out()

    store = here.store()
    store.prepare()
    s3.fault = ignorant
    with pytest.raises(
        ConfigError, match=rf"output\.dir {here.url} is in a store that lets an upload replace"
    ) as error:
        store.prepare()
    assert "\n" not in str(error.value)
    assert here.files() == {}


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "sftp://host/x", "https://host/x", "hf://datasets/a/b", "simplecache::s3://b/x", "nosuch://x"],
)
def test_other_file_systems_are_refused_by_name(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: pytest.fail("it is asked"))
    with pytest.raises(ConfigError, match=r"output\.dir .*; use s3://, .* or a local folder"):
        open_store(url, {})


@pytest.mark.parametrize("path", ["s3:/bucket/x", "gs:bucket", "az:/x", "memory:x"])
def test_a_mistyped_url_is_no_local_folder(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"output\.dir={path} .*; write {path.partition(':')[0]}://"):
        open_store(path, {})


def test_the_largest_upload_is_one_request(s3: S3Server, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 100 MiB s3fs by itself makes several, which not every store completes under a condition."""
    store = here.store()
    data = bytes(101 * 2**20)
    before = len(s3.requests)
    assert store.create(NAME, data)
    assert [method for method, _ in s3.requests[before:]] == ["PUT"]
    monkeypatch.setattr(remote, "S3_PUT_BYTES", 1000)
    with pytest.raises(OSError, match=r"1000 bytes are more than S3 takes in one request; .* smaller data\.chunk_rows"):
        store.create("results/other", bytes(1000))
    here.remove(NAME)


# What is said before the model is loaded


def started(url: str, options: dict[str, Any]) -> str:
    """What is said when a run begins there."""
    with pytest.raises(ConfigError) as error:
        open_store(url, options).prepare()
    message = str(error.value)
    assert "\n" not in message
    for secret in (KEY, SECRET):
        assert secret not in message
    return message


def test_a_missing_bucket(s3: S3Server) -> None:
    message = started("s3://nosuchbucket/x", s3.options)
    assert message == (
        "output.dir s3://nosuchbucket/x cannot be used (not found: The specified bucket does not exist); check the URL "
        "and output.storage_options"
    )
    with pytest.raises(ConfigError, match="The specified bucket does not exist"):
        open_store("s3://nosuchbucket/x", s3.options)
    assert "names no bucket" in started("s3://", s3.options)


def test_an_address_where_nobody_is(s3: S3Server) -> None:
    begun = time.monotonic()
    nobody = {**s3.options, "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}
    assert 'Could not connect to the endpoint URL: "http://127.0.0.1:1/' in started(f"s3://{BUCKET}/x", nobody)
    assert time.monotonic() - begun < 10


def test_a_store_that_does_not_answer(s3: S3Server, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CONTACT_S", 1.0)
    answering = threading.Event()

    def wait(request: Request) -> Sequence[bytes] | None:
        answering.wait(20)
        return request.carry_out()

    s3.fault = wait
    begun = time.monotonic()
    assert "no answer within 1 s" in started(here.url, here.options)
    assert time.monotonic() - begun < 5
    answering.set()


def test_an_upload_that_nobody_answers_is_tried_again(
    s3: S3Server, here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CALL_S", 1.0)
    store = here.store()
    ignored: list[str] = []
    answering = threading.Event()

    def ignore_the_first(request: Request) -> Sequence[bytes] | None:
        if uploads(here)(request) and not ignored:
            ignored.append(request.path)
            answering.wait(20)
            return None
        return request.carry_out()

    s3.fault = ignore_the_first
    begun = time.monotonic()
    assert store.create(NAME, b"mine")
    assert ignored
    assert time.monotonic() - begun < 10
    answering.set()


@pytest.mark.parametrize("refused", ["HEAD", "GET", "PUT", "DELETE"])
def test_missing_permissions(s3: S3Server, here: Place, refused: str) -> None:
    s3.fault = lambda r: r.refuse(403, "AccessDenied") if r.method == refused else r.carry_out()
    assert "cannot be used (" in started(here.url, here.options)


def test_unknown_options_and_told_secrets(s3: S3Server, here: Place) -> None:
    assert "nonsense" in started(here.url, {**here.options, "nonsense": 3})

    def tell(request: Request) -> Sequence[bytes] | None:
        return request.refuse(403, f"{KEY} with {SECRET}")

    s3.fault = lambda r: tell(r) if r.method == "PUT" else r.carry_out()
    assert "(redacted) with (redacted)" in started(here.url, here.options)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = started("gs://bucket/x", {})
    assert message.startswith("output.dir gs://bucket/x needs the package gcsfs, which cannot be imported (")
    assert message.endswith("; pip install gcsfs")


def test_credentials_in_a_url_are_not_shown() -> None:
    store = open_store("memory://user:hidden@bucket/x?sig=hidden", {})
    assert "hidden" not in store.shown("run.json")


# In the middle of a run


def test_a_store_that_goes_away_ends_the_run_in_one_sentence(s3: S3Server, here: Place) -> None:
    schema = pa.schema([("n", pa.int64())])
    out = Sink(here.store(), schema, "a1")
    table = pa.table({"n": [1]}, schema=schema)
    assert out.commit(Chunk(file_ordinal=0, first_row=0, num_rows=1), table, {})
    s3.fault = lambda r: r.refuse(403, f"{SECRET} has expired")
    for call in (lambda: out.commit(Chunk(file_ordinal=0, first_row=1, num_rows=1), table, {}), out.committed):
        with pytest.raises(RunFailed, match=r"s3://.* could not be written or read \(.*run the same command") as error:
            call()
        assert "\n" not in str(error.value)
        assert SECRET not in str(error.value)
    with pytest.raises(RunFailed, match=r"part-000000-000000000000\.parquet could not be read \("):
        out.totals(["000000-000000000000"])
    s3.fault = None
    assert out.commit(Chunk(file_ordinal=0, first_row=1, num_rows=1), table, {})


def test_local_outputs_do_not_know_of_any_of_this(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteStore, "__init__", lambda *_: pytest.fail("fsspec is asked"))
    for url in (f"file://{tmp_path}/x", f"local://{tmp_path}/x", f"{tmp_path}/x"):
        assert open_store(url, {}).shown() == f"{tmp_path}/x"
