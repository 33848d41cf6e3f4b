"""Checkpoints to resume from, and the best model to infer with, both without trusting pickle.

A checkpoint is written to local disk, uploaded as one object by a background thread with its sha256, and
found again as the newest one that is whole. The best model is a safetensors file: weights, and the config in
its header. Ray Train's own checkpoint upload is not used: it ends a run on an upload error, and a checkpoint
that it has listed but that is damaged makes the run unusable.
"""

import hashlib
import json
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch raises for a file that weights_only refuses
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import nn

from segcloud import __version__, storage
from segcloud.config import PLACES, Config, from_dict
from segcloud.errors import SegcloudError
from segcloud.model.network import build_network

BEST_NAME = "best_model.safetensors"
FOLDER = "checkpoints"


class ModelError(SegcloudError):
    """The model cannot be loaded."""


class Uploader:
    """A background thread that does storage work in order; a failure is told, never raised into training.

    Args:
        tell: called with one line when something failed.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._jobs: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()
        self.failures = 0

    def submit(self, what: str, job: Callable[[], Any]) -> None:
        """Queue a job; `what` names it in a failure's line."""
        self._jobs.put((what, job))

    def _run(self) -> None:
        while True:
            what, job = self._jobs.get()
            try:
                job()
            except Exception as error:  # training goes on whatever an upload does
                self.failures += 1
                self._tell(f"warning: {what} was not stored: {error}")
            finally:
                self._jobs.task_done()

    def flush(self) -> None:
        """Wait until everything queued so far is done."""
        self._jobs.join()


class CheckpointStore:
    """The checkpoints of one run, newest `keep` kept.

    Args:
        run_uri: the run's folder.
        keep: how many to keep.
        uploader: does the writing in the background.
    """

    def __init__(self, run_uri: str, keep: int, uploader: Uploader):
        self.run_uri, self.keep, self.uploader = run_uri, keep, uploader

    def save(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Snapshot the state now, upload it in the background."""
        folder = Path(tempfile.mkdtemp(prefix="segcloud-checkpoint-"))
        path = folder / f"epoch_{epoch:05d}.pt"
        torch.save(dict(state), path)
        self.uploader.submit(f"checkpoint of epoch {epoch}", lambda: self._upload(path))

    def _upload(self, path: Path) -> None:
        try:
            storage.put(path, storage.join(self.run_uri, FOLDER, path.name))
        finally:
            path.unlink(missing_ok=True)
            path.parent.rmdir()
        for old in _newest_first(self.run_uri)[self.keep :]:
            storage.delete(old)


def _newest_first(run_uri: str) -> list[str]:
    try:
        found = [info.uri for info in storage.list_objects(storage.join(run_uri, FOLDER), suffix=".pt")]
    except storage.NotFoundError:
        return []
    return sorted(found, reverse=True)


def load_latest(run_uri: str, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is whole, or None; damaged ones are told about and passed over.

    Raises:
        StorageError: the run's folder cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="segcloud-resume-") as folder:
        for uri in _newest_first(run_uri):
            path = Path(folder) / storage.name(uri)
            try:
                storage.fetch(uri, path)  # compares the sha256 in the object's metadata
                return torch.load(path, map_location="cpu", weights_only=True)
            except (
                storage.CorruptError,
                UnpicklingError,
                RuntimeError,
                EOFError,
                ValueError,
                KeyError,
            ) as error:
                tell(f"warning: {uri} is damaged or refused ({type(error).__name__}); trying the one before")
    return None


def encode_model(weights: Mapping[str, torch.Tensor], config: Config, info: Mapping[str, Any]) -> bytes:
    """The bytes of a model file.

    Args:
        weights: the network's state, on the CPU.
        config: kept in the header, so that inference prepares scans as training did; without the places of
            data and run, which are nobody's business where the model goes.
        info: epoch, Dice and the like; JSON-compatible.
    """
    kept = config.to_dict()
    for section, names in PLACES.items():
        for name in names:
            kept[section].pop(name)
    header = {"config": kept, "info": dict(info), "version": __version__}
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    return save(tensors, metadata={"segcloud": json.dumps(header)})


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        network: in evaluation mode, on the CPU.
        config: the config it was trained with.
        info: epoch, Dice and the like.
        digest: sha256 of the file.
        uri: where it came from.
    """

    network: nn.Module
    config: Config
    info: dict[str, Any]
    digest: str
    uri: str


def model_uri(uri: str) -> str:
    """The model file of a run's folder, or the file itself."""
    return uri if uri.endswith(".safetensors") else storage.join(uri, BEST_NAME)


def load_model(uri: str) -> Model:
    """Load the best model of a run, or a model file.

    Raises:
        ModelError: absent, damaged, or not written by segcloud.
        StorageError: it cannot be read.
    """
    uri = model_uri(uri)
    try:
        data = storage.read(uri)
    except storage.NotFoundError:
        raise ModelError(f"{uri}: no model there; train one with jobs/train.py, or correct --model") from None
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["segcloud"])
        config = from_dict(header["config"], origin=storage.name(uri))
        network = build_network(config)
        network.load_state_dict(load(data))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{uri}: not a segcloud model, or damaged ({type(error).__name__}); copy it again or train anew"
        ) from None
    return Model(network.eval(), config, header["info"], hashlib.sha256(data).hexdigest(), uri)
