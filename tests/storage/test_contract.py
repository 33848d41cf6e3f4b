"""One contract for a folder, an embedded S3 server and a real store.

Proven: objects appear whole or not at all, content is checked, creates are exclusive, names cannot escape.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from segcloud import storage
from segcloud.embedded_s3 import EmbeddedS3
from segcloud.storage import join, put, read
from tests.storage.helpers import MIB, bucket_and_key, uris


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
    monkeypatch.setattr("segcloud.storage.s3.MULTIPART_BYTES", 5 * MIB)
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
    monkeypatch.setattr("segcloud.storage.s3.MULTIPART_BYTES", 5 * MIB)
    monkeypatch.setattr("segcloud.storage.s3.PART_BYTES", 5 * MIB)
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
