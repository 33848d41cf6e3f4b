"""Objects in a bucket and files in a folder, behind the same dozen functions.

Everything that segcloud reads and publishes passes here, so that the promises hold everywhere: an object
appears whole or not at all, what is read is what was written (size and sha256), a create that must not
overwrite is decided by the store, and a failure is one line that names the URI and the remedy. Hence no
streamed writes: a stream that an exception cuts can publish a truncated object. Data are written to local
disk first and sent in one request (or one managed multipart upload); smart_open streams reads only.

A URI is `s3://bucket/key`, a path, or `file:///path`. Endpoint, region and credentials of S3 come from the
standard AWS chain (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, an attached role, …) and from nowhere else.
Every function raises StorageError, or the subclass that says more; only further errors are noted below.
"""

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from segcloud.storage import errors, s3
from segcloud.storage.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    BucketMissingError,
    CorruptError,
    NotFoundError,
    StorageError,
    UnreachableError,
)
from segcloud.storage.local import LocalFile, temporary
from segcloud.storage.s3 import s3_client
from segcloud.storage.uri import (
    HIDDEN,
    PROBE,
    ObjectInfo,
    absolute,
    check_key,
    is_s3,
    join,
    local_path,
    name,
    parent,
)

__all__ = ["AccessDeniedError", "AlreadyExistsError", "BucketMissingError", "CorruptError", "NotFoundError"]
__all__ += [
    "ObjectInfo",
    "StorageError",
    "UnreachableError",
    "absolute",
    "check_writable",
    "delete",
    "fetch",
    "is_s3",
]
__all__ += ["join", "list_objects", "local_path", "name", "open_read", "parent", "put", "put_json", "read"]
__all__ += ["read_json", "read_text", "s3_client", "sha256", "stat"]

READ_ATTEMPTS = 4
BACKOFF_SECONDS = 0.2


def list_objects(uri_prefix: str, suffix: str | tuple[str, ...] | None = None) -> Iterator[ObjectInfo]:
    """All objects below a folder, sorted by URI; or the one object that the URI names.

    A folder, not any prefix: `s3://b/imagesTr` does not match `s3://b/imagesTr2/…`. Only names that end in
    `suffix`. NotFoundError where a local folder does not exist; a prefix in a bucket is merely empty.
    """
    with _errors(uri_prefix):
        found = [info for info in _at(uri_prefix).list() if not HIDDEN.fullmatch(name(info.uri))]
    return iter(sorted((i for i in found if i.uri.endswith(suffix or "")), key=lambda info: info.uri))


def stat(uri: str) -> ObjectInfo | None:
    """Size, ETag, time and metadata of an object; None if it (but not its bucket) does not exist."""
    with _errors(uri):
        return _at(uri).stat()


def read(uri: str, start: int | None = None, length: int | None = None) -> bytes:
    """The bytes of an object, or those of a range; fewer where the range passes the end.

    A whole object is compared with the sha256 in its metadata, if any. Answers that break off and bytes that
    differ are asked for again before that is an error. A negative range is a ValueError.
    """
    if (start or 0) < 0 or (length or 0) < 0:
        raise ValueError(f"start {start} and length {length} must not be negative")
    for attempt in range(1, READ_ATTEMPTS):
        with contextlib.suppress(errors.BrokenBodyError, CorruptError):
            return _read_once(uri, start, length)
        time.sleep(BACKOFF_SECONDS * 2**attempt * (0.5 + random.random()))
    return _read_once(uri, start, length)


def _read_once(uri: str, start: int | None, length: int | None) -> bytes:
    with _errors(uri):
        if length == 0:  # which no Range can say
            _existing(uri)
            return b""
        data, expected = _at(uri).read(start or 0, length)
    if start is None and length is None and expected and sha256(data) != expected:
        raise CorruptError(f"{uri}: the content does not match its sha256; write the object again")
    return data


def read_text(uri: str) -> str:
    """An object as UTF-8 text; raises as `read` does, and CorruptError where it is not UTF-8."""
    try:
        return read(uri).decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{uri}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error


def read_json(uri: str) -> Any:
    """An object parsed as JSON; raises as `read` does, and CorruptError where it is not JSON."""
    try:
        return json.loads(read_text(uri))
    except json.JSONDecodeError as error:
        raise CorruptError(f"{uri}: not JSON at line {error.lineno}: {error.msg}; correct it") from error


