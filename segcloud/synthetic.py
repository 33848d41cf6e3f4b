"""CT phantoms: abdomens with a known spleen, for the demo, the tests and the benchmarks.

Real scans cannot travel with a repository, and a sphere in noise teaches a network nothing that an
intensity threshold does not know. These phantoms lie between: liver, kidneys, vessels and muscle share
the spleen's Hounsfield units, and size, pose and shape change from patient to patient, so that neither a
threshold nor a mean position finds the organ, while a small 3D UNet learns it within minutes on a CPU.

A patient is a list of ellipsoids in millimetres, painted one over the other in deformed coordinates. The
same seed is the same patient on every grid. Nothing here is fit for a clinical statement.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, LIVER = 1, 2, 3, 5  # TotalSegmentator's numbers
FIELD_MM = (330.0, 270.0, 240.0)
ORIENTATIONS = ("RAS", "LPS", "LAS")
AIR, GAS, LUNG, FAT, MUSCLE = -1000.0, -900.0, -820.0, -100.0, 55.0
SLAB_VOXELS = 2_000_000  # bounds the temporaries: 8 MB for each float32 array
UPRIGHT = (0.0, 0.0, 0.0)
Triple = tuple[float, float, float]
Vector = Sequence[float] | np.ndarray
Grid = Sequence[np.ndarray]  # three coordinate vectors, or three arrays [X, Y, Z]; mm


@dataclass(frozen=True)
class Phantom:
    """One synthetic scan.

    `image` is int16 [X, Y, Z] in Hounsfield units, `label` uint8 [X, Y, Z] (0 background, 1 spleen; with
    `multi_organ` also 2 right kidney, 3 left kidney, 5 liver) and `affine` the float64 4×4 matrix from
    voxel indices to RAS+ world coordinates in mm.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class _Blob:
    """An ellipsoid, or a barrel along its third axis, of one tissue; in patient coordinates in mm."""

    centre: np.ndarray
    radii: np.ndarray
    hu: float
    axes: np.ndarray  # 3×3, the rows are the directions of the radii
    label: int | None = None  # None keeps the label that lies underneath
    barrel: bool = False
    rim: tuple[float, float] | None = None  # thickness in mm and HU of a wall or cortex
    gas_above: float | None = None  # gas from this many mm in front of the centre: the patient lies supine
    confined: bool = False  # pressed into the abdominal cavity
    texture: float = 3.0  # HU
    carved: tuple["_Blob", ...] = ()  # neighbours that leave an impression

    def extent(self, rotation: np.ndarray) -> np.ndarray:
        """Half size in mm of the box around the blob after `rotation`."""
        return np.linalg.norm((self.axes @ rotation) * self.radii[:, None], axis=0)

    def distance(self, points: Grid, room: np.ndarray) -> np.ndarray:
        """Signed distance to the surface in mm, negative inside; exact to first order at the surface."""
        distance = self._own_distance(points)
        for other in self.carved:
            distance = np.maximum(distance, 1.5 - other._own_distance(points))
        return np.maximum(distance, room + 1.5) if self.confined else distance

    def _own_distance(self, points: Grid) -> np.ndarray:
        u, v, w = (p - np.float32(c) for p, c in zip(points, self.centre, strict=True))
        scaled = (self.axes / self.radii[:, None]).astype(np.float32)
        a, b, c = (np.square(u * q[0] + v * q[1] + w * q[2]) + np.float32(1e-9) for q in scaled)
        ra, rb, rc = (1 / np.square(self.radii)).astype(np.float32)
        # The distance is (norm − 1) / |gradient of the norm|, with the norm's p-th power 1 on the surface.
        if self.barrel:
            disc = a + b
            norm = np.sqrt(np.sqrt(disc * disc + c * c))
            slope = np.sqrt(disc * disc * (a * ra + b * rb) + c * c * c * rc)
            return (norm - 1) * norm * norm * norm / slope
        norm = np.sqrt(a + b + c)
        return (norm - 1) * norm / np.sqrt(a * ra + b * rb + c * rc)


