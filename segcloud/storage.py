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

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
import time
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

import boto3
from botocore import exceptions as boto
from botocore.config import Config
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber
from urllib3.exceptions import HTTPError

from segcloud.errors import SegcloudError

MULTIPART_BYTES = 64 * 2**20  # larger objects go up in parts, in parallel
PART_BYTES = 16 * 2**20
CREATE_BYTES = 5 * 2**30  # what S3 takes in one request; only one request can be conditional
METADATA_BYTES = 2048  # what S3 keeps per object
READ_ATTEMPTS = 4
BACKOFF_SECONDS = 0.2

_PROBE = ".segcloud-write-probe"
# Beside a local file stand its metadata and, for a moment, its successor; a probe may stay in a bucket.
_HIDDEN = re.compile(r"\.(.+\.[0-9a-f]{32}\.part|.+\.[0-9a-f]+-[0-9a-f]+\.meta\.json|segcloud-write-probe)")
_PUT_ID = "put-id"  # metadata that tells our own earlier try from another writer's object


class StorageError(SegcloudError):
    """A storage operation failed; the message is one line: the URI, what is wrong, what to do."""


class NotFoundError(StorageError):
    """The object, file or folder does not exist."""


class AccessDeniedError(StorageError):
    """The credentials are missing, wrong or expired, or do not allow the operation."""


class BucketMissingError(StorageError):
    """The bucket does not exist."""


class AlreadyExistsError(StorageError):
    """A create-only put met an existing object."""


class CorruptError(StorageError):
    """What arrived is not what was written: size, sha256 or format differ."""


class UnreachableError(StorageError):
    """The store does not answer, or not completely; a later try may succeed."""


class _ReplacedError(StorageError):
    """The object was overwritten while it was being read."""


class _BrokenBodyError(UnreachableError):
    """An answer began and broke off, which botocore does not retry."""


@dataclass(frozen=True)
class ObjectInfo:
    """What the store says of one object."""

    uri: str
    size: int
    etag: str  # differs whenever the content was replaced; of a local file: its size and time
    modified: datetime  # UTC
    metadata: dict[str, str] = field(default_factory=dict)  # filled by `stat`, not by `list_objects`


# ---- URIs


def is_s3(uri: str) -> bool:
    """Whether a URI names something in object storage (else: a local path)."""
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """The path behind a local URI; a scheme other than `file` is refused."""
    path = uri
    if uri.startswith("file://"):
        path = unquote(urlsplit(uri).path) if urlsplit(uri).netloc in ("", "localhost") else ""
    if "://" in path or not path or not _storable(path):
        raise StorageError(
            f"{uri!r}: neither an S3 URI nor a path; use s3://bucket/key, /path or file:///path"
        )
    return Path(path)


def join(uri: str, *parts: str) -> str:
    """`uri` extended by names or relative paths.

    A part that is absolute or empty, has a `.` or `..` segment or a control character, is refused: whatever
    a part is made of, the result lies inside `uri`.
    """
    base = uri if is_s3(uri) else str(local_path(uri))
    for part in parts:
        _check_key(part, uri)
    return "/".join((base.rstrip("/"), *parts))