def open_read(uri: str) -> BinaryIO:
    """A seekable stream of an object's bytes, never decompressed; raises NotFoundError where there is none.

    Reading from it raises OSError, also where the object is replaced meanwhile: it never mixes two versions.
    """
    with _errors(uri):
        return _at(uri).open(_existing(uri))


def fetch(uri: str, path: Path, sha256: str | None = None) -> ObjectInfo:
    """Download an object to `path`, whole or not at all, and check its size and digest.

    The folder of `path` is made, an existing file is replaced. `sha256` is what the content must hash to; by
    default what the object's metadata say, if anything. CorruptError where size or sha256 differ twice.
    """
    with contextlib.suppress(CorruptError, errors.ReplacedError):
        return _fetch_once(uri, path, sha256)
    return _fetch_once(uri, path, sha256)


def _fetch_once(uri: str, path: Path, expected: str | None) -> ObjectInfo:
    with _errors(uri), temporary(path) as partial:
        info = _existing(uri)
        with partial.open("xb") as target:
            _at(uri).download(info, target)
        expected = expected or info.metadata.get("sha256")
        if (size := partial.stat().st_size) != info.size:
            raise CorruptError(f"{uri}: {size} of {info.size} bytes arrived; try again")
        if expected and sha256(partial) != expected.lower():
            raise CorruptError(f"{uri}: the content does not match sha256 {expected}; write the object again")
        partial.replace(path)
        return info


def put(
    source: Path | bytes,
    uri: str,
    metadata: Mapping[str, str] | None = None,
    if_absent: bool = False,
    content_type: str | None = None,
) -> ObjectInfo:
    """Publish a file or bytes as an object: it appears whole, with its sha256 in the metadata, or not at all.

    Args:
        source: A local file, or the content itself.
        uri: The object to write.
        metadata: Names of [a-z0-9-] to any text, about 2 KB together.
        if_absent: Create only, or AlreadyExistsError. Of racing writers exactly one succeeds, where the
            store honours If-None-Match.
        content_type: The MIME type, on S3.
    """
    check_key(name(uri), parent(uri))
    if HIDDEN.fullmatch(name(uri)):
        raise StorageError(f"{uri}: segcloud keeps such hidden names for itself; choose another")
    with _errors(uri):
        body, size, digest = _load(source)
        if if_absent and size > s3.CREATE_BYTES:
            raise StorageError(f"{uri}: {size} bytes; a create-only put takes at most {s3.CREATE_BYTES}")
        described = {**(metadata or {}), "sha256": digest}
        s3.check_metadata(described, uri)
        _at(uri).put(body, described, if_absent, content_type)
        info = _existing(uri)
        # Another digest means another writer since, whose object is as whole as ours was.
        if info.size != size and info.metadata.get("sha256") == digest:
            raise CorruptError(f"{uri}: sent {size} bytes, the store holds {info.size}; put it again")
        return info


def _load(source: Path | bytes) -> tuple[Path | bytes, int, str]:
    """The source, its size and its sha256; a small file is read once so that all three agree."""
    if isinstance(source, Path) and (size := source.stat().st_size) > s3.MULTIPART_BYTES:
        return source, size, sha256(source)
    data = source.read_bytes() if isinstance(source, Path) else source
    return data, len(data), sha256(data)


def put_json(
    obj: Any, uri: str, metadata: Mapping[str, str] | None = None, if_absent: bool = False
) -> ObjectInfo:
    """Publish JSON, with sorted keys so that equal content has equal bytes.

    Raises as `put` does, and ValueError or TypeError for what JSON cannot say (NaN, numpy scalars).
    """
    text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return put(text.encode(), uri, metadata, if_absent, content_type="application/json")


def delete(uri: str) -> None:
    """Remove an object; an absent one is fine."""
    with _errors(uri):
        _at(uri).delete()


def check_writable(uri: str) -> None:
    """Prove that objects can be written below a prefix, by writing and removing a tiny one.

    Called before hours of work, so it gives up on a silent endpoint within seconds. Where deleting is
    forbidden the probe stays; listings do not show it.
    """
    with _errors(uri):
        _at(join(uri, PROBE)).probe()


def sha256(source: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _at(uri: str) -> LocalFile | s3.S3Object:
    return s3.S3Object(uri) if is_s3(uri) else LocalFile(uri)


def _existing(uri: str) -> ObjectInfo:
    if info := _at(uri).stat():
        return info
    raise NotFoundError(f"{uri}: no such object; check the URI")


def _errors(uri: str) -> contextlib.AbstractContextManager[None]:
    return errors.translated(uri, s3.endpoint)