@dataclass(frozen=True)
class _Waves:
    """A smooth random field: a sum of products of sines, cheap on a grid because it is separable."""

    frequency: np.ndarray  # [waves, 3] in radians per mm
    phase: np.ndarray
    amplitude: float

    @classmethod
    def draw(cls, rng: np.random.Generator, sd: float, wavelengths: tuple[float, float]) -> "_Waves":
        """A field of standard deviation `sd` whose waves are that many mm long."""
        frequency = 2 * np.pi / rng.uniform(*wavelengths, (8, 3))
        return cls(frequency, rng.uniform(0, 2 * np.pi, (8, 3)), sd)  # the variances of 8 waves, 1/8 each

    def __call__(self, axes: Grid) -> np.ndarray:
        """The field on the grid of three coordinate vectors in mm, float32 [X, Y, Z]."""
        x, y, z = (
            np.sin(np.outer(a, self.frequency[:, i]) + self.phase[:, i]).astype(np.float32)
            for i, a in enumerate(axes)
        )
        return np.matmul(x[:, None] * y[None] * np.float32(self.amplitude), z.T)


@dataclass(frozen=True)
class _Patient:
    """Everything about one patient that does not depend on the grid."""

    offset: np.ndarray  # where the body's centre lies in the world, mm
    rotation: np.ndarray
    bend: tuple[_Waves, _Waves, _Waves]
    grain: _Waves
    trunk: np.ndarray  # half width and half depth of the body, mm
    fat: np.ndarray  # thickness under the skin at the side and in front, mm
    wall: float  # thickness of the muscle, mm
    domes: np.ndarray  # height of the diaphragm on the right and on the left, mm
    rib_phase: float
    noise_hu: float
    blobs: tuple[_Blob, ...] = ()

    def points(self, axes: Grid) -> list[np.ndarray]:
        """World grid to patient coordinates: three float32 [X, Y, Z] arrays in mm."""
        x, y, z = np.ix_(*((a - o).astype(np.float32) for a, o in zip(axes, self.offset, strict=True)))
        r = self.rotation.astype(np.float32)
        return [x * r[i, 0] + y * r[i, 1] + z * r[i, 2] + self.bend[i](axes) for i in range(3)]


