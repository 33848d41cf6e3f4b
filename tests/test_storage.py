"""Storage: one contract for a folder, an embedded S3 server and a real store; then what only S3 can do wrong.

Proven: objects appear whole or not at all, content is checked, creates are exclusive, names cannot escape,
interrupted answers are asked for again, and every failure is one line with a remedy and without a secret.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segcloud import storage
from segcloud.embedded_s3 import EmbeddedS3, _OneAtATime
from segcloud.storage import join, put, read

MIB = 2**20
KEYS_PER_PAGE = 20  # as tests/conftest.py starts the embedded server


def uris(prefix: str, **options: object) -> list[str]:
    return [
        info.uri.removeprefix(prefix.rstrip("/") + "/") for info in storage.list_objects(prefix, **options)
    ]


def bucket_and_key(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def flip_a_byte(uri: str) -> None:
    """Change the content behind the store's back: same size, same time, same metadata."""
    info, data = storage.stat(uri), bytearray(read(uri))
    data[0] ^= 1
    if storage.is_s3(uri):
        place = bucket_and_key(uri)
        storage.s3_client().put_object(
            **place, Body=bytes(data), Metadata={"sha256": info.metadata["sha256"]}
        )
    else:
        path, times = Path(uri), Path(uri).stat()
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# ---- The contract


