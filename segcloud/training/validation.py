"""Validation sharded over the ranks: on the prepared grid while training, on the native grid at the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from torch import nn

from segcloud import storage
from segcloud.config import Config
from segcloud.data import nifti, transforms
from segcloud.data.cases import Case
from segcloud.data.prepared import PreparedVolume
from segcloud.evaluation.metrics import finite_mean, overlap, score
from segcloud.inference.predictor import Predictor
from segcloud.training.ranks import Ranks


@dataclass(frozen=True)
class ValidationCase:
    """One validation case as a rank sees it."""

    case: Case
    volume: PreparedVolume


def validate(
    network: nn.Module, mine: Sequence[ValidationCase], config: Config, ranks: Ranks
) -> dict[str, float | None]:
    """Mean Dice and IoU over all ranks' cases and all organs, on the prepared grid.

    Args:
        network: not wrapped in DDP, on the ranks' device.
        mine: this rank's share of the cases.
        config: windows and precision.
        ranks: gathers the shares.

    Returns:
        ``val_dice`` and ``val_iou``, and with several organs ``val_dice_<organ>``; None where no case holds
        the organ. The same on every rank.
    """
    predictor = Predictor(network, config, ranks.device)
    scores = []
    for item in mine:
        predicted, truth = predictor.classes(item.volume.decode()), np.asarray(item.volume.label)
        scores.append([overlap(truth == c, predicted == c) for c in range(1, config.num_classes)])
    table = np.array(ranks.gather(scores))  # [cases, organs, 2]; float64, in rank order on every rank
    result = {"val_dice": _mean(table[..., 0]), "val_iou": _mean(table[..., 1])}
    if config.num_classes > 2:
        for index, organ in enumerate(config.data.labels):
            result[f"val_dice_{organ}"] = _mean(table[:, index, 0])
    return result


def _mean(values: np.ndarray) -> float | None:
    mean = finite_mean(values.ravel().tolist())
    return None if math.isnan(mean) else mean


@dataclass(frozen=True)
class NativeScore:
    """The best model on one validation case's own grid.

    Attributes:
        row: case, and per organ Dice, IoU and volumes in mL of truth and prediction.
        image: source image [X, Y, Z] in HU.
        truth: label map [X, Y, Z] with the values of ``data.labels``.
        prediction: the same for the prediction.
        affine: float64 4×4 of the source grid.
    """

    row: dict[str, Any]
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Voxel edge lengths in mm, shape [3]."""
        return voxel_sizes(self.affine)


def score_native(predictor: Predictor, item: ValidationCase) -> NativeScore:
    """Score a case against its source label map, where the number counts.

    Raises:
        BadScan: the source cannot be read any more.
        StorageError: likewise.
    """
    assert item.case.label  # noqa: S101 - for the type checker
    image = nifti.decode(storage.read(item.case.image))
    label = nifti.onto_grid(nifti.decode(storage.read(item.case.label)), image.array.shape, image.affine)
    predicted = transforms.to_source(predictor.scores(item.volume.decode()), item.volume.geometry)
    labels = predictor.config.data.labels
    truth = transforms.classes(label, labels)
    row = {"case": item.case.id, **score(truth, predicted, labels, image.affine)}
    return NativeScore(row, image.array, truth, predicted, image.affine)
