"""The pictures: they open, show the right side on the right side, and mark what they say they mark."""

import io
import math
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from segcloud.report.curves import best_epoch, draw_learning_curves
from segcloud.report.panels import LABEL_COLOUR, PREDICTION_COLOUR, choose_slice, draw_panel

SHAPE = (40, 30, 12)
SPACING = (2.0, 2.0, 5.0)
AFFINE = np.diag([*SPACING, 1.0])  # RAS+


def pixels(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png))[..., :3]


def row(epoch: int, loss: float, val_dice: float | None = None) -> dict:
    iou = None if val_dice is None else val_dice / (2 - val_dice)
    return {"epoch": epoch, "loss": loss, "lr": 1e-3, "seconds": 1.0, "val_dice": val_dice, "val_iou": iou}


def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey tissue in which only one block, right and in front, is bright; mask left and behind."""
    image, label = np.full(SHAPE, 0, np.int16), np.zeros(SHAPE, np.uint8)
    image[28:36, 20:26] = 160
    label[6:14, 4:10, 5:8] = 1
    return image, label, np.roll(label, 1, axis=0)


def panel(image: np.ndarray, label: np.ndarray | None, prediction: np.ndarray, **change) -> bytes:
    options = {"affine": AFFINE, "case": "case", "dice": 0.9, **change}
    return draw_panel(image, label, prediction, options.pop("spacing", SPACING), **options)


def near(picture: np.ndarray, colour: str) -> np.ndarray:
    """Rows and columns of the pixels that have a colour, of a contour or a heading."""
    return np.argwhere(np.abs(picture - to_rgb(colour)).max(axis=2) < 0.05)


HISTORIES = {
    "whole": [row(e, 1 / e, 0.1 * e if e % 2 == 0 else None) for e in range(1, 10)],
    "one epoch": [row(1, 0.5, 0.4)],
    "no validation": [row(1, 0.5), row(2, 0.4)],
    "NaN": [row(1, math.nan, math.nan), row(2, 0.4, 0.2), row(3, math.inf)],
    "only NaN": [row(1, math.nan, math.nan)],
    "empty": [],
    "few keys": [{"epoch": 1, "loss": 0.3}, {"epoch": 2, "loss": 0.2, "val_loss": 0.3}],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_curves_draw_any_history(history: list[dict]) -> None:
    picture = pixels(draw_learning_curves(history, "run"))
    assert picture.shape == (645, 1650, 3)  # 11 × 4.3 inches at 150 dpi
    assert 0.005 < np.mean(picture < 0.7) < 0.3


def test_curves_show_the_validation() -> None:
    with_dice = [row(e, 1 / e, 0.1 * e) for e in range(1, 6)]
    without = [row(e, 1 / e) for e in range(1, 6)]
    green = [len(near(pixels(draw_learning_curves(h, "run")), "#009E73")) for h in (with_dice, without)]
    assert green[0] > 500
    assert green[1] == 0


def test_best_epoch_is_the_first_of_the_highest() -> None:
    history = [row(1, 1, 0.2), row(2, 1, 0.7), row(3, 1, math.nan), row(4, 1, 0.7), row(5, 1)]
    assert best_epoch(history)["epoch"] == 2
    assert best_epoch([row(1, 1), row(2, 1, math.nan)]) is None


def test_curves_are_equal_from_many_threads() -> None:
    with ThreadPoolExecutor(3) as pool:
        pictures = set(pool.map(lambda _: draw_learning_curves(HISTORIES["whole"], "run"), range(3)))
    assert len(pictures) == 1


def test_slice_of_the_largest_label_is_chosen() -> None:
    label, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    label[:3, :3, 4], label[:5, :5, 9], prediction[:, :, 1] = 1, 1, 1
    assert choose_slice(label, prediction) == 9
    assert choose_slice(None, prediction) == 1
    assert choose_slice(np.zeros_like(label), prediction) == 1
    assert choose_slice(None, np.zeros_like(label)) == SHAPE[2] // 2


@pytest.mark.parametrize("orientation", ["LPS", "LAS", "PIR"])
def test_panel_is_the_same_for_every_storage(orientation: str) -> None:
    image, label, prediction = scan()
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    stored = [nib.apply_orientation(a, turn) for a in (image, label, prediction)]
    affine = AFFINE @ nib.orientations.inv_ornt_aff(turn, SHAPE)
    turned = panel(*stored, affine=affine, spacing=nib.affines.voxel_sizes(affine))
    np.testing.assert_array_equal(pixels(turned), pixels(panel(image, label, prediction)))


def test_panel_shows_the_patients_right_on_the_left_and_the_front_on_top() -> None:
    image, label, prediction = scan()
    picture = pixels(panel(image, np.zeros_like(label), np.zeros_like(prediction), dice=None)).mean(axis=2)
    cell = picture[80:, : picture.shape[1] // 3]  # below the title
    bright = np.argwhere(cell > 0.9).mean(axis=0) / cell.shape
    assert bright[1] < 0.4
    assert bright[0] < 0.5


@pytest.mark.parametrize(("column", "colour"), [(1, LABEL_COLOUR), (2, PREDICTION_COLOUR)])
def test_contour_is_drawn_where_the_mask_is(column: int, colour: str) -> None:
    picture = pixels(panel(*scan()))
    drawn = near(picture[80:], colour)
    place = drawn.mean(axis=0) / (picture.shape[0] - 80, picture.shape[1] / 3)
    assert len(drawn) > 100
    assert column + 0.6 < place[1] < column + 0.9  # left of the patient: right in its cell
    assert place[0] > 0.6  # behind: below


def test_a_mask_on_the_border_has_a_closed_contour() -> None:
    image, label, _ = scan()
    label[:] = 0
    label[:6, :6, 5] = 1
    assert len(near(pixels(panel(image, label, label))[80:], LABEL_COLOUR)) > 50


def test_inference_has_two_columns() -> None:
    image, label, prediction = scan()
    three, two = pixels(panel(image, label, prediction)), pixels(panel(image, None, prediction, dice=None))
    assert two.shape[1] / three.shape[1] == pytest.approx(2 / 3, abs=0.02)
    assert len(near(two, LABEL_COLOUR)) == 0


def test_rows_and_proportions_follow_slices_and_spacing() -> None:
    def height(**change) -> int:
        return pixels(panel(*scan(), **change)).shape[0]

    one, two, tall = height(), height(n_slices=2), height(spacing=(2.0, 4.0, 5.0))
    assert tall - one == pytest.approx(two - one, abs=10)  # a second row, or a row of twice the height
    assert height(n_slices=50) < 20 * one  # no more rows than the volume has slices


@pytest.mark.parametrize("change", [{"window": None}, {"dice": math.nan}, {"case": "x" * 300}])
def test_panel_takes_what_runs_give(change: dict) -> None:
    image, label, prediction = scan()
    assert pixels(panel(image, label, prediction, **change)).std() > 0.02


def test_panel_refuses_arrays_of_two_shapes() -> None:
    image, label, prediction = scan()
    with pytest.raises(ValueError, match="one shape"):
        panel(image, label[:-1], prediction)
