"""URIs and what they name: shared by both backends."""

import io
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from segcloud.storage.errors import StorageError

PROBE = ".segcloud-write-probe"
# Beside a local file stand its metadata and, for a moment, its successor; a probe may stay in a bucket.
HIDDEN = re.compile(r"\.(.+\.[0-9a-f]{32}\.part|.+\.[0-9a-f]+-[0-9a-f]+\.meta\.json|segcloud-write-probe)")


@dataclass(frozen=True)
class ObjectInfo:
    """What the store says of one object."""

    uri: str
    size: int
    etag: str  # differs whenever the content was replaced; of a local file: its size and time
    modified: datetime  # UTC
    metadata: dict[str, str] = field(default_factory=dict)  # filled by `stat`, not by `list_objects`


def is_s3(uri: str) -> bool:
    """Whether a URI names something in object storage (else: a local path)."""
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """The path behind a local URI; a scheme other than `file` is refused."""
    path = uri
    if uri.startswith("file://"):
        path = unquote(urlsplit(uri).path) if urlsplit(uri).netloc in ("", "localhost") else ""
    if "://" in path or not path or not _storable(path):
        raise StorageError(f"{uri!r}: not an S3 URI or a path; use s3://bucket/key, /path or file:///path")
    return Path(path)


def absolute(uri: str) -> str:
    """The same place for processes with other working directories: local paths made absolute."""
    return uri if is_s3(uri) else str(local_path(uri).absolute())


def join(uri: str, *parts: str) -> str:
    """`uri` extended by names or relative paths.

    A part that is absolute or empty, has a `.` or `..` segment or a control character, is refused: whatever
    a part is made of, the result lies inside `uri`.
    """
    base = uri if is_s3(uri) else str(local_path(uri))
    for part in parts:
        check_key(part, uri)
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


def check_key(key: str, uri: str) -> None:
    """Refuse a key that is empty, leaves `uri`, or that some backend cannot store."""
    if not all(segment not in ("", ".", "..") and _storable(segment) for segment in key.split("/")):
        raise StorageError(f"{uri}: {key!r} is not a name inside it; use relative parts without '..'")


def _storable(text: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def opened(body: Path | bytes) -> BinaryIO:
    """What is to be put, as a stream."""
    return io.BytesIO(body) if isinstance(body, bytes) else body.open("rb")