def make_phantom(
    seed: int,
    spacing: Triple | None = (3.0, 3.0, 3.0),
    field_mm: Triple = FIELD_MM,
    orientation: str | None = None,
    multi_organ: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> Phantom:
    """Make the scan of one synthetic patient.

    Args:
        seed: The patient, ≥ 0. Equal seeds give equal anatomy on every grid and equal bytes on equal grids.
        spacing: Voxel size in mm along right–left, posterior–anterior and inferior–superior. None draws it
            (2.4–3.4 mm in the plane, 2.5–5 mm between slices), or is `field_mm / shape` if a shape is given.
        field_mm: Size of the scanned box in mm on the same axes; centred on the world's origin.
        orientation: Where the array's axes point to, such as "RAS" or "LPS"; None draws one.
        multi_organ: Label both kidneys and the liver too.
        shape: Voxels along the three anatomical axes, in place of what `field_mm` and `spacing` give.

    Returns:
        The scan; the array's axes are permuted and flipped as `orientation` says.

    Raises:
        ValueError: for a negative seed, an unknown orientation or a grid without voxels.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    drawn = np.random.default_rng([seed, 1])  # stream 0 draws the patient, 2 the noise
    if spacing is None and shape is not None:
        spacing = tuple(f / max(n, 1) for f, n in zip(field_mm, shape, strict=True))
    plane, between = drawn.uniform((2.4, 2.5), (3.4, 5.0))
    spacing = spacing or (plane, plane, between)
    shape = shape or tuple(round(f / s) for f, s in zip(field_mm, spacing, strict=True))
    if min(shape) < 1 or min(spacing) <= 0:
        raise ValueError(f"the grid needs voxels: shape {shape}, spacing {spacing} mm")
    ornt = _orientation(orientation or ORIENTATIONS[drawn.integers(len(ORIENTATIONS))])

    patient = _draw_patient(np.random.default_rng([seed, 0]))
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    hu, label = _render(patient, axes, edge_mm=max(1.0, 0.5 * float(np.mean(spacing))))
    _add_noise(hu, patient, axes, np.random.default_rng([seed, 2]))
    image = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    if not multi_organ:
        label[label != SPLEEN] = 0

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    image, label = (np.ascontiguousarray(nib.apply_orientation(a, ornt)) for a in (image, label))
    return Phantom(image, label, affine @ inv_ornt_aff(ornt, shape))


def write_dataset(
    folder: Path,
    n_train: int,
    n_test: int,
    seed: int,
    *,
    spacing: Triple | None = None,
    field_mm: Triple = FIELD_MM,
    orientation: str | None = None,
    multi_organ: bool = False,
    test_labels: bool = True,
) -> list[Path]:
    """Write phantoms in the Medical Decathlon layout.

    `imagesTr/` and `labelsTr/` hold the training pairs, `imagesTs/` the scans to infer, `labelsTs/` their
    truth (kept apart and not named in `dataset.json`; left out without `test_labels`). Images are int16,
    labels uint8, gzip level 1. The other arguments are those of `make_phantom`; None draws per patient.

    Returns:
        The paths written, `dataset.json` last. Equal arguments give equal bytes.

    Raises:
        ValueError: for negative counts or what `make_phantom` refuses.
    """
    if n_train < 0 or n_test < 0:
        raise ValueError(f"counts must be 0 or more, got n_train={n_train} and n_test={n_test}")
    names = [f"phantom_{index:03d}.nii.gz" for index in range(n_train + n_test)]
    written: list[Path] = []
    for index, name in enumerate(names):
        phantom = make_phantom(seed * 10_000 + index, spacing, field_mm, orientation, multi_organ)
        part = "Tr" if index < n_train else "Ts"
        written.append(save_nifti(folder / f"images{part}" / name, phantom.image, phantom.affine))
        if part == "Tr" or test_labels:
            written.append(save_nifti(folder / f"labels{part}" / name, phantom.label, phantom.affine))
    organs = {"kidney_right": RIGHT_KIDNEY, "kidney_left": LEFT_KIDNEY, "liver": LIVER} if multi_organ else {}
    about = {
        "name": "segcloud phantoms",
        "description": "Synthetic abdominal CT with a known spleen; no patient data",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"background": 0, "spleen": SPLEEN, **organs},
        "numTraining": n_train,
        "numTest": n_test,
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names[:n_train]],
        "test": [f"./imagesTs/{n}" for n in names[n_train:]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")
    return [*written, folder / "dataset.json"]


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Write a 3D array as `.nii` or `.nii.gz` (level 1), qform and sform of code 1, in mm; returns `path`.

    The file appears whole or not at all, and equal input gives equal bytes (gzip's time stamp is zero).

    Args:
        path: Target; missing folders are made.
        array: [X, Y, Z] of a type that NIfTI knows, such as uint8, int16 or float32.
        affine: 4×4, voxel indices to RAS+ mm, without shear (a qform cannot hold it).

    Raises:
        ValueError: if the array is not 3D or the name ends in neither `.nii` nor `.nii.gz`.
    """
    if array.ndim != 3:
        raise ValueError(f"{path.name}: expected a 3D array [X, Y, Z], got shape {array.shape}")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path.name}: expected a name that ends in .nii or .nii.gz")
    nifti = nib.Nifti1Image(array, affine)
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=1)
    nifti.header.set_xyzt_units("mm")
    data = nifti.to_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)
    return partial.replace(path)


def _orientation(code: str) -> np.ndarray:
    """nibabel's orientation array that turns RAS+ into a code such as "LPS"."""
    axis = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    if sorted(axis.get(letter, -1) for letter in code) != [0, 1, 2]:
        raise ValueError(f"orientation must name three axes such as 'RAS' or 'LPS', got {code!r}")
    return ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code))


def _rotation(degrees: Vector) -> np.ndarray:
    """Rotation matrix about x, then y, then z."""
    (a, b, c), (d, e, f) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, a, -d], [0, d, a]])
    about_y = np.array([[b, 0, e], [0, 1, 0], [-e, 0, b]])
    about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


