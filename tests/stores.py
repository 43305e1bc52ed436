"""The kinds of places an output can be in, each with another way to look at it than the pipeline's own.

The S3 server is moto's, on this machine. Moto looks and then writes when an upload has a condition, so the
requests are let through one at a time, as a real store decides one at a time about a key. Faults of stores and
networks are made at the same door.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.output.open import open_store
from pipeline.output.store import Store

BUCKET = "bucket"
KEY, SECRET = "AKIAHIDDENKEY", "hidden-secret-of-the-store"
Environment = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A request at the door of a store, and what can become of it."""

    environ: Environment
    carry_out: Callable[[], Sequence[bytes]]
    refuse: Callable[[int, str], Sequence[bytes]]
    """Answer with a status and a code of S3."""

    @property
    def method(self) -> str:
        return str(self.environ["REQUEST_METHOD"])

    @property
    def path(self) -> str:
        return str(self.environ["PATH_INFO"])


Fault = Callable[[Request], Sequence[bytes] | None]
"""What a store or network does with a request; None instead of an answer ends the connection without one."""


@dataclass
class S3Server:
    """An S3 server on this machine."""

    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and key of every request."""
    fault: Fault | None = None
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, Any]:
        return {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": self.url, "region_name": "us-east-1"}}

    @cached_property
    def client(self) -> Any:
        """boto3's view of it, which has nothing to do with fsspec."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET
        )

    def files(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by the rest of its key."""
        client = self.client
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        found = {}
        for key in keys:
            try:
                body = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            except client.exceptions.NoSuchKey:  # removed since the listing
                continue
            found[key.removeprefix(prefix + "/")] = body
        return found

    def names(self, prefix: str) -> list[str]:
        """The keys below a prefix, without it, in order."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/")
        return [e["Key"].removeprefix(prefix + "/") for page in pages for e in page.get("Contents", [])]

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def put_many(self, objects: dict[str, bytes]) -> None:
        """Past the server's door, which takes 10 ms for each."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        for key, content in objects.items():
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(BUCKET, key, content)

    def age(self, key: str, seconds: float) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].get_object(BUCKET, key).last_modified -= timedelta(seconds=seconds)

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    @contextmanager
    def failing(self, fault: Fault | None) -> Iterator[None]:
        """A fault while the context lasts; the fault may also be set in it."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def application(self, moto: Callable[..., Any]) -> Callable[..., Any]:
        """Moto's WSGI application behind the door."""

        def serve(environ: Environment, start_response: Callable[..., Any]) -> Any:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))

            def carry_out() -> Sequence[bytes]:
                with self._one_at_a_time:
                    return list(moto(environ, start_response))

            def refuse(status: int, code: str) -> Sequence[bytes]:
                content = f"<Error><Code>{code}</Code><Message>{code} by the test</Message></Error>".encode()
                headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
                start_response(f"{status} {code}", headers)
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

            if self.fault is None:
                return carry_out()
            answer = self.fault(Request(environ, carry_out, refuse))
            if answer is None:
                raise ConnectionAbortedError("the network is gone")
            return answer

        return serve


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running server with an empty bucket."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        def log(self, *_: Any) -> None:
            pass

        def log_request(self, *_: Any) -> None:
            pass

        def connection_dropped(self, *_: Any) -> None:
            self.close_connection = True

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = S3Server()
    app = server.application(DomainDispatcherApplication(create_backend_app))
    running = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
    server.port = running.server_port
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    server.client.create_bucket(Bucket=BUCKET)
    try:
        yield server
    finally:
        running.shutdown()
        thread.join()


@dataclass(frozen=True)
class Place:
    """Somewhere an output can be."""

    url: str
    options: dict[str, Any]
    files: Callable[[], dict[str, bytes]]
    """What is there, by name, seen from outside."""
    put: Callable[[str, bytes], None]
    remove: Callable[[str], None]
    is_local: bool = False
    is_shared: bool = True
    """Whether other processes see it."""
    put_many: Callable[[dict[str, bytes]], None] = field(kw_only=True)
    age: Callable[[str, float], None] = field(kw_only=True)
    """Make a file so many seconds older than it is."""

    def store(self) -> Store:
        """The pipeline's view, a new one for each call."""
        return open_store(self.url, self.options)

    def args(self) -> list[str]:
        """The command line that sends an output here."""
        return [f"output.dir={self.url}", *_overrides("output.storage_options", self.options)]


def _overrides(key: str, values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _overrides(f"{key}.{name}", value)
        else:
            yield f"{key}.{name}={value}"


def local_place(root: Path) -> Place:
    def files() -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def put(name: str, content: bytes) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    def put_many(contents: dict[str, bytes]) -> None:
        for name, content in contents.items():
            put(name, content)

    def age(name: str, seconds: float) -> None:
        os.utime(root / name, ((root / name).stat().st_mtime - seconds,) * 2)

    return Place(
        str(root), {}, files, put, lambda name: (root / name).unlink(), is_local=True, put_many=put_many, age=age
    )


def memory_place(folder: str) -> Place:
    import fsspec

    fs = fsspec.filesystem("memory")
    root = f"/{folder}/"

    def files() -> dict[str, bytes]:
        return {key.removeprefix(root): fs.cat_file(key) for key in list(fs.store) if key.startswith(root)}

    def age(name: str, seconds: float) -> None:
        fs.store[root + name].modified -= timedelta(seconds=seconds)

    return Place(
        f"memory:/{root[:-1]}",
        {},
        files,
        lambda name, content: fs.pipe_file(root + name, content),
        lambda name: fs.rm_file(root + name),
        is_shared=False,
        put_many=lambda contents: fs.pipe({root + name: content for name, content in contents.items()}),
        age=age,
    )


def s3_place(server: S3Server, folder: str) -> Place:
    return Place(
        f"s3://{BUCKET}/{folder}",
        server.options,
        lambda: server.files(folder),
        lambda name, content: server.put(f"{folder}/{name}", content),
        lambda name: server.remove(f"{folder}/{name}"),
        put_many=lambda contents: server.put_many({f"{folder}/{name}": c for name, c in contents.items()}),
        age=lambda name, seconds: server.age(f"{folder}/{name}", seconds),
    )


def store_from_environment() -> Store:
    """The store that a test has told this process of (`store_environment`)."""
    return open_store(os.environ["STORE_URL"], json.loads(os.environ["STORE_OPTIONS"]))


def store_environment(place: Place, *more_paths: Path) -> dict[str, str]:
    """A child's environment: where the store is, and how to import this folder and others."""
    paths = os.pathsep.join(map(str, (*more_paths, Path(__file__).parent, Path(__file__).parents[1])))
    return {**os.environ, "PYTHONPATH": paths, "STORE_URL": place.url, "STORE_OPTIONS": json.dumps(place.options)}
