"""A scan, its label and its prediction side by side, as a PNG a radiologist can read.

Whatever the array's axes, the picture is in radiological convention: axial, the patient's right on the
left side, anterior on top, true proportions. Drawn without `pyplot`, whose global state is not safe in
threads.
"""

import io
import math
from collections.abc import Sequence

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

LABEL_COLOUR, PREDICTION_COLOUR = "#009E73", "#E69F00"  # Okabe and Ito: colour-blind safe
SPLEEN_WINDOW = (-57.0, 164.0)  # HU; the intensity range that the spleen recipe trains on
DPI = 120
WIDTH_IN, TITLE_IN, GAP_IN = 4.0, 0.62, 0.04  # a cell's width, the head's height, the space between cells


def draw_panel(
    image: np.ndarray,
    label: np.ndarray | None,
    prediction: np.ndarray,
    spacing: Sequence[float],
    *,
    affine: np.ndarray,
    case: str,
    dice: float | None,
    window: tuple[float, float] | None = SPLEEN_WINDOW,
    n_slices: int = 1,
) -> bytes:
    """Draw image, label and prediction on axial slices through the organ.

    Args:
        image: [X, Y, Z] in HU, in any axis order and direction.
        label: Same shape, foreground above 0; None for a scan without one, which leaves its column out.
        prediction: Same shape, foreground above 0.
        spacing: Voxel size in mm along the array's axes.
        affine: 4×4, voxel indices to RAS+ world coordinates in mm; says where the axes point to.
        case: Name in the title.
        dice: Score in the title; None or NaN leaves it out.
        window: Lowest and highest HU shown; None takes the slice's 1st and 99th percentile.
        n_slices: Rows, from head to feet: the slice of `choose_slice`, the others spread over the organ
            (fewer rows where the organ has fewer slices).

    Returns:
        A PNG of 120 dpi.

    Raises:
        ValueError: if the arrays are not 3D and of one shape, or `n_slices` is below 1.
    """
    arrays = [image, prediction] if label is None else [image, label, prediction]
    if image.ndim != 3 or any(a.shape != image.shape for a in arrays):
        raise ValueError(f"{case}: expected 3D arrays of one shape, got {[a.shape for a in arrays]}")
    if n_slices < 1:
        raise ValueError(f"n_slices must be 1 or more, got {n_slices}")
    to_ras = nib.io_orientation(affine)
    arrays = [nib.apply_orientation(a, to_ras) for a in arrays]  # views: no volume is copied
    size = np.empty(3)
    size[to_ras[:, 0].astype(int)] = spacing
    label, prediction = (None if label is None else arrays[1]), arrays[-1]
    slices = _spread(label, prediction, n_slices)
    columns = [("image", None, ""), ("prediction", prediction, PREDICTION_COLOUR)]
    if label is not None:
        columns.insert(1, ("label", label, LABEL_COLOUR))
    return _draw_grid(arrays[0], columns, slices, size, _title(case, dice), window)


def choose_slice(label: np.ndarray | None, prediction: np.ndarray) -> int:
    """Index along the last axis of the slice that shows most of the organ.

    That is the largest area of the label; of the prediction, where the label is None or empty; the middle,
    where both are. Foreground is above 0.
    """
    for mask in (label, prediction):
        if mask is not None:
            areas = np.count_nonzero(mask > 0, axis=(0, 1))
            if areas.any():
                return int(areas.argmax())
    return prediction.shape[2] // 2


def _spread(label: np.ndarray | None, prediction: np.ndarray, count: int) -> list[int]:
    """`count` slices from head to feet: the chosen one, the others even over what the masks cover."""
    chosen = choose_slice(label, prediction)
    covered = np.any(prediction > 0, axis=(0, 1))
    if label is not None:
        covered |= np.any(label > 0, axis=(0, 1))
    extent = np.flatnonzero(covered) if covered.any() else np.arange(prediction.shape[2])
    others = np.linspace(extent[0], extent[-1], count + 2).round().astype(int)[1:-1]
    others[np.abs(others - chosen).argmin()] = chosen
    return sorted({int(i) for i in others}, reverse=True)


