"""Overlap metrics of two masks, with their definitions."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def overlap(truth: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    """Dice (Sørensen 1948) and IoU (Jaccard 1912) of two boolean masks of one shape.

    Dice = 2 |T ∩ P| / (|T| + |P|) and IoU = |T ∩ P| / |T ∪ P|. Where the truth is empty both are NaN, as in
    MONAI's ``DiceMetric(ignore_empty=True)``: such a case says nothing about overlap and means leave it out.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} are not on one grid")
    both = int(np.count_nonzero(truth & prediction))
    total, predicted = int(np.count_nonzero(truth)), int(np.count_nonzero(prediction))
    if total == 0:
        return math.nan, math.nan
    return 2 * both / (total + predicted), both / (total + predicted - both)


def finite_mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def volume_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    """Volume of a boolean mask in millilitres; the affine is in millimetres."""
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000)


def score(
    truth: np.ndarray, prediction: np.ndarray, organs: Iterable[str], affine: np.ndarray
) -> dict[str, float]:
    """Dice, IoU and both volumes of every organ.

    Args:
        truth: class indices, 1 for the first organ.
        prediction: likewise, on the same grid.
        organs: names in the order of their class indices.
        affine: 4×4 of the grid, in millimetres.

    Returns:
        ``dice_<organ>``, ``iou_<organ>``, ``truth_ml_<organ>`` and ``prediction_ml_<organ>``.
    """
    row = {}
    for index, organ in enumerate(organs, start=1):
        dice, iou = overlap(truth == index, prediction == index)
        row |= {
            f"dice_{organ}": dice,
            f"iou_{organ}": iou,
            f"truth_ml_{organ}": volume_ml(truth == index, affine),
            f"prediction_ml_{organ}": volume_ml(prediction == index, affine),
        }
    return row


def mean_dice(row: Mapping[str, Any]) -> float:
    """Mean over the organs of a row of :func:`score`; NaN if none is defined."""
    return finite_mean(v for k, v in row.items() if k.startswith("dice_"))
