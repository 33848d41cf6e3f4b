"""Overlap metrics of two masks, with their definitions."""

import math
from collections.abc import Iterable

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
