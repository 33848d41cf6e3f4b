"""Files in a folder as objects."""
# ruff: noqa: D102 -- what the methods do, the functions of the same name in __init__.py say.

import contextlib
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from segcloud.storage.errors import NotFoundError, ReplacedError, already_exists
from segcloud.storage.uri import ObjectInfo, local_path, opened


class LocalFile:
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
                    yield _info(path, path.stat())

    def stat(self) -> ObjectInfo | None:
        status = self._status()
        return status and _info(self.path, status, self._metadata(status))

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
                raise ReplacedError(f"{self.path}: replaced while being read; try again")
            shutil.copyfileobj(stream, target, 2**20)

    def put(self, body: Path | bytes, metadata: dict[str, str], if_absent: bool, kind: str | None) -> None:
        with temporary(self.path) as partial:
            sidecar = self._sidecar(_write(body, partial))
            sidecar.write_text(json.dumps(metadata, sort_keys=True), encoding="utf-8")
            before = None if if_absent else self._status()
            try:
                # A link fails where the name is taken, a rename replaces what has it.
                os.link(partial, self.path) if if_absent else partial.replace(self.path)
            except BaseException as error:
                sidecar.unlink()
                if isinstance(error, FileExistsError):
                    raise already_exists(str(self.path)) from error
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


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A hidden name in the folder of `path` (made if missing) that is gone afterwards, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it may not read


def _write(body: Path | bytes, partial: Path) -> os.stat_result:
    with opened(body) as stream, partial.open("xb") as target:
        shutil.copyfileobj(stream, target, 2**20)
        target.flush()
        os.fsync(target.fileno())
    # The kernel's clock ticks in milliseconds: two racing writers must not share a fingerprint.
    moment = time.time_ns() // 1000 * 1000 + random.randrange(1000)
    os.utime(partial, ns=(moment, moment))
    return partial.stat()


def _fingerprint(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _info(path: Path, status: os.stat_result, metadata: dict[str, str] | None = None) -> ObjectInfo:
    modified = datetime.fromtimestamp(status.st_mtime, UTC)
    return ObjectInfo(str(path), status.st_size, _fingerprint(status), modified, metadata or {})