def test_bytes_and_files_come_back(storage_uri: str, tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(b"voxels" * 1000)
    put(tmp_path / "scan", join(storage_uri, "a", "scan.nii.gz"))
    info = storage.fetch(join(storage_uri, "a/scan.nii.gz"), tmp_path / "new" / "folder" / "copy")
    assert (tmp_path / "new/folder/copy").read_bytes() == b"voxels" * 1000
    assert info == storage.stat(info.uri)
    assert info.size == 6000
    assert abs(info.modified.timestamp() - time.time()) < 3600


def test_an_empty_object_comes_back(storage_uri: str, tmp_path: Path) -> None:
    uri = join(storage_uri, "empty")
    assert put(b"", uri).size == 0
    assert read(uri) == b""
    storage.fetch(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_every_object_carries_its_sha256(storage_uri: str) -> None:
    info = put(b"abc", join(storage_uri, "x"), {"model": "1f", "sha256": "a lie"})
    assert info.metadata == {"model": "1f", "sha256": storage.sha256(b"abc")}


def test_any_text_is_kept_in_metadata(storage_uri: str) -> None:
    given = {"a-1": "Größe 5 µm — 100 %41", "b": " blanks  and\nlines ", "c": '="<&>;,+\\'}
    metadata = put(b"", join(storage_uri, "x"), given).metadata
    assert {name: metadata[name] for name in given} == given


@pytest.mark.parametrize(
    "metadata", [{"Model": "x"}, {"a_b": "x"}, {"": "x"}, {"put-id": "x"}, {"l": "é" * 400}]
)
def test_metadata_that_s3_cannot_keep_is_refused(storage_uri: str, metadata: dict[str, str]) -> None:
    with pytest.raises(storage.StorageError, match="metadata"):
        put(b"", join(storage_uri, "x"), metadata)
    assert storage.stat(join(storage_uri, "x")) is None


def test_a_listing_is_recursive_and_sorted_and_ends_at_the_folder(storage_uri: str) -> None:
    for key in ("im/b", "im/a-b", "im/a/2", "im/a/1", "im/é", "im2/x", "im.txt"):
        put(b"1", join(storage_uri, key))
    assert uris(join(storage_uri, "im")) == ["a-b", "a/1", "a/2", "b", "é"]
    assert uris(join(storage_uri, "im") + "/") == uris(join(storage_uri, "im"))


def test_a_listing_can_be_cut_to_suffixes(storage_uri: str) -> None:
    for key in ("a.nii", "a.nii.gz", "a.json"):
        put(b"1", join(storage_uri, key))
    assert uris(storage_uri, suffix=".nii.gz") == ["a.nii.gz"]
    assert uris(storage_uri, suffix=(".nii", ".nii.gz")) == ["a.nii", "a.nii.gz"]


def test_a_listing_of_one_object_is_that_object(storage_uri: str) -> None:
    uri = put(b"12", join(storage_uri, "one")).uri
    assert [(info.uri, info.size) for info in storage.list_objects(uri)] == [(uri, 2)]


def test_a_listing_and_stat_agree(storage_uri: str) -> None:
    info = put(b"12", join(storage_uri, "one"))
    (listed,) = storage.list_objects(storage_uri)
    assert (listed.uri, listed.size, listed.etag) == (info.uri, info.size, info.etag)


def test_nothing_is_none_or_an_error(storage_uri: str, tmp_path: Path) -> None:
    put(b"", join(storage_uri, "folder", "x"))
    for uri in (join(storage_uri, "absent"), join(storage_uri, "folder"), join(storage_uri, "folder/x/y")):
        assert storage.stat(uri) is None
    for operation in (read, storage.open_read, lambda uri: storage.fetch(uri, tmp_path / "copy")):
        with pytest.raises(storage.NotFoundError, match="absent"):
            operation(join(storage_uri, "absent"))


def test_ranges_follow_slices(storage_uri: str) -> None:
    uri = put(b"0123456789", join(storage_uri, "x")).uri
    assert read(uri, start=3) == b"3456789"
    assert read(uri, length=4) == b"0123"
    assert read(uri, start=8, length=100) == b"89"
    assert read(uri, start=0, length=0) == read(uri, start=50) == read(uri, start=10, length=5) == b""
    with pytest.raises(ValueError, match="negative"):
        read(uri, start=-1)


def test_a_stream_seeks_and_does_not_decompress(storage_uri: str) -> None:
    uri = put(b"0123456789", join(storage_uri, "not-really.gz")).uri
    with storage.open_read(uri) as stream:
        stream.seek(5)
        assert stream.read(2) == b"56"
        stream.seek(0)
        assert stream.read() == b"0123456789"


@pytest.mark.parametrize(
    "key", ["a b@c:d", "x?versionId=1", "u:p@h/x", "100%41#+&=", "ü/日本", "a[0-9]*", ".hidden"]
)
def test_a_key_means_what_it_says(storage_uri: str, tmp_path: Path, key: str) -> None:
    uri = put(b"content", join(storage_uri, key)).uri
    assert uris(storage_uri) == [key]
    with storage.open_read(uri) as stream:
        assert stream.read() == read(uri) == b"content"
    storage.fetch(uri, tmp_path / "copy")
    storage.delete(uri)
    assert storage.stat(uri) is None


@pytest.mark.parametrize(
    "part", ["..", "../x", "a/../x", "/etc", "", "a//b", ".", "a\x00b", "a\nb", "a/", "\udc80"]
)
def test_a_part_cannot_leave_the_prefix(storage_uri: str, part: str) -> None:
    with pytest.raises(storage.StorageError, match="not a name"):
        join(storage_uri, part)
    with pytest.raises(storage.StorageError, match="not a name"):
        join(storage_uri, "fine", part)


def test_a_flipped_byte_is_noticed_by_read(storage_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    uri = put(b"0123456789", join(storage_uri, "x")).uri
    flip_a_byte(uri)
    with pytest.raises(storage.CorruptError, match="sha256"):
        read(uri)


def test_a_flipped_byte_never_reaches_the_disk(storage_uri: str, tmp_path: Path) -> None:
    uri = put(b"0123456789", join(storage_uri, "x")).uri
    flip_a_byte(uri)
    with pytest.raises(storage.CorruptError, match="sha256"):
        storage.fetch(uri, tmp_path / "cache" / "copy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_digest_can_be_demanded(storage_uri: str, tmp_path: Path) -> None:
    uri = put(b"0123456789", join(storage_uri, "x")).uri
    storage.fetch(uri, tmp_path / "copy", sha256=storage.sha256(b"0123456789"))
    with pytest.raises(storage.CorruptError, match="sha256"):
        storage.fetch(uri, tmp_path / "copy", sha256=storage.sha256(b"other"))
    assert (tmp_path / "copy").read_bytes() == b"0123456789"  # the one before stays


def test_of_racing_creators_exactly_one_wins(storage_uri: str) -> None:
    def create(number: int) -> str | None:
        try:
            return put(b"same size %d" % number, uri, {"by": str(number)}, if_absent=True).metadata["by"]
        except storage.AlreadyExistsError:
            return None

    uri = join(storage_uri, "claim")
    with ThreadPoolExecutor(8) as pool:
        winners = [winner for winner in pool.map(create, range(8)) if winner is not None]
    assert len(winners) == 1
    assert read(uri) == b"same size " + winners[0].encode()
    assert storage.stat(uri).metadata["by"] == winners[0]


def test_a_create_of_equal_content_is_refused_too(storage_uri: str) -> None:
    uri = put(b"same", join(storage_uri, "claim"), if_absent=True).uri
    with pytest.raises(storage.AlreadyExistsError, match=r"claim: exists already"):
        put(b"same", uri, if_absent=True)


def test_a_put_without_its_source_leaves_the_object_before(storage_uri: str, tmp_path: Path) -> None:
    uri = put(b"before", join(storage_uri, "x")).uri
    with pytest.raises(storage.NotFoundError, match="vanished"):
        put(tmp_path / "vanished", uri)
    assert read(uri) == b"before"


def test_a_put_whose_source_breaks_off_leaves_nothing(
    storage_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MULTIPART_BYTES", 5 * MIB)
    (tmp_path / "source").write_bytes(bytes(6 * MIB))
    digest = storage.sha256
    with monkeypatch.context() as patch, pytest.raises(storage.NotFoundError, match="source"):
        # It vanishes between the two passes over it.
        patch.setattr(storage, "sha256", lambda path: (digest(path), path.unlink())[0])
        put(tmp_path / "source", join(storage_uri, "folder", "x"))
    put(b"", join(storage_uri, "folder", "other"))
    assert uris(storage_uri) == ["folder/other"]


def test_a_reader_sees_the_old_or_the_new_content(storage_uri: str) -> None:
    def overwrite() -> None:
        for number in range(10):
            put(str(number).encode() * 2000, uri)

    uri = put(b"x" * 1000, join(storage_uri, "x")).uri
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(overwrite)
        while not writing.done():
            seen = read(uri)
            assert len(seen) == (1000 if seen[:1] == b"x" else 2000)
            assert len(set(seen)) == 1
        writing.result()


def test_large_objects_travel_in_parts(
    storage_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MULTIPART_BYTES", 5 * MIB)
    monkeypatch.setattr(storage, "PART_BYTES", 5 * MIB)
    (tmp_path / "large").write_bytes(os.urandom(11 * MIB))
    info = put(tmp_path / "large", join(storage_uri, "large"), {"k": "ü"})
    assert not storage.is_s3(info.uri) or info.etag.endswith("-3")
    assert info.metadata == {"k": "ü", "sha256": storage.sha256(tmp_path / "large")}
    storage.fetch(info.uri, tmp_path / "copy")
    assert storage.sha256(tmp_path / "copy") == info.metadata["sha256"]
    with pytest.raises(storage.AlreadyExistsError):
        put(tmp_path / "large", info.uri, if_absent=True)


def test_json_comes_back_and_equal_content_has_equal_bytes(storage_uri: str) -> None:
    one = storage.put_json({"b": [1, 2.5, None], "a": "µ"}, join(storage_uri, "1.json"))
    two = storage.put_json({"a": "µ", "b": [1, 2.5, None]}, join(storage_uri, "2.json"))
    assert storage.read_json(one.uri) == {"a": "µ", "b": [1, 2.5, None]}
    assert one.metadata["sha256"] == two.metadata["sha256"]


@pytest.mark.parametrize(("content", "reason"), [(b"{", "not JSON at line 1"), (b"\xff", "not UTF-8")])
def test_what_is_not_json_is_named(storage_uri: str, content: bytes, reason: str) -> None:
    with pytest.raises(storage.CorruptError, match=rf"bad\.json: {reason}"):
        storage.read_json(put(content, join(storage_uri, "bad.json")).uri)


def test_a_deleted_object_is_gone_and_deleting_it_again_is_fine(storage_uri: str) -> None:
    uri = put(b"1", join(storage_uri, "x")).uri
    storage.delete(uri)
    storage.delete(uri)
    assert storage.stat(uri) is None
    put(b"1", join(storage_uri, "y"))
    assert uris(storage_uri) == ["y"]


def test_the_write_check_leaves_nothing(storage_uri: str) -> None:
    storage.check_writable(storage_uri)
    assert uris(storage_uri) == []


def test_names_that_listings_hide_cannot_be_written(storage_uri: str) -> None:
    for name in (f".x.{'0' * 32}.part", ".x.5-1f.meta.json", ".segcloud-write-probe"):
        with pytest.raises(storage.StorageError, match="hidden"):
            put(b"", join(storage_uri, name))


# ---- URIs


def test_parts_of_a_uri() -> None:
    assert join("s3://b/", "a", "b/c") == "s3://b/a/b/c"
    assert join("/", "a") == "/a"
    assert join("file:///a%20b", "c") == "/a b/c"
    assert storage.name("s3://b/a/c.nii.gz") == storage.name("/x/c.nii.gz/") == "c.nii.gz"
    assert storage.parent("s3://b/a/c") == "s3://b/a"
    assert storage.parent("s3://b/a") == "s3://b"
    assert storage.parent("/x/y") == "/x"


@pytest.mark.parametrize("uri", ["gs://b/x", "https://h/x", "file://host/x", "", "a\x00b"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(storage.StorageError, match="use s3://bucket/key"):
        storage.stat(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://bad bucket/key"])
def test_a_uri_without_a_bucket_is_refused(s3: EmbeddedS3, uri: str) -> None:
    with pytest.raises(storage.StorageError, match="correct the URI"):
        storage.stat(uri)


@pytest.mark.parametrize("key", ["", "/", "a/", "a/../b", "//a"])
def test_a_bucket_or_folder_is_no_target(s3: EmbeddedS3, key: str) -> None:
    with pytest.raises(storage.StorageError, match="name"):
        put(b"", f"s3://{s3.bucket}/{key}")


# ---- Folders only


def test_a_file_replaced_by_hand_loses_the_metadata_of_its_predecessor(tmp_path: Path) -> None:
    uri = put(b"ours", str(tmp_path / "x"), {"model": "1"}).uri
    (tmp_path / "x").write_bytes(b"theirs")
    assert storage.stat(uri).metadata == {}
    assert read(uri) == b"theirs"


def test_no_hidden_file_outlives_its_object(tmp_path: Path) -> None:
    for content in (b"1", b"22", b"333"):
        put(content, str(tmp_path / "x"))
    assert len(list(tmp_path.iterdir())) == 2  # the file and its sidecar
    storage.delete(str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_listing_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    put(b"1", str(tmp_path / "elsewhere" / "scan"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling").symlink_to(tmp_path / "absent")
    assert uris(str(tmp_path / "data")) == ["linked/scan"]


def test_broken_metadata_are_none(tmp_path: Path) -> None:
    uri = put(b"1", str(tmp_path / "x"), {"model": "1"}).uri
    next(tmp_path.glob(".x.*")).write_text('{"mod')
    assert storage.stat(uri).metadata == {}


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(storage.NotFoundError, match="no such folder"):
        storage.list_objects(str(tmp_path / "absent"))


def test_a_file_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(storage.StorageError, match="check path and disk"):
        storage.check_writable(str(tmp_path / "file" / "out"))


# ---- S3 only


def test_a_missing_bucket_is_told_from_a_missing_object(s3: EmbeddedS3, tmp_path: Path) -> None:
    uri = "s3://no-such-bucket/x"
    operations: list[Callable[[], object]] = [
        lambda: storage.stat(uri),
        lambda: read(uri),
        lambda: storage.fetch(uri, tmp_path / "copy"),
        lambda: storage.list_objects(uri),
        lambda: put(b"", uri),
        lambda: storage.check_writable(uri),
    ]
    for operation in operations:
        with pytest.raises(storage.BucketMissingError, match="no such bucket 'no-such-bucket'; create it"):
            operation()


def test_folder_markers_are_not_objects(bucket_uri: str) -> None:
    storage.s3_client().put_object(**bucket_and_key(bucket_uri + "/folder/"), Body=b"")
    assert uris(bucket_uri) == uris(bucket_uri + "/folder") == uris(bucket_uri + "/folder/") == []


def test_a_listing_has_all_pages(bucket_uri: str) -> None:
    for number in range(2 * KEYS_PER_PAGE + 1):
        put(b"1", join(bucket_uri, f"{number:04}"))
    assert uris(bucket_uri) == [f"{number:04}" for number in range(2 * KEYS_PER_PAGE + 1)]


def test_a_multipart_upload_that_fails_is_taken_back(
    bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise OSError(5, "the disk gave up")

    monkeypatch.setattr(storage, "MULTIPART_BYTES", 5 * MIB)
    monkeypatch.setattr(storage, "PART_BYTES", 5 * MIB)
    events, name = storage.s3_client().meta.events, "before-call.s3.CompleteMultipartUpload"
    events.register(name, fail)
    with pytest.raises(storage.StorageError, match="the disk gave up"):
        put(bytes(6 * MIB), join(bucket_uri, "x"))
    events.unregister(name, fail)
    bucket = bucket_and_key(bucket_uri)["Bucket"]
    assert "Uploads" not in storage.s3_client().list_multipart_uploads(Bucket=bucket)
    assert uris(bucket_uri) == []


def test_a_fetch_never_mixes_two_versions(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", MIB)
    uri = put(b"1" * (4 * MIB), join(bucket_uri, "x")).uri
    replaced = threading.Event()

    def replace(**_: object) -> None:
        if not replaced.is_set():
            replaced.set()
            storage.s3_client().put_object(**bucket_and_key(uri), Body=b"2" * (4 * MIB))

    events = storage.s3_client().meta.events
    events.register("before-call.s3.GetObject", replace)
    info = storage.fetch(uri, tmp_path / "copy")
    events.unregister("before-call.s3.GetObject", replace)
    assert replaced.is_set()
    assert (tmp_path / "copy").read_bytes() == b"2" * (4 * MIB)
    assert info == storage.stat(uri)


def test_a_stream_never_mixes_two_versions(bucket_uri: str) -> None:
    uri = put(b"1" * MIB, join(bucket_uri, "x")).uri
    with storage.open_read(uri) as stream:
        assert stream.read(10) == b"1" * 10
        put(b"2" * MIB, uri)
        with pytest.raises(OSError, match=r"pre-conditions"):
            stream.seek(MIB // 2)  # asks the store again


def test_a_forked_child_has_a_client_of_its_own(bucket_uri: str) -> None:
    uri, client = put(b"1", join(bucket_uri, "x")).uri, storage.s3_client()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with storage._lock:  # held by another thread at the fork, in the worst case
        child = context.Process(target=lambda: answers.put((read(uri), storage.s3_client() is not client)))
        child.start()
    child.join(10)
    child.kill()
    assert child.exitcode == 0
    assert answers.get() == (b"1", True)


def test_a_changed_environment_has_a_client_of_its_own(
    s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = storage.s3_client()
    assert storage.s3_client() is client
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert storage.s3_client().meta.endpoint_url == "http://127.0.0.1:9"


# ---- A store that misbehaves


class FaultyStore(ThreadingHTTPServer):
    """Keeps one object and plays a script: one fault per request, then all is well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.script: list[str] = []  # "403 Code", "truncate", "reset", "lose answer"
        self.seen: list[str] = []
        self.body: bytes | None = b"0123456789" * 1000
        self.headers: dict[str, str] = {}


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyStore

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        fault = self.server.script.pop(0) if self.server.script else ""
        body = b"" if self.command == "DELETE" else self.server.body
        if fault[:1].isdigit():
            status, _, code = fault.partition(" ")
            self.answer(int(status), f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())
        elif body is None:
            self.answer(404, b"")
        elif fault in ("truncate", "reset"):
            self.answer(200, body, self.server.headers, sent=len(body) // 2, reset=fault == "reset")
        else:
            self.answer(200, body, self.server.headers)

    do_HEAD = do_DELETE = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["If-None-Match"] and self.server.body is not None:
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        self.server.body = data
        named = [name for name in self.headers if name.lower().startswith("x-amz-meta-")]
        self.server.headers = {name: self.headers[name] for name in named}
        if self.server.script and self.server.script.pop(0) == "lose answer":
            self.close_connection = True
            return None
        return self.answer(200, b"")

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        sent: int | None = None,
        reset: bool = False,
    ) -> None:
        self.send_response(status)
        date = "Thu, 01 Jan 2026 00:00:00 GMT"
        fixed = {"Content-Length": str(len(body)), "ETag": '"e"', "Last-Modified": date}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True
        if reset:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close with RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    server = FaultyStore()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("NO_PROXY", "localhost")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["truncate", "reset"])
def test_a_read_outlasts_broken_answers(faulty: FaultyStore, fault: str) -> None:
    faulty.script = [fault, fault]
    assert read("s3://lab/x") == faulty.body
    assert len(faulty.seen) == 3


def test_a_read_gives_up_in_the_end(faulty: FaultyStore) -> None:
    faulty.script = ["truncate"] * 99
    with pytest.raises(storage.UnreachableError, match=r"s3://lab/x: the answer broke off; try again later"):
        read("s3://lab/x")
    assert len(faulty.seen) == storage.READ_ATTEMPTS


def test_a_fetch_outlasts_broken_answers(faulty: FaultyStore, tmp_path: Path) -> None:
    faulty.script = ["", "truncate", "reset"]
    storage.fetch("s3://lab/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == faulty.body


def test_a_fetch_that_gives_up_leaves_no_file(faulty: FaultyStore, tmp_path: Path) -> None:
    faulty.script = ["", *["truncate"] * 99]
    with pytest.raises(storage.UnreachableError, match="broke off"):
        storage.fetch("s3://lab/x", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_overloaded_store_is_asked_again(faulty: FaultyStore) -> None:
    faulty.script = ["503 SlowDown"]
    assert read("s3://lab/x") == faulty.body


def test_an_overloaded_store_is_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    faulty.script = ["503 SlowDown"]
    with pytest.raises(
        storage.UnreachableError, match=r"failing or overloaded \(503 SlowDown\); try again later"
    ):
        read("s3://lab/x")


DENIALS = {
    "403 AccessDenied": "check the credentials, the role and the bucket's policy",
    "403 InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "403 SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "400 ExpiredToken": "renew the credentials",
    "403 RequestTimeTooSkewed": "set this machine's clock",
}


@pytest.mark.parametrize("answer", DENIALS)
@pytest.mark.parametrize("operation", [storage.stat, read, storage.list_objects, storage.delete])
def test_a_denial_is_one_line_with_the_reason_and_no_secret(
    faulty: FaultyStore, answer: str, operation: Callable[[str], object]
) -> None:
    faulty.script = [answer] * 9
    with pytest.raises(storage.AccessDeniedError) as caught:
        operation("s3://lab/x")
    message = str(caught.value)
    assert message.startswith(f"s3://lab/x: access denied ({answer}); {DENIALS[answer]}")
    assert "very-secret" not in message
    assert "\n" not in message


def test_a_region_error_names_the_region(faulty: FaultyStore) -> None:
    faulty.script = ["400 AuthorizationHeaderMalformed"] * 9
    with pytest.raises(storage.StorageError, match="check AWS_DEFAULT_REGION"):
        read("s3://lab/x")


def test_a_create_whose_answer_was_lost_is_ours(faulty: FaultyStore) -> None:
    faulty.body, faulty.script = None, ["lose answer"]
    info = put(b"claim", "s3://lab/x", if_absent=True)
    assert [request.split()[0] for request in faulty.seen[:3]] == ["PUT", "PUT", "HEAD"]
    assert set(info.metadata) == {"sha256"}


def test_a_custom_endpoint_gets_path_style_addresses(faulty: FaultyStore) -> None:
    read("s3://lab/a/x")
    assert faulty.seen == ["GET /lab/a/x"]


def test_no_credentials_are_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(storage.AccessDeniedError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        read("s3://lab/x")


def test_an_unknown_profile_is_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(storage.AccessDeniedError, match="s3://lab/x: AWS_PROFILE names no profile"):
        read("s3://lab/x")


def test_a_wrong_endpoint_is_named_within_seconds(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(
        storage.UnreachableError, match=r"cannot reach endpoint http://127\.0\.0\.1:9; check AWS_END"
    ):
        storage.check_writable("s3://lab/x")
    assert time.monotonic() - begun < 5


def test_what_is_no_endpoint_is_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(storage.StorageError, match="AWS_ENDPOINT_URL: not a URL"):
        read("s3://lab/x")


# ---- The embedded server


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_server_takes_one_request_at_a_time() -> None:
    def application(environ: dict, start_response: object) -> list[bytes]:
        inside.append(len(busy))
        busy.append(1)
        time.sleep(0.01)
        busy.pop()
        return []

    inside, busy = [], []
    guarded = _OneAtATime(application)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: guarded({}, None), range(8)))
    assert inside == [0] * 8


def test_an_upload_cut_off_on_its_way_leaves_nothing(s3: EmbeddedS3, bucket_uri: str) -> None:
    place = bucket_and_key(join(bucket_uri, "x"))
    request = f"PUT /{place['Bucket']}/{place['Key']} HTTP/1.1\r\nHost: s3\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(s3.endpoint.rpartition(":")[2]))) as connection:
        connection.sendall(request.encode() + b"half")
    time.sleep(0.3)
    assert storage.stat(join(bucket_uri, "x")) is None


def test_the_environment_is_as_before_afterwards(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    before = dict(os.environ)
    with EmbeddedS3(bucket="second") as second:
        assert read(put(b"1", second.uri("x")).uri) == b"1"
        assert os.environ["AWS_ENDPOINT_URL"] == second.endpoint == second.env["AWS_ENDPOINT_URL"]
    assert dict(os.environ) == before
    assert refuses(int(second.endpoint.rpartition(":")[2]))


def test_the_server_dies_with_a_killed_program() -> None:
    # The forked child keeps the pipe to the server open, as a worker of the program may.
    program = """
import os, signal, time
from segcloud.embedded_s3 import EmbeddedS3
with EmbeddedS3() as s3:
    if os.fork() == 0:
        time.sleep(20), os._exit(0)
    print(s3.endpoint, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline().rpartition(":")[2])
    assert not refuses(port)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while not refuses(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert refuses(port)
