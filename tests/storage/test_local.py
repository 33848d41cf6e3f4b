"""What only a folder can do: links, files replaced by hand, sidecars."""

from pathlib import Path

import pytest

from segcloud import storage
from segcloud.storage import put, read
from tests.storage.helpers import uris


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