def _draw_grid(
    image: np.ndarray,
    columns: list[tuple[str, np.ndarray | None, str]],
    slices: list[int],
    size: np.ndarray,
    title: str,
    window: tuple[float, float] | None,
) -> bytes:
    height_in = WIDTH_IN * (image.shape[1] * size[1]) / (image.shape[0] * size[0])
    wide = len(columns) * (WIDTH_IN + GAP_IN) - GAP_IN
    high = TITLE_IN + len(slices) * (height_in + GAP_IN) - GAP_IN
    figure = Figure(figsize=(wide, high), dpi=DPI, facecolor="black")
    figure.text(0.08 / wide, 1 - 0.2 / high, title, color="white", fontsize=12, va="center", weight="bold")
    for row, index in enumerate(slices):
        for column, (name, mask, colour) in enumerate(columns):
            left, top = column * (WIDTH_IN + GAP_IN), TITLE_IN + row * (height_in + GAP_IN)
            box = (left / wide, 1 - (top + height_in) / high, WIDTH_IN / wide, height_in / high)
            axes = figure.add_axes(box)
            _draw_cell(axes, image, mask, index, size[1] / size[0], colour, window)
            if row == 0:
                _note(axes, 0.5, 1.0, name, "center", "bottom", colour or "white", 10)
            if column == 0:
                _note(axes, 0.015, 0.02, f"slice {index + 1} of {image.shape[2]}", "left", "bottom")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_cell(
    axes: Axes,
    image: np.ndarray,
    mask: np.ndarray | None,
    index: int,
    aspect: float,
    colour: str,
    window: tuple[float, float] | None,
) -> None:
    """One slice with the mask as a translucent area and a contour, and the letters of the four sides."""
    plane = _radiological(image[:, :, index])
    low, high = window or np.percentile(plane, (1, 99))
    axes.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1), aspect=aspect)
    axes.set_axis_off()
    if mask is not None:
        area = _radiological(mask[:, :, index]) > 0
        if area.any():
            tint = np.zeros((*area.shape, 4))
            tint[area] = (*to_rgb(colour), 0.35)
            axes.imshow(tint, aspect=aspect, interpolation="nearest")
            # The rim of zeros closes the contour where the organ touches the picture's border.
            rows, columns = (np.arange(-1, n + 1) for n in area.shape)
            axes.contour(columns, rows, np.pad(area, 1), levels=[0.5], colors=[colour], linewidths=1.1)
            axes.set_xlim(-0.5, area.shape[1] - 0.5)
            axes.set_ylim(area.shape[0] - 0.5, -0.5)
    _note(axes, 0.015, 0.5, "R", "left", "center")
    _note(axes, 0.985, 0.5, "L", "right", "center")
    _note(axes, 0.5, 0.985, "A", "center", "top")
    _note(axes, 0.5, 0.015, "P", "center", "bottom")


def _radiological(plane: np.ndarray) -> np.ndarray:
    """An axial RAS+ slice [X, Y] as picture rows and columns: anterior on top, the patient's right left."""
    return plane[::-1, ::-1].T


def _note(
    axes: Axes, x: float, y: float, text: str, ha: str, va: str, colour: str = "white", size: float = 8
) -> None:
    """Text in a cell, outlined so that it reads on every grey."""
    outline = [withStroke(linewidth=1.5, foreground="black")]
    style = {"ha": ha, "va": va, "color": colour, "fontsize": size, "path_effects": outline}
    axes.text(x, y, text, transform=axes.transAxes, **style)


def _title(case: str, dice: float | None) -> str:
    name = case if len(case) <= 60 else f"{case[:28]}…{case[-28:]}"
    return name if dice is None or math.isnan(dice) else f"{name}   Dice {dice:.3f}"
