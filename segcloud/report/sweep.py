"""A hyperparameter search in pictures and numbers: what was tried, what it reached, what decided it.

Drawn like the learning curves, on matplotlib's objects without `pyplot`.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

from segcloud.report.curves import BLUE, DPI, GREEN, GREY, INK, ORANGE, SKY, _number, _prepare

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", SKY, "#D55E00")  # Okabe and Ito's, black and yellow left out
MARKERS = ("o", "s", "^", "D", "v")  # one fewer than colours, so that 30 pairs differ
FILLS = {"finished": "full", "stopped early": "none", "unfinished": "left"}
ENDS = {"stopped early": {"marker": "|", "markersize": 13}, "failed": {"marker": "x", "markersize": 7}}
MIN_TRIALS = 8
"""Trials with a Dice from which importance is drawn."""
Trial = Mapping[str, Any]


def draw_sweep(trials: Sequence[Trial], budget_voxels: int, title: str) -> bytes:
    """Draw best Dice against the searched number, all curves, and with enough trials what mattered.

    Args:
        trials: each with `trial`, `params` (dotted field → value), `status`, `val_dice` (best; None or NaN
            without one) and `curve` ((voxels seen, Dice) in order).
        budget_voxels: patch voxels that a trial may see.
        title: Printed on top.

    Returns:
        A PNG of 150 dpi. Colours tell the values of one categorical parameter; the best is of trials that did
        not fail.
    """
    buffer = io.BytesIO()
    FigureCanvasAgg(_figure(trials, budget_voxels, title)).print_png(buffer)
    return buffer.getvalue()


def importance(trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the variance of best Dice that each parameter explains by itself, from 0 to 1.

    For numbers it is the square of Spearman's rank correlation with Dice, which sees a rise or a fall but not an
    optimum in the middle. For anything else (lists, strings, booleans, None) it is the correlation ratio η²: the
    variance of the values' mean Dice over the whole variance. Interactions are ignored, and shares need not add
    up to 1. With few trials it is a hint: chance alone gives η² about (values - 1) / (trials - 1), and a trial
    that was stopped early counts with the Dice it had by then.

    Args:
        trials: as for `draw_sweep`; only those with a Dice count, for a number only where it is finite.

    Returns:
        Every parameter of these trials in order of appearance; 0 for one that did not vary.
    """
    shares, trials = {}, _scored(trials)
    for path in _paths(trials):
        if _is_number(trials, path):
            pairs = [(_number(t["params"], path), _number(t, "val_dice")) for t in trials]
            values, dice = np.array([pair for pair in pairs if math.isfinite(pair[0])]).reshape(-1, 2).T
            shares[path] = _squared_correlation(_ranks(values), _ranks(dice))
        else:  # η² is the squared correlation of Dice with the mean Dice of its group
            dice = np.array([_number(trial, "val_dice") for trial in trials])
            _, group = np.unique([_label(trial, path) for trial in trials], return_inverse=True)
            shares[path] = _squared_correlation((np.bincount(group, dice) / np.bincount(group))[group], dice)
    return shares


