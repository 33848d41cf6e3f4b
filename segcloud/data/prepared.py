"""Prepared volumes: what training reads, made once per case and config.

One safetensors file per case holds the image on the network's grid (float16 or uint8), the class label, the
flat indices of the organ voxels for class-balanced sampling, and the geometry to go back. It is mapped: a crop
reads its own pages and nothing else, and all workers of a node share the page cache.

Two tiers: the shared store (object storage or a folder, keyed by source, transform config and code version)
and a node-local copy of at most ``prepare.cache_gb``, which drops the volumes of other runs, oldest use first.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import monai
import numpy as np
from filelock import FileLock
from safetensors.numpy import save_file

from segcloud import __version__, storage
from segcloud.config import Config, PrepareConfig, digest
from segcloud.data import nifti, transforms
from segcloud.data.cases import Case
from segcloud.data.nifti import BadScan
from segcloud.errors import SegcloudError

SUFFIX = ".safetensors"
MAX_FOREGROUND = 1_000_000
"""Organ voxels kept for sampling; a larger organ is thinned evenly, which changes no class's share."""
ABANDONED_S = 24 * 3600
_MAKING = ".making-"
_DTYPES = {"F16": np.float16, "U8": np.uint8, "I32": np.int32}


class CacheFullError(SegcloudError):
    """The node-local disk cannot hold even one more prepared volume."""


@dataclass(frozen=True)
class PreparedRef:
    """Where a prepared volume is; small enough to send to every worker.

    Attributes:
        case: the case it was made from.
        uri: its place in the shared store.
        size: bytes.
    """

    case: Case
    uri: str
    size: int


class PreparedVolume:
    """A memory-mapped prepared volume.

    Attributes:
        image: [X, Y, Z] float16 (0..1) or uint8 (0..255 for 0..1), mapped.
        label: [X, Y, Z] uint8 class indices, mapped.
        foreground: int32 flat indices into the volume of organ voxels, mapped.
        geometry: what :func:`segcloud.data.transforms.to_source` needs (its arrays are not filled).
    """

    def __init__(self, path: Path):
        arrays, metadata = _map(path)
        self.path = path
        self.image, self.label, self.foreground = arrays["image"], arrays["label"], arrays["foreground"]
        geometry = json.loads(metadata["geometry"])
        self.geometry = transforms.Prepared(
            image=np.empty(0, np.float32),
            label=None,
            affine=np.array(geometry["affine"]),
            source_shape=tuple(geometry["source_shape"]),
            source_affine=np.array(geometry["source_affine"]),
            box=np.array(geometry["box"]),
        )

    def decode(self, region: tuple[slice, ...] = (slice(None),) * 3) -> np.ndarray:
        """The image in a region as float32 in 0..1."""
        part = self.image[region].astype(np.float32)
        return part * np.float32(1 / 255) if self.image.dtype == np.uint8 else part


