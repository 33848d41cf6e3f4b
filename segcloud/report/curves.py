"""Learning curves as a PNG, in the two panels that the field reads: loss, and validation Dice.

Drawn on matplotlib's objects without `pyplot`, whose global state is not safe in the threads of a job.
"""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette: told apart under the common forms of colour blindness, and in grey.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
INK, GREY = "#222222", "#6b6b6b"
DPI = 150
Row = Mapping[str, float | None]


def draw_learning_curves(history: Sequence[Row], title: str) -> bytes:
    """Draw loss and validation scores against the epoch.

    Args:
        history: One row per epoch in order: `epoch` (from 1), `loss`, and where the epoch was validated
            `val_dice`, `val_iou` and perhaps `val_loss`; each may be missing, None or not finite. Other keys
            are ignored. An empty history gives empty panels.
        title: Printed on top.

    Returns:
        A PNG of 150 dpi. A star marks the first epoch with the highest validation Dice in both panels.
    """
    figure = Figure(figsize=(11, 4.3), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    loss_axes, score_axes = figure.subplots(1, 2)
    best = best_epoch(history)
    _draw_loss(loss_axes, history, best)
    _draw_scores(score_axes, history, best)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def best_epoch(history: Sequence[Row]) -> Row | None:
    """The first row with the highest finite `val_dice`; None where nothing was validated yet."""
    scored = [row for row in history if math.isfinite(_number(row, "val_dice"))]
    return max(scored, key=lambda row: _number(row, "val_dice"), default=None)


def _draw_loss(axes: Axes, history: Sequence[Row], best: Row | None) -> None:
    _prepare(axes, history, "Loss")
    _line(axes, history, "loss", label="training", color=BLUE, linewidth=1.8)
    _line(axes, history, "val_loss", label="validation", color=ORANGE, linewidth=1.4, linestyle="--")
    axes.set_ylabel("loss", color=INK)
    broken = sum(not math.isfinite(_number(row, "loss")) for row in history)
    if broken:
        axes.set_xlabel(f"epoch ({broken} without a finite loss)", color=INK)
    if not history:
        axes.text(0.5, 0.5, "no epoch yet", transform=axes.transAxes, ha="center", color=GREY)
    if best is not None and math.isfinite(_number(best, "loss")):
        _star(axes, best, "loss", f"best validation Dice (epoch {best['epoch']:.0f})")
    _legend(axes)


def _draw_scores(axes: Axes, history: Sequence[Row], best: Row | None) -> None:
    _prepare(axes, history, "Validation")
    _line(axes, history, "val_dice", label="Dice", color=GREEN, linewidth=2.2)
    _line(axes, history, "val_iou", label="IoU", color=SKY, linewidth=1.1)
    axes.set_ylabel("Dice, IoU", color=INK)
    axes.set_ylim(-0.02, 1.02)
    if best is None:
        axes.text(0.5, 0.5, "no validation yet", transform=axes.transAxes, ha="center", color=GREY)
        return
    _star(axes, best, "val_dice", None)
    _annotate(axes, best)
    _legend(axes)


def _prepare(axes: Axes, history: Sequence[Row], name: str) -> None:
    """Title, grid and an epoch axis that is the same in both panels."""
    axes.set_title(name, loc="left", fontsize=11, color=INK)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=INK)
    epochs = [_number(row, "epoch") for row in history] or [1.0]
    margin = max(0.5, 0.02 * (epochs[-1] - epochs[0]))
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)


def _line(axes: Axes, history: Sequence[Row], key: str, **style: object) -> None:
    """One curve. A value that is not finite breaks it; an epoch that has none does not."""
    rows = [row for row in history if row.get(key) is not None]
    if not rows:
        return
    values = [_number(row, key) for row in rows]
    marker = "o" if len(rows) <= 40 else None  # a lone point has no line to be seen by
    axes.plot([row["epoch"] for row in rows], values, marker=marker, markersize=3.2, **style)


def _star(axes: Axes, row: Row, key: str, label: str | None) -> None:
    style = {"color": ORANGE, "markeredgecolor": INK, "markeredgewidth": 0.7, "linestyle": "none"}
    axes.plot([row["epoch"]], [row[key]], marker="*", markersize=14, label=label, zorder=5, **style)


def _annotate(axes: Axes, best: Row) -> None:
    """Value and epoch of the best at the foot of a line under its star, away from the curves' top."""
    dice, epoch = _number(best, "val_dice"), _number(best, "epoch")
    axes.plot([epoch, epoch], [0, dice], color=GREY, linewidth=0.9, linestyle=":")
    low, high = axes.get_xlim()
    to_right = epoch < (low + high) / 2
    axes.annotate(
        f"best Dice {dice:.3f} at epoch {epoch:.0f}",
        (epoch, 0.03),
        xytext=(6 if to_right else -6, 0),
        textcoords="offset points",
        ha="left" if to_right else "right",
        fontsize=10,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        zorder=6,
    )


def _legend(axes: Axes) -> None:
    """Above the panel, where it can cover no curve."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=3, frameon=False, fontsize=9)


def _number(row: Row, key: str) -> float:
    """A row's value as a float; NaN where it is missing or None."""
    value = row.get(key)
    return math.nan if value is None else float(value)