def format_value(value: Any) -> str:
    """A parameter's value for people: 64³ or 96×96×64 for a shape, three significant digits for a float."""
    if isinstance(value, list | tuple) and value:
        parts = [format_value(part) for part in value]
        cube = len(parts) == 3 and len(set(parts)) == 1 and parts[0].isdecimal()
        return f"{parts[0]}³" if cube else "×".join(parts)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _figure(trials: Sequence[Trial], budget_voxels: int, title: str) -> Figure:
    shares = importance(trials) if len(_scored(trials)) >= MIN_TRIALS else {}
    figure = Figure(figsize=(15 if shares else 11, 4.6), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplots(1, 3 if shares else 2, width_ratios=[4, 4, 3] if shares else None)
    hue = _choose(trials, "train.roi_size", numbers=False)
    looks = {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(_labels(trials, hue))
    }
    styles = [looks[_label(trial, hue)] for trial in trials]
    ran = [trial for trial in _scored(trials) if trial["status"] != "failed"]
    best = max(ran, key=lambda trial: _number(trial, "val_dice"), default=None)
    _draw_trials(panels[0], trials, best, styles)
    _draw_curves(panels[1], trials, best, styles, budget_voxels)
    if shares:
        _draw_importance(panels[2], shares)
    names = {f"{hue.split('.')[-1]} {label}": look for label, look in looks.items()} if hue else {}
    _legend(figure, names, {trial["status"] for trial in trials}, best)
    return figure


def _draw_trials(axes: Axes, trials: Sequence[Trial], best: Trial | None, styles: Sequence[dict]) -> None:
    paths = [_choose(trials, "train.lr", numbers=True), _choose(trials, "train.roi_size", numbers=False)]
    path = min(filter(None, paths), key=lambda path: len(_labels(trials, path)) < 2, default=None)
    ran = [trial for trial in trials if trial["status"] != "failed"]
    failed, silent = len(trials) - len(ran), len(ran) - len(_scored(ran))
    counts = f", {failed} failed" * bool(failed) + f", {silent} without a Dice" * bool(silent)
    _panel(axes, f"{len(trials)} trials{counts}", path or "trial", "best validation Dice")
    for trial, x, style in zip(trials, _places(axes, trials, path), styles, strict=True):
        look = {**style, "linestyle": "none", "label": trial["status"], "markersize": 7}
        if trial["status"] == "failed":
            look |= {**ENDS["failed"], "markeredgewidth": 1.8, "transform": axes.get_xaxis_transform()}
        elif trial is best:
            look |= {"marker": "*", "markersize": 15, "markeredgecolor": INK, "zorder": 5, "label": "best"}
        else:
            look |= {"fillstyle": FILLS.get(trial["status"], "full")}
        axes.plot([x], [0.04 if trial["status"] == "failed" else _number(trial, "val_dice")], **look)
    if best is None:
        axes.text(0.5, 0.5, "no trial has a result", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_ylim(0, 1)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.12 * (high - low) * bool(failed), high)  # room for the crosses


def _draw_curves(
    axes: Axes, trials: Sequence[Trial], best: Trial | None, styles: Sequence[dict], budget_voxels: int
) -> None:
    unit, power = (1e9, "10⁹") if budget_voxels >= 1e9 else (1e6, "10⁶")
    _panel(axes, "Validation", f"patch voxels seen ({power}); dotted: the budget", "Dice")
    for trial, style in zip(trials, styles, strict=True):
        # None becomes NaN, which breaks the line
        voxels, dice = np.array(trial["curve"], float).reshape(-1, 2).T / [[unit], [1]]
        look = {"linewidth": 3.2, "zorder": 4} if trial is best else {"linewidth": 1.2, "alpha": 0.85}
        axes.plot(
            voxels, dice, color=style["color"], label=trial["trial"], marker="o", markersize=2.6, **look
        )
        last = np.flatnonzero(np.isfinite(dice))[-1:]
        if trial["status"] in ENDS and len(last):
            look = {"color": style["color"], "markeredgewidth": 2.2, "linestyle": "none", "zorder": 5}
            axes.plot(voxels[last], dice[last], label=trial["status"], **look, **ENDS[trial["status"]])
    axes.axvline(budget_voxels / unit, color=GREY, linewidth=0.9, linestyle=":", label="budget")
    axes.set_xlim(left=0)


def _draw_importance(axes: Axes, shares: Mapping[str, float]) -> None:
    _panel(axes, "Importance (a hint)", "share of Dice's variance, each alone", "")
    ordered = sorted(shares.items(), key=lambda item: item[1])
    bars = axes.barh([path for path, _ in ordered], [share for _, share in ordered], 0.6, color=GREY)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9, color=INK)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylim(min(-0.6, len(ordered) - 4.6), len(ordered) - 0.4)  # one or two bars do not fill the panel
    axes.grid(visible=False, axis="y")