class _Anatomist:
    """Draws one patient's organs; x points to the patient's right, y to the front, z to the head, in mm."""

    def __init__(self, rng: np.random.Generator, scale: np.ndarray):
        self.rng, self.scale = rng, scale
        self.parenchyma = self.normal(108, 9)  # HU that liver and spleen share: the phase of the contrast

    def blob(
        self, centre: Vector, radii: Vector, hu: float, jitter: float = 0, tilt: Vector = UPRIGHT, **more: Any
    ) -> _Blob:
        """An ellipsoid placed in proportion to the body, moved by `jitter` mm (standard deviation)."""
        place = np.asarray(centre) * self.scale + self.rng.normal(0, 1, 3) * jitter
        return _Blob(place, np.asarray(radii, float), hu, _rotation(tilt), **more)

    def twigs(
        self, count: int, low: Vector, high: Vector, radius: tuple[float, float], hu: float, **more: Any
    ) -> Iterator[_Blob]:
        """Thin vessels at random in the box from `low` to `high`."""
        for _ in range(count):
            thin, length = self.rng.uniform(*radius), self.rng.uniform(13, 32)
            place, tilt = self.rng.uniform(low, high), self.rng.uniform(-80, 80, 3)
            yield self.blob(place, (thin, thin, length), hu, tilt=tilt, **more)

    def normal(self, mean: float, sd: float) -> float:
        """A normal draw, cut at two standard deviations."""
        return float(mean + sd * np.clip(self.rng.normal(), -2, 2))

    def spine(self) -> Iterator[_Blob]:
        """Vertebrae and discs, the canal, the processes and the muscles beside them."""
        marrow, level = self.normal(210, 30), self.rng.uniform(0, 34)
        for side in (-1, 1):
            yield self.blob((side * 27, -66, 0), (23, 17, 400), MUSCLE)
            yield self.blob((side * 33, -42, -90), (16, 17, 85), MUSCLE)  # psoas
        yield self.blob((0, -39, 0), (19, 14, 400), 90)  # discs, where no vertebra covers them
        for z in np.arange(-238, 239, 34) + level:
            yield self.blob((0, -39, z), (21, 15.5, 14), marrow, barrel=True, rim=(2.0, 480), texture=8)
            yield self.blob((0, -80, z - 8), (3.5, 13, 9), 330, rim=(1.5, 560))
            for side in (-1, 1):
                yield self.blob((side * 13, -59, z + 3), (5, 9, 8), 330, rim=(1.5, 560))
                yield self.blob((side * 25, -64, z + 3), (15, 4.5, 5), 300, tilt=(0, 0, side * 20))
        yield self.blob((0, -61, 0), (8.5, 7.5, 400), 25)

    def chest(self) -> Iterator[_Blob]:
        """Vessels of the lungs and the heart."""
        yield from self.twigs(14, (45, -50, 60), (95, 40, 120), (1.8, 3.2), 40)
        yield from self.twigs(14, (-95, -50, 60), (-45, 40, 120), (1.8, 3.2), 40)
        yield self.blob((-20, 26, 118), (50, 40, 38), self.normal(135, 12), 5, tilt=(0, 25, 0), label=0)

    def bowel(self) -> Iterator[_Blob]:
        """Colon along the flanks and in front, loops of small bowel, mesenteric vessels."""
        rng = self.rng
        colon = [(-92, -14, z) for z in range(-130, 1, 22)] + [(88, 0, z) for z in range(-130, -40, 22)]
        colon += [(x, 48 - 0.001 * x * x, -22 - 0.12 * abs(x)) for x in range(-80, 81, 20)]
        for place in colon:
            gas = rng.uniform(-6, 14) if rng.random() < 0.6 else None
            hu, radii, rim = rng.uniform(10, 60), rng.uniform(13, 19, 3), (2.5, 65)
            yield self.blob(place, radii, hu, 4, rim=rim, gas_above=gas, confined=True, texture=10, label=0)
        for _ in range(34):
            place = rng.uniform((-70, -8, -135), (70, 56, -28))
            gas = rng.uniform(2, 10) if rng.random() < 0.25 else None
            radii, tilt = rng.uniform((9, 9, 18), (13, 13, 34)), rng.uniform(-90, 90, 3)
            hu, rim = rng.uniform(20, 60), (2.0, self.normal(90, 10))
            yield self.blob(place, radii, hu, tilt=tilt, rim=rim, gas_above=gas, confined=True)
        yield from self.twigs(30, (-60, -10, -130), (60, 45, 30), (1.5, 3), 120, confined=True)

    def vessels(self) -> Iterator[_Blob]:
        """Aorta, vena cava, pancreas with the splenic vein: all near the spleen's HU."""
        artery, vein = self.normal(140, 14), self.normal(120, 12)
        yield self.blob((-9, -14, 0), (10, 10, 500), artery, 2, rim=(1.0, 150), label=0)
        yield self.blob((19, -13, 0), (12, 9, 500), vein, 2, label=0)
        gland, soft = self.normal(90, 8), {"confined": True, "label": 0}
        yield self.blob((-22, 6, 14), (44, 10, 11), gland, 4, (0, 12, -18), **soft)
        yield self.blob((22, 14, -2), (16, 13, 20), gland, 3, **soft)
        yield self.blob((-30, -4, 18), (48, 4, 4), vein + 15, 3, (0, 12, 14), **soft)

    def kidney(self, side: int, label: int) -> list[_Blob]:
        """Parenchyma with a brighter cortex, and the sinus fat towards the spine."""
        size, hu = self.rng.uniform(0.92, 1.1), self.normal(118, 6)
        radii = np.array([23, 24, 49]) * size
        tilt = (self.normal(8, 4), side * self.normal(-8, 4), side * self.normal(-18, 8))
        place = np.array([side * 57, -36, -26 if side < 0 else -30])
        body = self.blob(place, radii, hu, 5, tilt, label=label, rim=(6.0, hu + 18), texture=5)
        inner = body.centre + np.array([-side * 11, 5, 0]) * size
        sinus = replace(body, centre=inner, radii=np.array([10, 8, 22]), hu=-50, rim=None, label=0)
        return [body, sinus]

    def stomach(self) -> _Blob:
        """Food and an air bubble in front; presses into the spleen."""
        radii = np.array([37, 33, 50]) * self.rng.uniform(0.8, 1.15)
        tilt = (self.normal(-10, 8), self.normal(20, 10), 0)
        contents, gas = self.rng.uniform(30, 60), self.rng.uniform(0.1, 0.9) * radii[1]
        hints = {"rim": (3.5, 75), "gas_above": gas, "confined": True, "texture": 8, "label": 0}
        return self.blob((-36, 20, 42), radii, contents, 5, tilt, **hints)

    def liver(self, kidney: _Blob) -> Iterator[_Blob]:
        """Two lobes around a hilum, veins, and the gall bladder."""
        size, hu = self.rng.uniform(0.92, 1.1), self.parenchyma + self.normal(-2, 4)
        hilum = self.blob((6, -2, -16), (36, 40, 46), hu, 4)
        hints = {"carved": (hilum, kidney), "confined": True, "texture": 5, "label": LIVER}
        yield self.blob(
            (10, 38, 46), np.array([64, 31, 38]) * size, hu, 6, (0, self.normal(8, 6), 0), **hints
        )
        yield self.blob((66, 4, 20), np.array([68, 74, 92]) * size, hu, 6, (0, self.normal(6, 6), 0), **hints)
        yield from self.twigs(12, (35, -25, 0), (80, 30, 62), (2, 4.5), hu + 35)
        yield self.blob((48, 40, -14), (13, 15, 22), 10, 5, tilt=(20, 0, 0), confined=True, label=0)

    def spleen(self, stomach: _Blob, kidney: _Blob) -> _Blob:
        """A crescent along the left posterior wall with the impressions of stomach and kidney.

        The thin axis points out of the wall, the long one runs down and forwards along the tenth rib.
        """
        turn = (self.normal(28, 12), self.normal(0, 8), self.normal(35, 9))
        axes = _rotation((turn[0], 0, 0)) @ _rotation((0, turn[1], turn[2])).T
        radii = np.array([32, 54, 66]) * self.rng.uniform(0.85, 1.15, 3)
        place = np.array([-80, -26, 38]) * self.scale + self.rng.normal(0, 1, 3) * (5, 8, 11)
        hu = self.parenchyma + self.normal(3, 3)
        hollow_at = place + axes.T @ (radii * (1.4, self.normal(0.2, 0.2), self.normal(-0.1, 0.2)))
        hollow = _Blob(hollow_at, radii * (1.0, 0.75, 0.8), hu, axes)
        middle = self.blob((0, -25, 0), (52, 80, 500), hu)  # nothing reaches the spine and the great vessels
        return _Blob(
            place, radii, hu, axes, SPLEEN, confined=True, texture=6, carved=(hollow, stomach, kidney, middle)
        )