def name(uri: str) -> str:
    """The last segment of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """The URI without its last segment; a bucket has none."""
    if not is_s3(uri):
        return str(local_path(uri).parent)
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    if not key:
        raise StorageError(f"{uri}: a bucket has no parent; name a folder or an object in it")
    return f"s3://{bucket}/{key.rpartition('/')[0]}".rstrip("/")


def _storable(text: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def _check_key(key: str, uri: str) -> None:
    if not all(segment not in ("", ".", "..") and _storable(segment) for segment in key.split("/")):
        raise StorageError(f"{uri}: {key!r} is not a name inside it; use relative parts without '..'")


# ---- Operations


def list_objects(uri_prefix: str, suffix: str | tuple[str, ...] | None = None) -> Iterator[ObjectInfo]:
    """All objects below a folder, sorted by URI; or the one object that the URI names.

    Args:
        uri_prefix: A folder: `s3://b/imagesTr` does not match `s3://b/imagesTr2/…`.
        suffix: Only names that end so.

    Raises:
        NotFoundError: A local folder does not exist (a prefix in a bucket is merely empty).
    """
    with _errors(uri_prefix):
        found = [info for info in _at(uri_prefix).list() if not _HIDDEN.fullmatch(name(info.uri))]
    return iter(
        sorted((info for info in found if info.uri.endswith(suffix or "")), key=lambda info: info.uri)
    )


def stat(uri: str) -> ObjectInfo | None:
    """Size, ETag, time and metadata of an object; None if it (but not its bucket) does not exist."""
    with _errors(uri):
        return _at(uri).stat()


def read(uri: str, start: int | None = None, length: int | None = None) -> bytes:
    """The bytes of an object, or those of a range; fewer where the range passes the end.

    A whole object is compared with the sha256 in its metadata, where there is one. Answers that break off
    and bytes that differ are asked for again.

    Raises:
        NotFoundError: There is no such object.
        CorruptError: The content does not match its sha256, after retries.
        ValueError: A negative range.
    """
    if (start or 0) < 0 or (length or 0) < 0:
        raise ValueError(f"start {start} and length {length} must not be negative")
    for attempt in range(1, READ_ATTEMPTS):
        try:
            return _read_once(uri, start, length)
        except (_BrokenBodyError, CorruptError):
            time.sleep(BACKOFF_SECONDS * 2**attempt * (0.5 + random.random()))
    return _read_once(uri, start, length)


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
        raise CorruptError(
            f"{uri}: not JSON at line {error.lineno}: {error.msg}; correct the file"
        ) from error


def open_read(uri: str) -> BinaryIO:
    """A seekable stream of an object's bytes, never decompressed; raises NotFoundError where there is none.

    Reading from it raises OSError, also where the object is replaced meanwhile: it never mixes two versions.
    """
    with _errors(uri):
        return _at(uri).open(_existing(uri))


def fetch(uri: str, path: Path, sha256: str | None = None) -> ObjectInfo:
    """Download an object to `path`, whole or not at all, and check its size and digest.

    Args:
        uri: The object.
        path: Where to put it; its folder is made, an existing file is replaced.
        sha256: What the content must hash to; default: the sha256 in the object's metadata, if any.

    Raises:
        NotFoundError: There is no such object.
        CorruptError: Size or sha256 differ, twice.
    """
    try:
        return _fetch_once(uri, path, sha256)
    except (CorruptError, _ReplacedError):
        return _fetch_once(uri, path, sha256)


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
        if_absent: Create only. Of racing writers exactly one succeeds, where the store honours If-None-Match.
        content_type: The MIME type, on S3.

    Raises:
        AlreadyExistsError: `if_absent`, and the object exists.
        CorruptError: The store holds another size than was sent.
    """
    _check_key(name(uri), parent(uri))
    if _HIDDEN.fullmatch(name(uri)):
        raise StorageError(f"{uri}: segcloud keeps such hidden names for itself; choose another")
    with _errors(uri):
        body, size, digest = _load(source)
        if if_absent and size > CREATE_BYTES:
            raise StorageError(f"{uri}: {size} bytes; a create-only put takes at most {CREATE_BYTES}")
        described = {**(metadata or {}), "sha256": digest}
        _check_metadata(described, uri)
        _at(uri).put(body, described, if_absent, content_type)
        info = _existing(uri)
        # Another digest means another writer since, whose object is as whole as ours was.
        if info.size != size and info.metadata.get("sha256") == digest:
            raise CorruptError(f"{uri}: sent {size} bytes, the store holds {info.size}; put it again")
        return info


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
        _at(join(uri, _PROBE)).probe()