def _map(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Memory-map every tensor of a safetensors file (8-byte header length, JSON header, raw data)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        offset = 8 + length + entry["data_offsets"][0]
        empty = 0 in shape  # an empty tensor has no pages to map
        arrays[name] = np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", offset, shape)
    return arrays, metadata


def key(case: Case, image: storage.ObjectInfo, label: storage.ObjectInfo, config: Config) -> str:
    """File name of a case's prepared volume: changes with the sources, the config and the code."""
    identity = {
        "image": [image.uri, image.etag, image.size],
        "label": [label.uri, label.etag, label.size],
        "prepare": config.prepare.model_dump(mode="json", exclude={"uri", "cache_dir", "cache_gb"}),
        "labels": list(config.data.labels.values()),
        "version": [transforms.VERSION, monai.__version__],
    }
    return f"{case.id}-{digest(identity)[:20]}{SUFFIX}"


def write(path: Path, prepared: transforms.Prepared, dtype: str, source: dict[str, str]) -> None:
    """Write a prepared volume to a local file.

    Args:
        path: target.
        prepared: with a label.
        dtype: ``float16`` or ``uint8``.
        source: provenance to keep in the file.
    """
    assert prepared.label is not None  # noqa: S101 - for the type checker
    # C order throughout: an oriented array may be a transposed view, and safetensors writes the buffer as it lies
    if dtype == "uint8":
        image = np.rint(np.clip(prepared.image, 0, 1) * 255).astype(np.uint8, order="C")
    else:
        image = prepared.image.astype(np.float16, order="C")
    foreground = np.flatnonzero(prepared.label)
    if len(foreground) > MAX_FOREGROUND:
        foreground = foreground[np.linspace(0, len(foreground) - 1, MAX_FOREGROUND).astype(np.int64)]
    geometry = {
        name: np.asarray(value).tolist()
        for name, value in asdict(prepared).items()
        if name in ("affine", "source_shape", "source_affine", "box")
    }
    save_file(
        {
            "image": image,
            "label": np.ascontiguousarray(prepared.label),
            "foreground": foreground.astype(np.int32),
        },
        path,
        metadata={"geometry": json.dumps(geometry), "segcloud": __version__, **source},
    )


def read_scan(uri: str) -> nifti.Volume:
    """Read and decode one file.

    Raises:
        BadScan: it cannot be used; code ``unreadable`` where the store holds it back or has lost it.
        StorageError: the store cannot be reached at all.
    """
    try:
        return nifti.decode(storage.read(uri))
    except (storage.NotFoundError, storage.AccessDeniedError, storage.CorruptError) as error:
        raise BadScan("unreadable", str(error)) from None


class PreparedStore:
    """The shared store and this node's copy of it.

    Args:
        uri: shared store, s3:// or a folder (then nothing is copied).
        config: cache folder and budget.
    """

    def __init__(self, uri: str, config: PrepareConfig):
        self.uri = uri
        self._cache_dir = config.cache_dir
        self.budget = int(config.cache_gb * 1e9)

    @property
    def cache(self) -> Path:
        """This node's folder: asked for where it is used, since nodes differ in environment and disks."""
        default = os.environ.get("SEGCLOUD_CACHE") or Path.home() / ".cache" / "segcloud"
        return Path(self._cache_dir or default) / "prepared"

    def check_budget(self, refs: Iterable[PreparedRef]) -> None:
        """Refuse a dataset whose node-local copy would pass the budget: workers keep all of it mapped.

        Raises:
            CacheFullError: names the size and the field to raise.
        """
        size = sum(ref.size for ref in refs)
        if storage.is_s3(self.uri) and size > self.budget:
            raise CacheFullError(
                f"the prepared volumes of this run fill {size / 1e9:.2f} GB on each node, the budget is "
                f"{self.budget / 1e9:.2f} GB; raise prepare.cache_gb, or store them as prepare.dtype=uint8"
            )

    def existing(self) -> dict[str, int]:
        """File name → size of every prepared volume in the shared store."""
        try:
            found = storage.list_objects(self.uri, suffix=SUFFIX)
            return {storage.name(info.uri): info.size for info in found}
        except storage.NotFoundError:
            return {}

    def publish(self, case: Case, name: str, config: Config) -> PreparedRef:
        """Read, check, transform and store one case.

        Raises:
            BadScan: the case cannot be used, its files cannot be read.
            StorageError: the store cannot be reached or written.
        """
        assert case.label  # noqa: S101 - for the type checker
        image = read_scan(case.image)
        try:
            label = read_scan(case.label)
        except BadScan as bad:
            raise BadScan(f"label_{bad.code}", f"the label map: {bad.message}") from None
        prepared = transforms.prepare(image, label, config.prepare, config.data.labels)
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix=_MAKING) as folder:
            path = Path(folder) / name
            write(path, prepared, config.prepare.dtype, {"source": case.image, "label": case.label})
            info = storage.put(path, storage.join(self.uri, name))
            if storage.is_s3(self.uri):
                self._make_room(info.size)
                path.replace(self.cache / name)  # the node that made it need not fetch it again
        return PreparedRef(case, info.uri, info.size)

    def open(self, ref: PreparedRef) -> PreparedVolume:
        """Map a prepared volume, fetching it to this node first if it is not there.

        Raises:
            StorageError: it cannot be fetched, or arrives damaged.
            CacheFullError: the local disk is too small for it.
        """
        if not storage.is_s3(ref.uri):
            return PreparedVolume(Path(ref.uri.removeprefix("file://")))
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / storage.name(ref.uri)
        with FileLock(f"{path}.lock"):  # one download per node, whoever comes first
            if not path.exists() or path.stat().st_size != ref.size:
                self._make_room(ref.size)
                storage.fetch(ref.uri, path)
            os.utime(path)  # newest use, for the eviction order
            return PreparedVolume(path)  # mapped under the lock: an eviction from now on takes only the name

    def _make_room(self, size: int) -> None:
        """Evict the least recently used volumes of other runs until `size` bytes fit budget and disk."""
        with FileLock(self.cache / ".evict.lock"):
            self._remove_abandoned()
            files = sorted(self.cache.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime)
            held = sum(p.stat().st_size for p in files)
            while files and (held + size > self.budget or self._free() < size):
                held -= files[0].stat().st_size
                files.pop(0).unlink()
            if held + size > self.budget or self._free() < size:
                raise CacheFullError(
                    f"{self.cache}: no room for a prepared volume of {size / 1e9:.2f} GB "
                    f"(budget {self.budget / 1e9:.2f} GB, disk free {self._free() / 1e9:.2f} GB); "
                    "raise prepare.cache_gb, or point prepare.cache_dir to a larger disk"
                )

    def _free(self) -> int:
        return shutil.disk_usage(self.cache).free

    def _remove_abandoned(self) -> None:
        """Remove what killed tasks left behind."""
        for folder in self.cache.glob(f"{_MAKING}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