def _draw_patient(rng: np.random.Generator) -> _Patient:
    """Draw body, pose and organs."""
    scale = rng.uniform(0.9, 1.1) * rng.uniform(0.98, 1.02, 3)  # ±12 % in all
    patient = _Patient(
        offset=rng.uniform((-12, -8, -24), (12, 8, 24)),
        rotation=_rotation(rng.normal(0, 2.2, 3)),
        bend=tuple(_Waves.draw(rng, 2.8, (100, 240)) for _ in range(3)),
        grain=_Waves.draw(rng, 1.0, (18, 50)),
        trunk=np.array([140, 98]) * scale[:2],
        fat=rng.uniform((8, 8), (17, 20)),
        wall=rng.uniform(10, 13),
        domes=np.array([rng.uniform(82, 96), rng.uniform(74, 88)]) * scale[2],
        rib_phase=rng.uniform(0, 1),
        noise_hu=rng.uniform(12, 20),
    )
    draw = _Anatomist(rng, scale)
    right, left, stomach = draw.kidney(1, RIGHT_KIDNEY), draw.kidney(-1, LEFT_KIDNEY), draw.stomach()
    spleen = _fit_volume(patient, draw.spleen(stomach, left[0]), target_ml=rng.uniform(120, 350))
    # Later blobs cover earlier ones: bowel gives way to organs, and nothing covers the spleen.
    parts = [draw.chest(), draw.spine(), draw.bowel(), [stomach], draw.liver(right[0]), draw.vessels()]
    blobs = [b for part in parts for b in part] + right + left + [spleen]
    return replace(patient, blobs=tuple(blobs))


