"""Class-balanced patches from memory-mapped volumes, the same for any number of workers.

A patch depends only on (seed, epoch, case, number), the order only on (seed, epoch): nothing random is kept
between steps, so a resumed run and a run with another number of workers see the same global batches.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from segcloud.config import AugmentConfig, TrainConfig
from segcloud.data.prepared import PreparedVolume

BACKGROUND_TRIES = 64
LOOK_AHEAD = 2
"""Batches made ahead of the training step; each is a few MB."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        image: float32 [B, 1, *roi] in 0..1.
        label: uint8 [B, 1, *roi] class indices.
    """

    image: torch.Tensor
    label: torch.Tensor


def draw_center(
    volume: PreparedVolume, rng: np.random.Generator, config: TrainConfig
) -> tuple[int, int, int]:
    """A patch's centre: an organ voxel with probability positive / (positive + negative), else background.

    Background is a voxel of label 0 above the lower end of the window, as in MONAI's
    ``RandCropByPosNegLabel(image_threshold=0)``; it is found by rejection, which needs no index of the
    background and draws from the same distribution.
    """
    shape = volume.label.shape
    positive = rng.random() * (config.positive + config.negative) < config.positive
    if positive and len(volume.foreground):
        flat = int(volume.foreground[rng.integers(len(volume.foreground))])
        return tuple(int(i) for i in np.unravel_index(flat, shape))
    candidates = rng.integers(0, shape, size=(BACKGROUND_TRIES, 3))
    for center in candidates:
        index = tuple(center)
        if volume.label[index] == 0 and volume.image[index] > 0:
            break
    return tuple(int(i) for i in index)


def crop(volume: PreparedVolume, center: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32) and label (uint8) of a window around a centre.

    The window is moved inside the volume where it would stick out; an axis shorter than the window is
    padded with 0 (the lower end of the intensity window, background) on both sides.
    """
    region, place = [], []
    for c, n, s in zip(center, volume.label.shape, size, strict=True):
        start = min(max(c - s // 2, 0), max(n - s, 0))
        region.append(slice(start, min(start + s, n)))
        offset = max(s - n, 0) // 2
        place.append(slice(offset, offset + min(s, n)))
    image, label = volume.decode(tuple(region)), np.asarray(volume.label[tuple(region)])
    if image.shape == tuple(size):
        return image, label
    padded, padded_label = np.zeros(size, np.float32), np.zeros(size, np.uint8)
    padded[tuple(place)], padded_label[tuple(place)] = image, label
    return padded, padded_label


def augment(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, config: AugmentConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Random flips and intensity changes of one patch."""
    axes = tuple(np.flatnonzero(rng.random(3) < config.flip))
    if axes:
        image, label = np.flip(image, axes), np.flip(label, axes)
    factor = 1 + config.scale * rng.uniform(-1, 1)
    offset = config.shift * rng.uniform(-1, 1)
    if config.scale or config.shift:
        image = image * np.float32(factor) + np.float32(offset)
    return np.ascontiguousarray(image), np.ascontiguousarray(label)


def steps_per_epoch(config: TrainConfig, cases: int) -> int:
    """Optimizer steps that show every patch of an epoch; the last batch is filled up."""
    return math.ceil(cases * config.samples_per_case / config.batch_size)


class PatchLoader:
    """Batches of an epoch for one rank, made ahead in threads (page faults and casts release the GIL).

    Args:
        volumes: the training volumes, in the same order on every rank.
        config: recipe.
        rank: this worker.
        world_size: number of workers; divides ``train.batch_size``.
        threads: patches made at a time.
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        config: TrainConfig,
        rank: int,
        world_size: int,
        threads: int = 1,
    ):
        self.volumes, self.config = volumes, config
        self.share = config.batch_size // world_size
        self.rank, self.threads = rank, threads

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return steps_per_epoch(self.config, len(self.volumes))

    def order(self, epoch: int) -> np.ndarray:
        """(case, number) of every patch of an epoch, shape [steps, batch_size, 2].

        The last batch is filled from the start of the order, so that all ranks step equally and no case is
        left out.
        """
        rng = np.random.default_rng([self.config.seed, 1, epoch])
        cases, numbers = len(self.volumes), self.config.samples_per_case
        if self.config.shuffle == "cases":
            pairs = np.array([(c, k) for c in rng.permutation(cases) for k in range(numbers)])
        else:
            pairs = rng.permutation(np.array([(c, k) for c in range(cases) for k in range(numbers)]))
        filled = np.resize(np.arange(len(pairs)), self.steps * self.config.batch_size)
        return pairs[filled].reshape(self.steps, self.config.batch_size, 2)

    def patch(self, epoch: int, case: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 and label uint8 of one patch, shape ``roi_size``."""
        rng = np.random.default_rng([self.config.seed, 2, epoch, case, number])
        volume = self.volumes[case]
        image, label = crop(volume, draw_center(volume, rng, self.config), self.config.roi_size)
        return augment(image, label, rng, self.config.augment)

    def _batch(self, epoch: int, pairs: np.ndarray) -> Batch:
        patches = [self.patch(epoch, int(case), int(number)) for case, number in pairs]
        images, labels = zip(*patches, strict=True)
        return Batch(torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(np.stack(labels)[:, None]))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This rank's batches of an epoch, in order."""
        first = self.rank * self.share
        todo = deque(step[first : first + self.share] for step in self.order(epoch))
        ready: deque = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="patches") as pool:
            while todo or ready:
                while todo and len(ready) <= LOOK_AHEAD:
                    ready.append(pool.submit(self._batch, epoch, todo.popleft()))
                yield ready.popleft().result()
