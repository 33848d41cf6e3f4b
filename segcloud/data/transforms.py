"""The deterministic transforms between a source volume and the grid the network sees, and back.

They are MONAI's own, in the order of the article: intensity window → foreground crop → orientation →
spacing. The order matters: the crop looks at the windowed image, and the resampled grid starts at the crop.
"""

from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, Orientationd, ScaleIntensityRanged, Spacingd

from segcloud.config import PrepareConfig
from segcloud.data.nifti import BadScan, Volume, onto_grid

VERSION = 2
"""Part of every prepared volume's key: raise it when the result of these transforms changes."""

NOT_CT_ABOVE = -150
"""HU. Air is near -1000 and fat near -100: a CT of a body holds voxels below this, an MR does not."""


@dataclass(frozen=True)
class Prepared:
    """A volume on the network's grid, and what is needed to go back.

    Attributes:
        image: float32 [X, Y, Z] in 0..1.
        label: uint8 [X, Y, Z] class indices (0 background), or None.
        affine: float64 4×4 of the prepared grid.
        source_shape: shape of the source volume.
        source_affine: float64 4×4 of the source grid.
        box: int [2, 3], first and one past last source voxel kept by the foreground crop.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    source_shape: tuple[int, int, int]
    source_affine: np.ndarray
    box: np.ndarray


def check_ct(array: np.ndarray) -> None:
    """Refuse what cannot be a CT in HU.

    Raises:
        BadScan: code ``not_finite`` or ``not_ct``.
    """
    low, high = float(array.min()), float(array.max())  # NaN propagates through min and max
    if not np.isfinite([low, high]).all():
        raise BadScan("not_finite", "the image holds NaN or infinite voxels; export it again")
    if low > NOT_CT_ABOVE or high <= NOT_CT_ABOVE:
        raise BadScan(
            "not_ct",
            f"values {low:g}..{high:g} are not a CT in HU (no air or fat, or nothing else); "
            "check the modality and the rescale intercept",
        )


def classes(label: np.ndarray, labels: dict[str, int]) -> np.ndarray:
    """Class indices 1..n in the order of ``labels`` from a label map; all other values become 0.

    Args:
        label: label map, any numeric dtype, integer values.
        labels: organ name → value in the map.

    Raises:
        BadScan: ``label_values`` (not whole numbers), or ``empty_label`` (none of the organs present).
    """
    if not np.isfinite(label).all() or (label.dtype.kind == "f" and (label != np.rint(label)).any()):
        raise BadScan(
            "label_values", "the label map holds values that are not whole numbers; export a label map"
        )
    out = np.zeros(label.shape, dtype=np.uint8)
    for index, value in enumerate(labels.values(), start=1):
        out[label == value] = index
    if not out.any():
        found = ", ".join(f"{v:g}" for v in np.unique(label)[:8])
        wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise BadScan(
            "empty_label",
            f"all background: the label map holds the values {found} and data.labels asks for {wanted}; "
            "correct data.labels or leave the case out",
        )
    return out


def compose(config: PrepareConfig, keys: tuple[str, ...]) -> Compose:
    """The article's deterministic transforms, for the given keys of a dictionary of channel-first tensors."""
    modes = tuple("bilinear" if key == "image" else "nearest" for key in keys)
    low, high = config.window
    steps: list = [
        ScaleIntensityRanged(keys="image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
    ]
    if config.crop_foreground:
        steps.append(CropForegroundd(keys=keys, source_key="image"))
    # labels=None: the axis codes are the affine's own, not those of a tensor's space
    steps.append(
        Orientationd(keys=keys, axcodes=config.orientation, labels=(("L", "R"), ("P", "A"), ("I", "S")))
    )
    steps.append(Spacingd(keys=keys, pixdim=config.spacing, mode=modes))
    return Compose(steps)


def prepare(volume: Volume, label: Volume | None, config: PrepareConfig, labels: dict[str, int]) -> Prepared:
    """Bring a scan, and its label map where there is one, onto the network's grid.

    Raises:
        BadScan: not a CT, an unusable label map, grids that differ, axes that are not perpendicular, or nothing
            inside the window.
    """
    check_ct(volume.array)
    data = {"image": _tensor(volume.array.astype(np.float32), volume.affine)}
    if label is not None:
        on_image = onto_grid(label, volume.array.shape, volume.affine)
        data["label"] = _tensor(classes(on_image, labels), volume.affine)
    if config.crop_foreground and not (volume.array > config.window[0]).any():
        raise BadScan("no_foreground", f"no voxel above {config.window[0]:g} HU; check prepare.window")
    done = compose(config, tuple(data))(data)
    shape = volume.array.shape
    start = np.asarray(done.get("foreground_start_coord", (0, 0, 0)), dtype=int)
    end = np.asarray(done.get("foreground_end_coord", shape), dtype=int)
    prepared = Prepared(
        image=done["image"][0].numpy(),
        label=done["label"][0].numpy().astype(np.uint8) if label is not None else None,
        affine=np.asarray(done["image"].affine, dtype=np.float64),
        source_shape=shape,
        source_affine=volume.affine,
        box=np.stack([start, end]),
    )
    _axes(prepared)  # MONAI's respacing drops a shear: find out now, not after the network has run
    return prepared


def _axes(geometry: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """The 4×4 map from source to prepared voxel indices, and the source axis that each prepared axis follows.

    Raises:
        BadScan: code ``sheared``; the grids' axes are not parallel to within half a voxel.
    """
    matrix = np.linalg.inv(geometry.affine) @ geometry.source_affine
    axis_of = np.abs(matrix[:3, :3]).argmax(axis=1)
    stray = np.abs(matrix[:3, :3]) * geometry.source_shape
    stray[range(3), axis_of] = 0
    if sorted(axis_of) != [0, 1, 2] or stray.max() > 0.5:
        raise BadScan(
            "sheared",
            "the scan's axes are not perpendicular (gantry tilt?); resample it to an orthogonal grid",
        )
    return matrix, axis_of


def _tensor(array: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(
        torch.from_numpy(np.ascontiguousarray(array))[None], affine=torch.from_numpy(affine.copy())
    )


def to_source(scores: torch.Tensor, geometry: Prepared) -> np.ndarray:
    """Class indices on the source's grid from scores on the prepared grid.

    Scores are interpolated linearly (the inverse that MONAI's ``Invertd`` computes on probabilities) and
    the winner is taken per source slice, so that the full-resolution scores never exist at once. Voxels
    that the foreground crop removed are background; inside the crop, positions beyond the outermost voxel
    centres take the border's value.

    Args:
        scores: [C, X, Y, Z] logits, or [1, X, Y, Z] for a binary task (foreground minus background).
        geometry: what :func:`prepare` returned.

    Returns:
        uint8 array of the source's shape.
    """
    # orientation and spacing keep axes parallel: each prepared axis depends on one source axis, and the
    # interpolation separates
    matrix, axis_of = _axes(geometry)
    order = [
        int(np.flatnonzero(axis_of == axis)[0]) for axis in range(3)
    ]  # prepared axis of each source axis
    scores = scores.permute(0, *(1 + axis for axis in order)).float()
    weights = []
    for source_axis, prepared_axis in enumerate(order):
        index = np.arange(geometry.box[0, source_axis], geometry.box[1, source_axis])
        position = matrix[prepared_axis, source_axis] * index + matrix[prepared_axis, 3]
        weights.append(_linear(position, scores.shape[1 + source_axis], scores.device))
    mask = np.zeros(geometry.source_shape, dtype=np.uint8)
    (x0, y0, z0), (x1, y1, z1) = geometry.box
    (low, high, part) = weights[2]
    for k in range(z1 - z0):
        plane = torch.lerp(scores[..., low[k]], scores[..., high[k]], part[k])
        plane = _interpolate(_interpolate(plane, 1, weights[0]), 2, weights[1])
        winner = plane[0] > 0 if len(plane) == 1 else plane.argmax(0)
        mask[x0:x1, y0:y1, z0 + k] = winner.to(torch.uint8).cpu().numpy()
    return mask


def _linear(position: np.ndarray, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Lower neighbour, upper neighbour and weight of the upper one, per position, clamped to the border."""
    position = np.clip(position, 0, size - 1)
    low = np.minimum(np.floor(position).astype(np.int64), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    part = torch.from_numpy((position - low).astype(np.float32))
    return torch.from_numpy(low).to(device), torch.from_numpy(high).to(device), part.to(device)


def _interpolate(plane: torch.Tensor, dim: int, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    low, high, part = weights
    shape = [1] * plane.ndim
    shape[dim] = -1
    return torch.lerp(plane.index_select(dim, low), plane.index_select(dim, high), part.view(shape))