def _fit_volume(patient: _Patient, spleen: _Blob, target_ml: float) -> _Blob:
    """Scale the spleen until what wall, diaphragm and neighbours leave of it has the wanted volume."""
    step = 6.0
    centre = patient.rotation.T @ spleen.centre + patient.offset
    points = patient.points([c + np.arange(-126, 127, step) for c in centre])
    room = _room(patient, points)
    hollow, *others = spleen.carved

    def scaled(factor: float) -> _Blob:
        moved = spleen.centre + (hollow.centre - spleen.centre) * factor
        grown = replace(hollow, centre=moved, radii=hollow.radii * factor)
        return replace(spleen, radii=spleen.radii * factor, carved=(grown, *others))

    low, high = 0.4, 2.0
    for _ in range(8):
        middle = (low + high) / 2
        volume_ml = np.count_nonzero(scaled(middle).distance(points, room) < 0) * step**3 / 1000
        low, high = (middle, high) if volume_ml < target_ml else (low, middle)
    return scaled(low)


def _oval(points: Grid, half: np.ndarray) -> np.ndarray:
    """Signed distance in mm to an oval cylinder, a little squarer than an ellipse, as a trunk is."""
    a, b = np.square(points[0] / np.float32(half[0])), np.square(points[1] / np.float32(half[1]))
    norm = np.sqrt(a + b - np.float32(0.25) * np.minimum(a, 2) * np.minimum(b, 2)) + np.float32(1e-6)
    slope = np.sqrt(a / np.float32(half[0] ** 2) + b / np.float32(half[1] ** 2)) + np.float32(1e-6)
    return norm * (norm - 1) / slope


