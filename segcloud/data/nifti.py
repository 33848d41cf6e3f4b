"""Reading and writing one NIfTI volume, with a verdict instead of a stack trace for a bad one.

Volumes are decoded from memory: the bytes come whole and verified from storage, ``isal`` inflates them
(gunzip is most of the time between S3 and an array), nibabel reads header and geometry.
"""

import logging
import math
import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from segcloud.errors import SegcloudError

logging.getLogger("nibabel.global").setLevel(
    logging.CRITICAL
)  # a bad header becomes a verdict, not a log line

GZIP_MAGIC = b"\x1f\x8b"
SUFFIXES = (".nii.gz", ".nii")
GRID_TOLERANCE = 0.1
"""Share of a voxel by which two grids may differ and still be one (datasets round their affines)."""


class BadScan(SegcloudError):  # noqa: N818 - the field's word; it is turned into a verdict, rarely raised to a user
    """One scan that cannot be used.

    Attributes:
        code: short reason for tables and tests, e.g. ``truncated``.
        message: one sentence with what was found and the remedy, without the case's name.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Volume:
    """A 3D volume in its source's voxel order.

    Attributes:
        array: [X, Y, Z], the stored dtype, or float64 where the file scales its values.
        affine: float64 4×4, voxel index to RAS+ millimetres.
        header: the source's header, for writing results on the same grid.
    """

    array: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header

    @property
    def spacing(self) -> np.ndarray:
        """Voxel edge lengths in mm, shape [3]."""
        return nib.affines.voxel_sizes(self.affine)


def stem(filename: str) -> str:
    """File name without ``.nii.gz`` or ``.nii``."""
    for suffix in SUFFIXES:
        if filename.endswith(suffix):
            return filename[: -len(suffix)]
    return filename


def decode(data: bytes) -> Volume:
    """Decode the bytes of a ``.nii`` or ``.nii.gz`` file; trailing axes of length 1 are dropped.

    Raises:
        BadScan: empty, truncated or damaged file, not NIfTI, not 3D, not numeric, or a singular affine.
    """
    if not data:
        raise BadScan("empty_file", "the file has no bytes; copy it again")
    if data[:2] == GZIP_MAGIC:
        data = _inflate(data)
    kind = nib.Nifti2Image if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Image
    try:
        image = kind.from_bytes(data)
        shape = image.shape
        _check_header(image, len(data))
        array = np.asanyarray(image.dataobj).reshape(shape[:3])
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError, OSError, OverflowError) as error:
        raise BadScan(
            "not_nifti", f"not a readable NIfTI file ({_one_line(error)}); export it again"
        ) from None
    return Volume(array, np.asarray(image.affine, dtype=np.float64), image.header)


def _inflate(data: bytes) -> bytes:
    try:
        return igzip.decompress(data)
    except EOFError:
        raise BadScan(
            "truncated", "the gzip stream ends early; copy the file again from its source"
        ) from None
    except (isal_zlib.error, zlib.error, OSError) as error:
        raise BadScan("damaged", f"the gzip stream is damaged ({_one_line(error)}); copy it again") from None


def _check_header(image: nib.Nifti1Image, available: int) -> None:
    shape, dtype = image.shape, image.get_data_dtype()
    if len(shape) < 3 or min(shape[:3]) < 1 or math.prod(shape[3:]) != 1:
        raise BadScan("not_3d", f"shape {list(shape)} is not one 3D volume; export a single volume")
    if (
        dtype.fields is not None
        or not (np.issubdtype(dtype, np.number))
        or np.iscomplexobj(np.empty(0, dtype))
    ):
        raise BadScan("not_scalar", f"voxels of type {dtype} are not one number each (RGB?); export in HU")
    needed = int(image.dataobj.offset) + math.prod(shape) * dtype.itemsize
    if available < needed:
        raise BadScan(
            "truncated", f"the header promises {needed} bytes and {available} are there; copy the file again"
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise BadScan("singular_affine", "the affine is singular or not finite; export with geometry")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def grid_distance(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """Largest distance in mm between the corners of a grid under two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]], indexing="ij")).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max())


def onto_grid(volume: Volume, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The volume's array on another grid that differs at most by axis order and direction.

    Nothing is resampled: voxels are only permuted and flipped, so a label map that was written in RAS
    fits an image stored in LPS.

    Raises:
        BadScan: code ``grid_mismatch``, with the largest corner distance or the shapes.
    """
    array, own = volume.array, volume.affine
    transform = nib.orientations.ornt_transform(nib.io_orientation(own), nib.io_orientation(affine))
    own = own @ nib.orientations.inv_ornt_aff(transform, array.shape)
    array = nib.orientations.apply_orientation(array, transform)
    if array.shape != tuple(shape):
        raise BadScan(
            "grid_mismatch",
            f"the label's grid {list(array.shape)} is not the image's {list(shape)}; "
            "resample the label onto the image and upload it again",
        )
    distance = grid_distance(shape, own, affine)
    if distance > GRID_TOLERANCE * nib.affines.voxel_sizes(affine).min():
        raise BadScan(
            "grid_mismatch",
            f"the label lies up to {distance:.1f} mm off the image's grid; "
            "resample the label onto the image and upload it again",
        )
    return array


def encode_mask(mask: np.ndarray, source: Volume) -> bytes:
    """Gzipped NIfTI of a mask on its source's grid.

    Affine, qform, sform and their codes are the source's; the header's free-text fields are not copied,
    since they may identify a patient.

    Args:
        mask: [X, Y, Z] uint8, the source's shape.
        source: the volume that was segmented.
    """
    if mask.shape != source.array.shape:
        raise ValueError(f"mask {mask.shape} is not on the source's grid {source.array.shape}")
    image = nib.Nifti1Image(mask.astype(np.uint8, copy=False), source.affine)
    header = image.header
    for field in ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"):
        header[field] = source.header[field]
    for field in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
        header[field] = source.header[field]
    header["scl_slope"], header["scl_inter"] = 1, 0
    # level 1 of isal: 23 times faster than gzip -6 for 6 % more bytes; mtime 0 keeps equal masks byte-equal
    return igzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
