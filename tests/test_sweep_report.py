"""A sweep's picture holds what was tried, for any mixture of trials; its numbers mean what they say."""

import io
import math

import numpy as np
import pytest
from matplotlib.image import imread

from segcloud.report.sweep import _figure, draw_sweep, format_value, importance

BUDGET = 4 * 10**9


def trial(number: int, params: dict, dice: float | None, status: str = "finished") -> dict:
    """A trial whose curve has four points, or two if it did not finish."""
    points = 0 if dice is None else 4 if status == "finished" else 2
    return {
        "trial": f"a1b2c_{number:05d}",
        "params": params,
        "status": status,
        "reason": "",
        "val_dice": dice,
        "curve": [(BUDGET * i // 4, dice * i / points) for i in range(1, points + 1)],
        "seconds": 10.0,
    }


def sweep() -> list[dict]:
    """12 trials, 2 failed, 4 stopped early; number 7 is the best."""
    statuses = {1: "failed", 4: "failed", 2: "stopped early", 5: "stopped early"}
    statuses |= {8: "stopped early", 11: "stopped early"}
    rois = [[64, 64, 64], [96, 96, 64], [128, 128, 128]]
    return [
        trial(
            i,
            {"train.lr": 1e-4 * 1.4**i, "train.roi_size": rois[i % 3]},
            None if i == 1 else 0.9 - 0.02 * abs(i - 7),
            statuses.get(i, "finished"),
        )
        for i in range(12)
    ]


def lines(axes, label: str) -> list:
    return [line for line in axes.lines if line.get_label() == label]


LR, ROI = {"train.lr": 1e-3}, {"train.roi_size": [64, 64, 64]}
SWEEPS = {
    "whole": sweep(),
    "empty": [],
    "no result": [trial(0, LR | ROI, None, "failed"), trial(1, LR | ROI, None, "unfinished")],
    "no params": [trial(i, {}, 0.5 + i / 20) for i in range(9)],
    "only a number": [trial(i, {"train.lr": 10.0**-i}, 0.5 + i / 20) for i in range(9)],
    "only a category": [trial(i, {"model.norm": ["batch", "instance", None][i % 3]}, 0.5) for i in range(9)],
    "one value": [trial(i, LR | ROI, 0.5 + i / 20, "unfinished") for i in range(9)],
    "below zero": [trial(i, {"x": i - 4}, 0.0) for i in range(9)],
    "NaN": [trial(i, {"train.lr": [math.nan, 1e-3, 0.1][i % 3]}, [math.nan, 0.5][i % 2]) for i in range(20)],
    "None": [trial(0, {"train.lr": None}, 0.5), trial(1, {"other": 1}, 0.4) | {"curve": [(1, None)]}],
}


@pytest.mark.parametrize("trials", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.filterwarnings("error")
def test_any_sweep_is_drawn(trials: list[dict]) -> None:
    picture = imread(io.BytesIO(draw_sweep(trials, BUDGET, "sweep")))[..., :3]
    assert picture.shape[0] == 690
    assert 0.005 < np.mean(picture < 0.7) < 0.3


def test_each_trial_has_its_mark() -> None:
    axes = _figure(sweep(), BUDGET, "sweep").axes[0]
    counts = {name: len(lines(axes, name)) for name in ("failed", "stopped early", "finished", "best")}
    assert counts == {"failed": 2, "stopped early": 4, "finished": 5, "best": 1}
    assert {line.get_marker() for line in lines(axes, "failed")} == {"x"}
    assert axes.get_title(loc="left") == "12 trials, 2 failed"


def test_colour_is_the_category() -> None:
    axes = _figure(sweep(), BUDGET, "sweep").axes[1]
    colours = [lines(axes, f"a1b2c_{i:05d}")[0].get_color() for i in range(12)]
    assert len(set(colours)) == 3
    assert colours[:3] == colours[3:6] == colours[9:]


def test_curves_mark_early_ends_and_the_best() -> None:
    axes = _figure(sweep(), BUDGET, "sweep").axes[1]
    ends = lines(axes, "stopped early")
    assert [(line.get_marker(), line.get_xdata()[0]) for line in ends] == [("|", 2.0)] * 4
    widths = {line.get_label(): line.get_linewidth() for line in axes.lines}
    assert max(widths, key=widths.get) == "a1b2c_00007"
    assert lines(axes, "budget")[0].get_xdata()[0] == 4.0


def test_legend_names_the_values_in_order_and_the_best() -> None:
    (legend,) = _figure(sweep(), BUDGET, "sweep").legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:3] == ["roi_size 64³", "roi_size 96×96×64", "roi_size 128³"]
    assert names[3:] == ["stopped early", "failed", "best: a1b2c_00007, Dice 0.900"]


def test_a_failed_trial_is_not_the_best() -> None:
    trials = [trial(0, LR, 0.95, "failed"), trial(1, LR, 0.6), trial(2, LR, math.nan)]
    (legend,) = _figure(trials, BUDGET, "sweep").legends
    assert legend.get_texts()[-1].get_text() == "best: a1b2c_00001, Dice 0.600"


@pytest.mark.parametrize(("highest", "scale"), [(0.9e-3, "linear"), (2e-3, "log")])
def test_more_than_a_decade_is_drawn_logarithmically(highest: float, scale: str) -> None:
    trials = [trial(0, {"z": 1, "train.lr": 1e-4}, 0.5), trial(1, {"z": 2, "train.lr": highest}, 0.6)]
    axes = _figure(trials, BUDGET, "sweep").axes[0]
    assert (axes.get_xlabel(), axes.get_xscale()) == ("train.lr", scale)


def test_a_number_that_varied_goes_before_a_constant_learning_rate() -> None:
    trials = [trial(i, {"train.lr": 1e-3, "train.weight_decay": 10.0**-i}, 0.5) for i in range(4)]
    assert _figure(trials, BUDGET, "sweep").axes[0].get_xlabel() == "train.weight_decay"


def test_a_category_that_varied_goes_before_a_constant_number() -> None:
    trials = [trial(i, LR | {"model.norm": ["instance", "batch"][i % 2]}, 0.5) for i in range(4)]
    axes = _figure(trials, BUDGET, "sweep").axes[0]
    assert axes.get_xlabel() == "model.norm"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["batch", "instance"]


@pytest.mark.parametrize(("scored", "panels"), [(7, 2), (8, 3)])
def test_importance_is_drawn_from_eight_results(scored: int, panels: int) -> None:
    trials = [trial(i, {"a": i, "b": "x"}, 0.5 + i / 20 if i < scored else None) for i in range(12)]
    axes = _figure(trials, BUDGET, "sweep").axes
    assert len(axes) == panels
    if panels == 3:
        assert [bar.get_width() for bar in axes[2].patches] == [0.0, pytest.approx(1)]


def test_importance_of_what_decides_everything_is_one() -> None:
    trials = [
        trial(i, {"up": i**3, "down": -i, "name": "abc"[i // 4], "list": [i, i]}, 0.1 * (i // 4))
        for i in range(12)
    ]
    shares = importance(trials)
    assert shares["name"] == pytest.approx(1)
    assert shares["list"] == pytest.approx(1)
    assert shares["up"] == pytest.approx(shares["down"])
    assert 0.85 < shares["up"] < 1  # Dice has ties, the numbers have none


def test_importance_of_the_irrelevant_and_the_constant_is_zero() -> None:
    params = [{"n": i % 3, "name": "abc"[i % 3], "constant": 0.1, "roi": [64, 64, 64]} for i in range(12)]
    trials = [trial(i, params[i], 0.1 * (i // 3)) for i in range(12)]
    assert importance(trials) == {
        "n": pytest.approx(0),
        "name": pytest.approx(0),
        "constant": 0.0,
        "roi": 0.0,
    }


def test_ties_share_the_mean_of_their_ranks() -> None:
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: r² = 4.5² / (4.5 × 5)
    dice = [0.1, 0.3, 0.2, 0.4]
    shares = importance([trial(i, {"n": n}, dice[i]) for i, n in enumerate([1, 2, 2, 3])])
    assert shares == {"n": pytest.approx(0.9)}


def test_correlation_ratio_is_between_over_whole_variance() -> None:
    # means 0.3 and 0.5 around 0.4: 4 × 0.1² between them, 2 × 0.1² within a and 2 × 0.2² within b
    dice = {"a": [0.2, 0.4], "b": [0.3, 0.7]}
    trials = [trial(0, {"k": key}, value) for key, values in dice.items() for value in values]
    assert importance(trials) == {"k": pytest.approx(0.04 / (0.04 + 0.02 + 0.08))}


def test_importance_sees_only_trials_with_a_dice() -> None:
    trials = [trial(i, {"n": i}, 0.1 * i) for i in range(4)]
    without = [trial(9, {"n": -5, "other": 1}, None, "failed"), trial(8, {"n": 99}, math.nan)]
    assert importance(trials + without) == importance(trials) == {"n": pytest.approx(1)}
    assert importance(without) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([64, 64, 64], "64³"),
        ((96, 96, 64), "96×96×64"),
        ([2, 2], "2×2"),
        (0.00123456, "0.00123"),
        (1e-5, "1e-05"),
        (3, "3"),
        ("instance", "instance"),
        (True, "True"),
        (None, "None"),
        ([], "[]"),
    ],
)
def test_value_for_people(value: object, text: str) -> None:
    assert format_value(value) == text