def _below_diaphragm(patient: _Patient, points: Grid) -> np.ndarray:
    """Signed distance in mm to the two domes of the diaphragm, negative on the abdomen's side."""
    u, v, w = points
    curve = np.float32(0.011)
    apex = np.where(u > 0, *patient.domes.astype(np.float32))
    drop = curve * (np.square(np.abs(u) - 62) + np.square(v - 8))
    return (w - apex + drop) / np.sqrt(1 + 4 * curve * drop)


def _room(patient: _Patient, points: Grid) -> np.ndarray:
    """Signed distance in mm to the abdominal cavity, negative inside."""
    cavity = _oval(points, patient.trunk - patient.fat) + patient.wall
    return np.maximum(cavity, _below_diaphragm(patient, points))


@dataclass(frozen=True)
class _Canvas:
    """A piece of the grid with all that is painted on it; every array is [X, Y, Z]."""

    points: list[np.ndarray]  # patient coordinates in mm
    grain: np.ndarray  # smooth unit noise: the unevenness of tissues
    hu: np.ndarray  # painted in place
    label: np.ndarray  # painted in place
    edge_mm: float  # half width of the transition between two tissues

    def crop(self, box: tuple[slice, ...]) -> "_Canvas":
        """A view of a part."""
        parts = {name: getattr(self, name)[box] for name in ("grain", "hu", "label")}
        return replace(self, points=[p[box] for p in self.points], **parts)

    def mix(self, below: np.ndarray, distance: np.ndarray, value: float | np.ndarray) -> None:
        """Cover `below` inside a surface, in place; voxels on the surface get their share of both tissues."""
        share = np.clip(0.5 - distance / np.float32(2 * self.edge_mm), 0, 1)
        below += share * (value - below)

    def cover(self, distance: np.ndarray, value: float | np.ndarray) -> None:
        """Paint HU inside a surface."""
        self.mix(self.hu, distance, value)