def sha256(source: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _at(uri: str) -> _LocalFile | _S3Object:
    return _S3Object(uri) if is_s3(uri) else _LocalFile(uri)


def _existing(uri: str) -> ObjectInfo:
    info = _at(uri).stat()
    if info is None:
        raise NotFoundError(f"{uri}: no such object; check the URI")
    return info


def _read_once(uri: str, start: int | None, length: int | None) -> bytes:
    with _errors(uri):
        data, expected = _at(uri).read(start or 0, length)
    if start is None and length is None and expected and sha256(data) != expected:
        raise CorruptError(f"{uri}: the content does not match its sha256; write the object again")
    return data


def _fetch_once(uri: str, path: Path, expected: str | None) -> ObjectInfo:
    with _errors(uri), _temporary(path) as partial:
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


def _load(source: Path | bytes) -> tuple[Path | bytes, int, str]:
    """The source, its size and its sha256; a small file is read once so that all three agree."""
    if isinstance(source, Path) and (size := source.stat().st_size) > MULTIPART_BYTES:
        return source, size, sha256(source)
    data = source.read_bytes() if isinstance(source, Path) else source
    return data, len(data), sha256(data)


def _check_metadata(metadata: Mapping[str, str], uri: str) -> None:
    for key in metadata:
        if not re.fullmatch(r"[a-z0-9-]+", key) or key == _PUT_ID:
            raise StorageError(
                f"{uri}: metadata cannot be named {key!r}; use lower-case letters, digits and '-'"
            )
    used = sum(len(key) + len(_encode(value)) for key, value in metadata.items()) + len(_PUT_ID) + 32
    if used > METADATA_BYTES:
        raise StorageError(f"{uri}: {used} bytes of metadata, S3 keeps {METADATA_BYTES}; use a JSON sidecar")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden name in the folder of `path` (made if missing) that is gone afterwards, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _stream(body: Path | bytes) -> BinaryIO:
    return io.BytesIO(body) if isinstance(body, bytes) else body.open("rb")


# ---- Local files


class _LocalFile:
    """A file that behaves like an object.

    Its metadata stand in a hidden sidecar whose name holds the fingerprint of the file that it describes.
    It is written before the file takes its name, so that both appear at once, and a file that somebody
    replaces by other means does not inherit the metadata of its predecessor.
    """

    def __init__(self, uri: str) -> None:
        self.path = local_path(uri)

    def list(self) -> Iterator[ObjectInfo]:
        if info := self.stat():
            yield info
            return
        if not self.path.is_dir():
            raise NotFoundError(f"{self.path}: no such folder; check the path")
        seen: set[tuple[int, int]] = set()  # links are followed, but not in circles
        for folder, folders, names in os.walk(self.path, onerror=_raise, followlinks=True):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for path in (Path(folder, entry) for entry in names):
                with contextlib.suppress(FileNotFoundError):  # deleted since, or a dangling link
                    yield _file_info(path, path.stat())

    def stat(self) -> ObjectInfo | None:
        status = self._status()
        return status and _file_info(self.path, status, self._metadata(status))

    def read(self, start: int, length: int | None) -> tuple[bytes, str | None]:
        with self.path.open("rb") as stream:
            expected = self._metadata(os.fstat(stream.fileno())).get("sha256")
            stream.seek(start)
            return stream.read(-1 if length is None else length), expected

    def open(self, info: ObjectInfo) -> BinaryIO:
        return self.path.open("rb")

    def download(self, info: ObjectInfo, target: BinaryIO) -> None:
        with self.path.open("rb") as stream:
            if _fingerprint(os.fstat(stream.fileno())) != info.etag:
                raise _ReplacedError(f"{self.path}: replaced while being read; try again")
            shutil.copyfileobj(stream, target, 2**20)

    def put(self, body: Path | bytes, metadata: dict[str, str], if_absent: bool, kind: str | None) -> None:
        with _temporary(self.path) as partial:
            sidecar = self._sidecar(_write(body, partial))
            sidecar.write_text(json.dumps(metadata, sort_keys=True), encoding="utf-8")
            before = None if if_absent else self._status()
            try:
                # A link fails where the name is taken, a rename replaces what has it.
                os.link(partial, self.path) if if_absent else partial.replace(self.path)
            except BaseException as error:
                sidecar.unlink()
                if isinstance(error, FileExistsError):
                    raise _taken(str(self.path)) from error
                raise
            if before:
                self._sidecar(before).unlink(missing_ok=True)

    def delete(self) -> None:
        if status := self._status():
            self.path.unlink(missing_ok=True)
            self._sidecar(status).unlink(missing_ok=True)

    def probe(self) -> None:
        self.put(b"", {}, if_absent=False, kind=None)
        self.delete()

    def _status(self) -> os.stat_result | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return None if self.path.is_dir() else self.path.stat()
        return None

    def _sidecar(self, status: os.stat_result) -> Path:
        return self.path.with_name(f".{self.path.name}.{_fingerprint(status)}.meta.json")

    def _metadata(self, status: os.stat_result) -> dict[str, str]:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(self._sidecar(status).read_text(encoding="utf-8"))
        return {}


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it may not read


def _write(body: Path | bytes, partial: Path) -> os.stat_result:
    with _stream(body) as stream, partial.open("xb") as target:
        shutil.copyfileobj(stream, target, 2**20)
        target.flush()
        os.fsync(target.fileno())
    # The kernel's clock ticks in milliseconds: two racing writers must not share a fingerprint.
    moment = time.time_ns() // 1000 * 1000 + random.randrange(1000)
    os.utime(partial, ns=(moment, moment))
    return partial.stat()


def _fingerprint(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _file_info(path: Path, status: os.stat_result, metadata: dict[str, str] | None = None) -> ObjectInfo:
    modified = datetime.fromtimestamp(status.st_mtime, UTC)
    return ObjectInfo(str(path), status.st_size, _fingerprint(status), modified, metadata or {})


# ---- S3


class _S3Object:
    """An object in a bucket; foreign names are read as they are, ours are checked before they are written."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bucket, _, self.key = uri.removeprefix("s3://").partition("/")
        self.where = {"Bucket": self.bucket, "Key": self.key}

    def list(self) -> Iterator[ObjectInfo]:
        folder = self.key and self.key.removesuffix("/") + "/"
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
        items = [item for page in pages for item in page.get("Contents", ())]
        for item in items:
            if item["Size"] or not item["Key"].endswith("/"):  # else: what marks an empty folder
                yield _object_info(f"s3://{self.bucket}/{item['Key']}", item["Size"], item)
        if not items and self.key != folder and (info := self.stat()):
            yield info

    def stat(self) -> ObjectInfo | None:
        head = self._head()
        return head and _object_info(self.uri, head["ContentLength"], head)

    def read(self, start: int, length: int | None) -> tuple[bytes, str | None]:
        if length == 0:
            return b"", _existing(self.uri).metadata.get("sha256")
        last = "" if length is None else start + length - 1
        part = {"Range": f"bytes={start}-{last}"} if start or length else {}
        try:
            answer = _client().get_object(**self.where, **part)
        except boto.ClientError as error:
            if _status(error) != 416:
                raise
            return b"", None  # the range begins behind the end
        try:
            return answer["Body"].read(), _decode(answer.get("Metadata", {})).get("sha256")
        except (boto.IncompleteReadError, boto.HTTPClientError, HTTPError, OSError) as error:
            raise _BrokenBodyError(f"{self.uri}: the answer broke off; try again later") from error

    def open(self, info: ObjectInfo) -> BinaryIO:
        import smart_open.s3  # slow to import, and few commands stream

        # Not smart_open.open(uri): it would take `?versionId=` and `user:password@` out of a key.
        pinned = {"S3.Client.get_object": {"IfMatch": f'"{info.etag}"'}}
        return smart_open.s3.open(self.bucket, self.key, "rb", client=_client(), client_kwargs=pinned)

    def download(self, info: ObjectInfo, target: BinaryIO) -> None:
        with _transfers() as manager:
            manager.download(self.bucket, self.key, target, subscribers=[_Pinned(info)]).result()

    def put(self, body: Path | bytes, metadata: dict[str, str], if_absent: bool, kind: str | None) -> None:
        _check_key(self.key, f"s3://{self.bucket}")
        extra: dict[str, Any] = {"Metadata": {key: _encode(value) for key, value in metadata.items()}}
        extra |= {"ContentType": kind} if kind else {}
        if if_absent:
            self._create(body, extra)
        elif isinstance(body, bytes) and len(body) <= MULTIPART_BYTES:
            _client().put_object(**self.where, Body=body, **extra)
        else:
            source = io.BytesIO(body) if isinstance(body, bytes) else str(body)
            with _transfers() as manager:
                manager.upload(source, self.bucket, self.key, extra_args=extra).result()

    def delete(self) -> None:
        _client().delete_object(**self.where)

    def probe(self) -> None:
        client = _connect(attempts=2, timeout=5)
        client.put_object(**self.where, Body=b"")
        with contextlib.suppress(boto.ClientError):
            client.delete_object(**self.where)

    def _create(self, body: Path | bytes, extra: dict[str, Any]) -> None:
        extra["Metadata"][_PUT_ID] = uuid.uuid4().hex
        try:
            with _stream(body) as stream:
                _client().put_object(**self.where, Body=stream, IfNoneMatch="*", **extra)
        except boto.ClientError as error:
            if _status(error) not in (409, 412):
                raise
            # A first try may have arrived though its answer was lost; the retry then meets our own object.
            if (self._head() or {}).get("Metadata", {}).get(_PUT_ID) != extra["Metadata"][_PUT_ID]:
                raise _taken(self.uri) from error

    def _head(self) -> dict[str, Any] | None:
        try:
            return _client().head_object(**self.where)
        except boto.ClientError as error:
            if _status(error) == 404:
                self._check_bucket()
                return None
            if _status(error) in (400, 403):
                # An answer to HEAD has no body and so no reason; that to GET has.
                _client().get_object(**self.where, Range="bytes=0-0")
            raise

    def _check_bucket(self) -> None:
        """HEAD says 404 for an absent object and for an absent bucket; once per bucket, find out which."""
        known = _connection().buckets
        if self.bucket not in known:
            try:
                _client().head_bucket(Bucket=self.bucket)
            except boto.ClientError as error:
                if _status(error) == 404:
                    raise _no_bucket(self.uri) from error
            known.add(self.bucket)


class _Pinned(BaseSubscriber):
    """Tells a transfer the size and ETag that were seen, so that every range belongs to that version."""

    def __init__(self, info: ObjectInfo) -> None:
        self.info = info

    def on_queued(self, future: Any, **_: Any) -> None:
        """Called by the transfer before its first request."""
        future.meta.provide_transfer_size(self.info.size)
        future.meta.provide_object_etag(f'"{self.info.etag}"')


def _transfers() -> TransferManager:
    parts = {"multipart_threshold": PART_BYTES, "multipart_chunksize": PART_BYTES}
    return TransferManager(_client(), TransferConfig(**parts, max_request_concurrency=8))


def _object_info(uri: str, size: int, item: Mapping[str, Any]) -> ObjectInfo:
    modified = item["LastModified"].astimezone(UTC)
    return ObjectInfo(uri, size, item["ETag"].strip('"'), modified, _decode(item.get("Metadata", {})))


def _encode(value: str) -> str:
    """Header-safe ASCII; blanks as well, because signatures fold them and servers strip them."""
    return quote(value, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~")


def _decode(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key.lower(): unquote(value) for key, value in metadata.items() if key.lower() != _PUT_ID}


# ---- The connection to S3

_CLIENT_ENVIRONMENT = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_CA_BUNDLE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_MAX_ATTEMPTS"),
    *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
)


@dataclass
class _Connection:
    made_for: int
    client: Any
    buckets: set[str] = field(default_factory=set)  # those known to exist


_lock = threading.Lock()
_current: _Connection | None = None


def s3_client() -> Any:
    """This process's boto3 client for S3: made at first use, anew after a fork or a changed variable."""
    with _errors("s3://"):
        return _client()


def _client() -> Any:
    return _connection().client


def _connection() -> _Connection:
    global _current
    wanted = hash((os.getpid(), *map(os.environ.get, _CLIENT_ENVIRONMENT)))
    with _lock:
        if _current is None or _current.made_for != wanted:
            _current = _Connection(wanted, _connect(attempts=5, timeout=10))
        return _current


def _connect(attempts: int, timeout: int) -> Any:
    # Its own session: the default one is neither thread-safe nor does it notice new credentials.
    session = boto3.session.Session()
    limit = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"total_max_attempts": attempts}
    config = Config(
        retries={"mode": "standard", **limit},
        connect_timeout=timeout,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    # For a custom endpoint botocore uses path-style addresses; a region matters little there but must be set.
    region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
    try:
        return session.client("s3", region_name=region, config=config)
    except ValueError as error:
        raise StorageError("AWS_ENDPOINT_URL: not a URL; write it like https://host:port") from error


def _forget_connection() -> None:
    global _lock, _current
    _lock, _current = threading.Lock(), None  # the parent's lock may have been held at the fork


os.register_at_fork(after_in_child=_forget_connection)


# ---- Errors: the one place where foreign exceptions become ours

_BOTO = (boto.BotoCoreError, boto.ClientError, RetriesExceededError, S3DownloadFailedError, HTTPError)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
_NO_CREDENTIALS += (boto.TokenRetrievalError, boto.NoAuthTokenError, boto.SSOError)
_REMEDY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role"
_BROKEN_OFF = (RetriesExceededError, boto.IncompleteReadError, HTTPError)
# In order: the first that fits speaks.
_CAUSES: tuple[tuple[Any, type[StorageError], str], ...] = (
    (boto.ProfileNotFound, AccessDeniedError, "AWS_PROFILE names no profile; correct or unset it"),
    (_NO_CREDENTIALS, AccessDeniedError, f"no credentials found; {_REMEDY}"),
    (boto.SSLError, UnreachableError, "certificate of {endpoint} not trusted; set AWS_CA_BUNDLE"),
    (boto.ReadTimeoutError, UnreachableError, "no answer from {endpoint} in time; try again later"),
    (boto.HTTPClientError, UnreachableError, "cannot reach endpoint {endpoint}; check AWS_ENDPOINT_URL"),
    (boto.ConnectionError, UnreachableError, "cannot reach endpoint {endpoint}; check AWS_ENDPOINT_URL"),
    (_BROKEN_OFF, UnreachableError, "answers of {endpoint} broke off; try again later"),
    (boto.FlexibleChecksumError, CorruptError, "the checksum does not match; write the object again"),
    (boto.ParamValidationError, StorageError, "not a valid bucket or key; correct the URI"),
    (S3DownloadFailedError, _ReplacedError, "replaced while being read; try again"),
    (_BOTO, StorageError, "{kind}; check the AWS configuration"),
    (FileNotFoundError, NotFoundError, "{file}no such file; check the path"),
    (PermissionError, AccessDeniedError, "{file}no permission; check owner and mode"),
    (OSError, StorageError, "{file}{reason}; check path and disk"),
)
_DENIED = {
    "ExpiredToken": "renew the credentials",
    "InvalidToken": "renew AWS_SESSION_TOKEN, or unset it",
    "RequestTimeTooSkewed": "set this machine's clock",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, and that AWS_ENDPOINT_URL is the store that issued it",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
}


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (*_BOTO, OSError) as error:
        raise _translate(error, uri) from error


def _translate(error: Exception, uri: str) -> StorageError:
    if isinstance(error, boto.ClientError):
        return _translate_answer(error, uri)
    file = getattr(error, "filename", None)
    facts = {
        "endpoint": _endpoint(error),
        "kind": type(error).__name__,
        "file": f"{file}: " if file and str(file) != uri else "",
        "reason": getattr(error, "strerror", None),
    }
    ours, text = next((ours, text) for kind, ours, text in _CAUSES if isinstance(error, kind))
    return ours(f"{uri}: {text.format(**facts)}")


def _translate_answer(error: boto.ClientError, uri: str) -> StorageError:
    status, code = _status(error), error.response.get("Error", {}).get("Code", "")
    answer = f"{status}" if code in ("", str(status)) else f"{status} {code}"
    if code == "NoSuchBucket":
        return _no_bucket(uri)
    if status == 404:
        return NotFoundError(f"{uri}: no such object; check the URI")
    if status in (401, 403) or code in _DENIED:
        remedy = _DENIED.get(code, "check the credentials, the role and the bucket's policy")
        return AccessDeniedError(f"{uri}: access denied ({answer}); {remedy}")
    if status == 412:
        return _ReplacedError(f"{uri}: replaced while being read; try again")
    if status in (429, 500, 502, 503, 504):
        return UnreachableError(
            f"{uri}: {_endpoint(error)} is failing or overloaded ({answer}); try again later"
        )
    if status in (411, 501):
        remedy = "for an older store set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        return StorageError(f"{uri}: the store does not know such a request ({answer}); {remedy}")
    return StorageError(f"{uri}: the store refused ({answer}); check AWS_DEFAULT_REGION, bucket and key")


def _no_bucket(uri: str) -> BucketMissingError:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    return BucketMissingError(f"{uri}: no such bucket {bucket!r}; create it or correct the bucket in the URI")


def _taken(uri: str) -> AlreadyExistsError:
    return AlreadyExistsError(f"{uri}: exists already; delete it or choose another name")


def _status(error: boto.ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _endpoint(error: Exception) -> str:
    """Scheme and host alone: a URL in the environment may hold a password."""
    ours = _current.client.meta.endpoint_url if _current else ""
    parts = urlsplit(getattr(error, "kwargs", {}).get("endpoint_url") or ours)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the store"