def _legend(figure: Figure, names: Mapping[str, dict], statuses: set[str], best: Trial | None) -> None:
    """Under all panels, as colours and marks hold for two of them."""
    mark = {"linestyle": "none", "color": INK}
    entries = {name: (Line2D([], [], **look),) for name, look in names.items()}
    for status in ("stopped early", "unfinished", "failed"):
        styles = [{"marker": "o", "fillstyle": FILLS[status]}] if status in FILLS else []
        styles += [{**ENDS[status], "markeredgewidth": 1.8}] if status in ENDS else []
        if status in statuses:
            entries[status] = tuple(Line2D([], [], **style, **mark) for style in styles)
    if best is not None:
        name = f"best: {best['trial']}, Dice {_number(best, 'val_dice'):.3f}"
        entries[name] = (Line2D([], [], marker="*", markersize=13, **mark),)
    if entries:
        style = {"frameon": False, "fontsize": 9, "handler_map": {tuple: HandlerTuple(ndivide=None)}}
        figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=7, **style)


def _panel(axes: Axes, name: str, x: str, y: str) -> None:
    """The learning curves' frame with an axis of its own in place of the epochs."""
    _prepare(axes, [], name)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.autoscale(axis="x")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def _places(axes: Axes, trials: Sequence[Trial], path: str | None) -> list[float]:
    """Where each trial is on the x axis, which gets its scale and ticks; NaN where it has no finite number."""
    if path is None:
        axes.set_xticks([])
        return [float(i) for i in range(len(trials))]
    if _is_number(trials, path):
        if (decades := _decades(trials, path)) > 1:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(float(value))))
            axes.xaxis.set_minor_formatter(NullFormatter())
        return [_number(trial["params"], path) for trial in trials]
    labels = _labels(trials, path)
    tilt = {"rotation": 20, "ha": "right"} if len(labels) * max(map(len, labels)) > 50 else {}
    axes.set_xticks(range(len(labels)), labels, **tilt)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    shifts = np.linspace(-0.25, 0.25, len(trials))  # equal results do not hide each other
    return [labels.index(_label(trial, path)) + shift for trial, shift in zip(trials, shifts, strict=True)]


def _choose(trials: Sequence[Trial], preferred: str, numbers: bool) -> str | None:
    """The parameter to show: rather one that varied, then the preferred, then one over more than a decade."""

    def rank(path: str) -> tuple[bool, bool, bool]:
        constant = len(_labels(trials, path)) < 2
        return constant, path != preferred, not (numbers and _decades(trials, path) > 1)

    return min(
        (path for path in _paths(trials) if _is_number(trials, path) == numbers), key=rank, default=None
    )


def _decades(trials: Sequence[Trial], path: str) -> float:
    """How many powers of ten a number spans; 0 where it is not always positive."""
    values = [v for trial in trials if math.isfinite(v := _number(trial["params"], path))]
    return math.log10(max(values) / min(values)) if values and min(values) > 0 else 0.0


def _scored(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if math.isfinite(_number(trial, "val_dice"))]


def _paths(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(path for trial in trials for path in trial["params"]))


def _is_number(trials: Sequence[Trial], path: str) -> bool:
    """Whether all values are numbers. A None among them makes a category, as only a choice can bring it."""
    values = [trial["params"][path] for trial in trials if path in trial["params"]]
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def _label(trial: Trial, path: str | None) -> str:
    return format_value(trial["params"][path]) if path in trial["params"] else "not set"


def _labels(trials: Sequence[Trial], path: str | None) -> list[str]:
    """A parameter's distinct values as text, by the numbers in them: 64³, 96×96×64, 128³."""
    labels = {_label(trial, path) for trial in trials}
    return sorted(labels, key=lambda label: ([int(n) for n in re.findall(r"\d+", label)], label))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _squared_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r²; 0 where either does not vary."""
    if len(a) < 2 or min(np.ptp(a), np.ptp(b)) < 1e-12:
        return 0.0
    return float(min(1.0, np.corrcoef(a, b)[0, 1] ** 2))