def _render(patient: _Patient, axes: Grid, edge_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise-free HU (float32) and labels (uint8) on the world grid, slab by slab along x."""
    shape = tuple(len(a) for a in axes)
    hu, label = np.full(shape, AIR, np.float32), np.zeros(shape, np.uint8)
    thick = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], thick):
        slab = slice(start, start + thick)
        part = [axes[0][slab], *axes[1:]]
        canvas = _Canvas(patient.points(part), patient.grain(part), hu[slab], label[slab], edge_mm)
        _paint_table(canvas, patient, part)
        _paint_trunk(canvas, patient)
        _paint_blobs(canvas, patient, part)
    return hu, label


def _paint_table(canvas: _Canvas, patient: _Patient, axes: Grid) -> None:
    """A curved carbon shell around foam; it follows the scanner, not the patient."""
    x, y, _ = np.ix_(*(a.astype(np.float32) for a in axes))
    top = patient.offset[1] - patient.trunk[1] - 7
    depth = np.float32(top) + np.float32(0.0011) * x * x - y
    outside = np.maximum(np.abs(depth - 14) - 14, np.abs(x) - 205)
    canvas.cover(outside, -150.0)
    canvas.cover(outside + 3, -940.0)


def _paint_trunk(canvas: _Canvas, patient: _Patient) -> None:
    """Skin, fat, muscle, the cavity's fat, the lungs and the ribs."""
    grain, skin = canvas.grain, _oval(canvas.points, patient.trunk)
    canvas.cover(skin, 30.0)
    canvas.cover(skin + 2, FAT + 4 * grain)
    muscle = _oval(canvas.points, patient.trunk - patient.fat)
    canvas.cover(muscle, MUSCLE + 6 * grain)
    cavity = muscle + np.float32(patient.wall)
    canvas.cover(cavity, FAT + 8 * grain)
    above = np.maximum(cavity, -_below_diaphragm(patient, canvas.points))
    lungs = np.maximum(above, 24 - np.abs(canvas.points[0]))
    canvas.cover(lungs - 3, MUSCLE)  # diaphragm and pleura
    canvas.cover(lungs, LUNG + 15 * grain)
    _paint_ribs(canvas, patient, muscle)


def _paint_ribs(canvas: _Canvas, patient: _Patient, muscle: np.ndarray) -> None:
    """Sloping bands in the wall that end at the costal margin; computed only where the wall is."""
    depth, pitch = np.abs(muscle + 5.5), 29.0
    near = np.nonzero(depth < 5 + 2 * canvas.edge_mm)
    u, v, w = (p[near] for p in canvas.points)
    turn = (w + 0.5 * v) / pitch + patient.rib_phase
    across = np.abs(turn - np.rint(turn)) * pitch * 0.9
    rib = (np.hypot(depth[near] / 3.6, across / 6.2) - 1) * 3.6
    margin = np.float32(-30) + 0.6 * v - w  # the arch rises towards the front
    distance = np.maximum(rib, np.maximum(margin, 26 - np.abs(u)))
    bone = canvas.hu[near]
    canvas.mix(bone, distance, 260 + 320 * np.clip(1 + distance / 2, 0, 1))  # marrow within, cortex outside
    canvas.hu[near] = bone


def _paint_blobs(canvas: _Canvas, patient: _Patient, axes: Grid) -> None:
    """Paint the organs one over the other, each in the box that can hold it."""
    room = _room(patient, canvas.points)
    bend = np.sqrt(3) * max(float(np.abs(field(axes)).max()) for field in patient.bend)
    for blob in patient.blobs:
        middle = patient.rotation.T @ blob.centre + patient.offset
        reach = blob.extent(patient.rotation) + bend + 2 * canvas.edge_mm
        ends = (np.searchsorted(a, (m - r, m + r)) for a, m, r in zip(axes, middle, reach, strict=True))
        box = tuple(slice(*pair) for pair in ends)
        if room[box].size:
            _paint_blob(canvas.crop(box), blob, room[box])


def _paint_blob(canvas: _Canvas, blob: _Blob, room: np.ndarray) -> None:
    distance = blob.distance(canvas.points, room)
    tissue = np.float32(blob.hu) + np.float32(blob.texture) * canvas.grain
    if blob.gas_above is not None:
        canvas.mix(tissue, np.float32(blob.gas_above + blob.centre[1]) - canvas.points[1], GAS)
    if blob.rim is not None:
        canvas.mix(tissue, -(distance + np.float32(blob.rim[0])), blob.rim[1])
    canvas.cover(distance, tissue)
    if blob.label is not None:
        canvas.label[distance < 0] = blob.label


def _add_noise(hu: np.ndarray, patient: _Patient, axes: Grid, rng: np.random.Generator) -> None:
    """Add quantum noise in place: correlated, stronger deep in the body, uneven from slice to slice."""
    x, y = np.ix_(*((a - o) / t for a, o, t in zip(axes[:2], patient.offset, patient.trunk, strict=False)))
    depth = np.clip(1 - x * x - y * y, 0, 1)  # fewer photons reach the detector through the middle
    level = (patient.noise_hu * np.sqrt(0.5 + 0.9 * depth)).astype(np.float32)
    sigma = [float(np.clip(1.2 / (a[1] - a[0] if len(a) > 1 else 3), 0.45, 1.8)) for a in axes[:2]]
    before = rng.standard_normal(hu.shape[:2], np.float32)
    for z in range(hu.shape[2]):
        fresh = rng.standard_normal(hu.shape[:2], np.float32)
        white, before = 0.9 * fresh + 0.436 * before, fresh  # neighbouring slices share rays
        smooth = _blur_noise(_blur_noise(white, sigma[0], 0), sigma[1], 1)
        hu[:, :, z] += level * smooth * np.float32(rng.uniform(0.85, 1.15))


def _blur_noise(plane: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """Circular Gaussian blur along one axis (noise has no borders) that keeps the variance of white noise."""
    reach = round(2.5 * sigma + 0.5)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    weights = (weights / np.linalg.norm(weights)).astype(np.float32)
    return sum(w * np.roll(plane, i - reach, axis) for i, w in enumerate(weights))
