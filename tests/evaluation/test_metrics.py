"""Overlap metrics agree with MONAI and with numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_iou

from segcloud.evaluation.metrics import finite_mean, mean_dice, overlap, score, volume_ml


def _box(*spans, shape=(10, 10, 10)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*span) for span in spans)] = True
    return mask


def test_two_boxes_by_hand():
    a, b = _box((0, 4), (0, 4), (0, 4)), _box((2, 6), (0, 4), (0, 4))  # 64 voxels each, 32 shared
    assert overlap(a, b) == (64 / 128, 32 / 96)


def test_random_masks_agree_with_monai():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.random((2, 9, 8, 7)) > 0.6
        mine = overlap(a, b)
        ta, tb = torch.from_numpy(a)[None, None].float(), torch.from_numpy(b)[None, None].float()
        assert mine[0] == pytest.approx(compute_dice(tb, ta).item(), abs=1e-6)
        assert mine[1] == pytest.approx(compute_iou(tb, ta).item(), abs=1e-6)


def test_an_empty_truth_is_undefined_and_an_empty_prediction_is_zero():
    empty, box = _box((0, 0), (0, 0), (0, 0)), _box((0, 2), (0, 2), (0, 2))
    assert all(math.isnan(v) for v in overlap(empty, empty) + overlap(empty, box))
    assert overlap(box, empty) == (0, 0)


def test_masks_on_two_grids_are_refused():
    with pytest.raises(ValueError, match="not on one grid"):
        overlap(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool))


def test_means_leave_undefined_values_out():
    assert finite_mean([1.0, math.nan, 0.5]) == 0.75
    assert math.isnan(finite_mean([math.nan]))


def test_volume_counts_millilitres_of_any_orientation():
    affine = np.array([[0, 0, -2.0, 0], [1, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 1]])
    assert volume_ml(_box((0, 10), (0, 10), (0, 10)), affine) == pytest.approx(1000 * 10 / 1000)


def test_a_row_names_every_organ_and_its_mean_leaves_undefined_ones_out():
    truth, prediction = np.zeros((2, 4, 4, 4), np.uint8)
    truth[0], prediction[:2] = 1, 1  # organ 1: half of the prediction; organ 2: absent
    row = score(truth, prediction, ["spleen", "liver"], np.diag([10.0, 10, 10, 1]))
    assert row["dice_spleen"] == pytest.approx(2 * 16 / (16 + 32))
    assert (row["truth_ml_spleen"], row["prediction_ml_spleen"]) == pytest.approx((16, 32))
    assert math.isnan(row["dice_liver"])
    assert mean_dice(row) == row["dice_spleen"]
