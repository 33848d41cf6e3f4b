"""What only S3 can do: buckets, pages, parts, versions, and a client per process and environment."""

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from segcloud import storage
from segcloud.embedded_s3 import EmbeddedS3
from segcloud.storage import join, put, read
from tests.storage.helpers import MIB, bucket_and_key, uris

KEYS_PER_PAGE = 20  # as tests/conftest.py starts the embedded server


@pytest.fixture(params=["bucket_uri", "real_s3_uri"], ids=["embedded", "real"])
def s3_uri(request: pytest.FixtureRequest) -> str:
    """An empty prefix on each S3 store in turn."""
    return request.getfixturevalue(request.param)


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


def test_folder_markers_are_not_objects(s3_uri: str) -> None:
    marker = bucket_and_key(s3_uri + "/folder/")
    storage.s3_client().put_object(**marker, Body=b"")
    assert uris(s3_uri) == uris(s3_uri + "/folder") == uris(s3_uri + "/folder/") == []
    storage.s3_client().delete_object(**marker)


def test_a_listing_has_all_pages(s3_uri: str) -> None:
    for number in range(2 * KEYS_PER_PAGE + 1):
        put(b"1", join(s3_uri, f"{number:04}"))
    assert uris(s3_uri) == [f"{number:04}" for number in range(2 * KEYS_PER_PAGE + 1)]


def test_a_multipart_upload_that_fails_is_taken_back(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(5, "the disk gave up")

    monkeypatch.setattr("segcloud.storage.s3.MULTIPART_BYTES", 5 * MIB)
    monkeypatch.setattr("segcloud.storage.s3.PART_BYTES", 5 * MIB)
    events, name = storage.s3_client().meta.events, "before-call.s3.CompleteMultipartUpload"
    events.register(name, fail)
    with pytest.raises(storage.StorageError, match="the disk gave up"):
        put(bytes(6 * MIB), join(s3_uri, "x"))
    events.unregister(name, fail)
    place = bucket_and_key(s3_uri)
    listed = storage.s3_client().list_multipart_uploads(Bucket=place["Bucket"], Prefix=place["Key"])
    assert "Uploads" not in listed
    assert uris(s3_uri) == []


def test_a_fetch_never_mixes_two_versions(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segcloud.storage.s3.PART_BYTES", MIB)
    uri = put(b"1" * (4 * MIB), join(s3_uri, "x")).uri
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


def test_a_stream_never_mixes_two_versions(s3_uri: str) -> None:
    uri = put(b"1" * MIB, join(s3_uri, "x")).uri
    with storage.open_read(uri) as stream:
        assert stream.read(10) == b"1" * 10
        put(b"2" * MIB, uri)
        with pytest.raises(OSError, match="PreconditionFailed"):
            stream.seek(MIB // 2)  # asks the store again


def test_a_forked_child_has_a_client_of_its_own(bucket_uri: str) -> None:
    uri, client = put(b"1", join(bucket_uri, "x")).uri, storage.s3_client()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with storage.s3._lock:  # held by another thread at the fork, in the worst case
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
