"""Objects in a bucket, and this process's connection to S3."""
# ruff: noqa: D102 -- what the methods do, the functions of the same name in __init__.py say.

import contextlib
import functools
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import boto3
from botocore import exceptions as boto
from botocore.config import Config
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber
from urllib3.exceptions import HTTPError

from segcloud.storage import errors
from segcloud.storage.uri import ObjectInfo, check_key, opened

MULTIPART_BYTES = 64 * 2**20  # larger objects go up in parts, in parallel
PART_BYTES = 16 * 2**20
CREATE_BYTES = 5 * 2**30  # what S3 takes in one request; only one request can be conditional
METADATA_BYTES = 2048  # what S3 keeps per object
_PUT_ID = "put-id"  # metadata that tells our own earlier try from another writer's object


class S3Object:
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
                yield _info(f"s3://{self.bucket}/{item['Key']}", item["Size"], item)
        if not items and self.key != folder and (info := self.stat()):
            yield info

    def stat(self) -> ObjectInfo | None:
        head = self._head()
        return head and _info(self.uri, head["ContentLength"], head)

    def read(self, start: int, length: int | None) -> tuple[bytes, str | None]:
        last = "" if length is None else start + length - 1
        part = {"Range": f"bytes={start}-{last}"} if start or length else {}
        try:
            answer = _client().get_object(**self.where, **part)
        except boto.ClientError as error:
            if errors.http_status(error) != 416:
                raise
            return b"", None  # the range begins behind the end
        try:
            return answer["Body"].read(), _decode(answer.get("Metadata", {})).get("sha256")
        except (boto.IncompleteReadError, boto.HTTPClientError, HTTPError, OSError) as error:
            raise errors.BrokenBodyError(f"{self.uri}: the answer broke off; try again later") from error

    def open(self, info: ObjectInfo) -> BinaryIO:
        import smart_open.s3  # slow to import, and few commands stream

        # Not smart_open.open(uri): it would take `?versionId=` and `user:password@` out of a key.
        pinned = {"S3.Client.get_object": {"IfMatch": f'"{info.etag}"'}}
        return smart_open.s3.open(self.bucket, self.key, "rb", client=_client(), client_kwargs=pinned)

    def download(self, info: ObjectInfo, target: BinaryIO) -> None:
        with _transfers() as manager:
            manager.download(self.bucket, self.key, target, subscribers=[_Pinned(info)]).result()

    def put(self, body: Path | bytes, metadata: dict[str, str], if_absent: bool, kind: str | None) -> None:
        check_key(self.key, f"s3://{self.bucket}")
        extra: dict[str, Any] = {"Metadata": {key: _encode(value) for key, value in metadata.items()}}
        extra |= {"ContentType": kind} if kind else {}
        if if_absent:
            self._create(body, extra)
        elif isinstance(body, bytes) and len(body) <= MULTIPART_BYTES:
            _client().put_object(**self.where, Body=body, **extra)
        else:
            source = opened(body) if isinstance(body, bytes) else str(body)
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
            with opened(body) as stream:
                _client().put_object(**self.where, Body=stream, IfNoneMatch="*", **extra)
        except boto.ClientError as error:
            if errors.http_status(error) not in (409, 412):
                raise
            # A first try may have arrived though its answer was lost; the retry then meets our own object.
            if (self._head() or {}).get("Metadata", {}).get(_PUT_ID) != extra["Metadata"][_PUT_ID]:
                raise errors.already_exists(self.uri) from error

    def _head(self) -> dict[str, Any] | None:
        try:
            return _client().head_object(**self.where)
        except boto.ClientError as error:
            if errors.http_status(error) == 404:
                _check_bucket(_client(), self.bucket)
                return None
            if errors.http_status(error) in (400, 403):
                # An answer to HEAD has no body and so no reason; that to GET has.
                _client().get_object(**self.where, Range="bytes=0-0")
            raise


class _Pinned(BaseSubscriber):
    """Tells a transfer the size and ETag that were seen, so that every range belongs to that version."""

    def __init__(self, info: ObjectInfo) -> None:
        self.info = info

    def on_queued(self, future: Any, **_: Any) -> None:
        """Called by the transfer before its first request."""
        future.meta.provide_transfer_size(self.info.size)
        future.meta.provide_object_etag(f'"{self.info.etag}"')


@functools.lru_cache
def _check_bucket(client: Any, bucket: str) -> None:
    """HEAD says 404 for an absent object and for an absent bucket; once per bucket, find out which."""
    try:
        client.head_bucket(Bucket=bucket)
    except boto.ClientError as error:
        if errors.http_status(error) == 404:
            raise


def _transfers() -> TransferManager:
    parts = {"multipart_threshold": PART_BYTES, "multipart_chunksize": PART_BYTES}
    return TransferManager(_client(), TransferConfig(**parts, max_request_concurrency=8))


def _info(uri: str, size: int, item: Mapping[str, Any]) -> ObjectInfo:
    modified = item["LastModified"].astimezone(UTC)
    return ObjectInfo(uri, size, item["ETag"].strip('"'), modified, _decode(item.get("Metadata", {})))


def check_metadata(metadata: Mapping[str, str], uri: str) -> None:
    """Refuse what S3 cannot keep, on every backend."""
    for key in metadata:
        if not re.fullmatch(r"[a-z0-9-]+", key) or key == _PUT_ID:
            raise errors.StorageError(f"{uri}: metadata cannot be named {key!r}; use a-z, 0-9 and '-'")
    used = sum(len(key) + len(_encode(value)) for key, value in metadata.items()) + len(_PUT_ID) + 32
    if used > METADATA_BYTES:
        raise errors.StorageError(f"{uri}: {used} bytes of metadata, S3 keeps {METADATA_BYTES}; shorten it")


def _encode(value: str) -> str:
    """Header-safe ASCII; blanks as well, because signatures fold them and servers strip them."""
    return quote(value, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~")


def _decode(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key.lower(): unquote(value) for key, value in metadata.items() if key.lower() != _PUT_ID}


_lock = threading.Lock()
_current: tuple[int, Any] | None = None  # a hash of the environment, and the client that it describes


def s3_client() -> Any:
    """This process's boto3 client for S3: made at first use, anew after a fork or a changed variable."""
    with errors.translated("s3://", endpoint):
        return _client()


def endpoint() -> str:
    """The URL of the store; empty before the first connection."""
    return _current[1].meta.endpoint_url if _current else ""


def _client() -> Any:
    global _current
    wanted = hash(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))
    with _lock:
        if _current is None or _current[0] != wanted:
            _current = wanted, _connect(attempts=5, timeout=10)
        return _current[1]


def _connect(attempts: int, timeout: int) -> Any:
    # Its own session: the default one is neither thread-safe nor does it notice new credentials.
    session = boto3.session.Session()
    retries = {"mode": "standard"}
    retries |= {} if "AWS_MAX_ATTEMPTS" in os.environ else {"total_max_attempts": attempts}
    config = Config(
        retries=retries, connect_timeout=timeout, read_timeout=60, max_pool_connections=32, tcp_keepalive=True
    )
    # For a custom endpoint botocore uses path-style addresses; a region matters little there but must be set.
    region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
    try:
        return session.client("s3", region_name=region, config=config)
    except ValueError as error:
        raise errors.StorageError("AWS_ENDPOINT_URL: not a URL; write it like https://host:port") from error


def _forget_client() -> None:
    global _lock, _current
    _lock, _current = threading.Lock(), None  # the parent's lock may have been held at the fork


os.register_at_fork(after_in_child=_forget_client)
