"""NIfTI in and out: bad files become verdicts, masks keep their source's grid, headers leak nothing."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from segcloud.data.nifti import BadScan, decode, encode_mask, onto_grid
from tests.helpers import as_volume

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
ARRAY = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
RAW = nib.Nifti1Image(ARRAY, AFFINE).to_bytes()
PACKED = gzip.compress(RAW)
RGB = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("data", [RAW, PACKED, nib.Nifti2Image(ARRAY, AFFINE).to_bytes()])
def test_decode_gives_array_and_affine(data):
    volume = decode(data)
    assert np.array_equal(volume.array, ARRAY)
    assert np.allclose(volume.affine, AFFINE)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (PACKED[: len(PACKED) // 2], "truncated"),
        (RAW[:-10], "truncated"),
        (RAW[:100], "not_nifti"),
        (PACKED[:40] + b"\xff\xff" + PACKED[42:], "damaged"),
        (PACKED[:-6] + b"\0\0" + PACKED[-4:], "damaged"),
        (b"DICM" * 200, "not_nifti"),
        (nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.int16), AFFINE).to_bytes(), "not_3d"),
        (nib.Nifti1Image(np.zeros((4, 5), np.int16), AFFINE).to_bytes(), "not_3d"),
        (nib.Nifti1Image(RGB, AFFINE).to_bytes(), "not_scalar"),
        (nib.Nifti1Image(np.zeros((4, 5, 6), np.complex64), AFFINE).to_bytes(), "not_scalar"),
        (RAW[:296] + bytes(16) + RAW[312:], "singular_affine"),  # srow_y = 0
        (RAW[:296] + b"\xff" * 16 + RAW[312:], "singular_affine"),
    ],
)
def test_a_bad_file_gets_its_code(data, code):
    with pytest.raises(BadScan) as caught:
        decode(data)
    assert caught.value.code == code


def test_a_trailing_axis_of_one_is_dropped():
    assert decode(nib.Nifti1Image(ARRAY[..., None], AFFINE).to_bytes()).array.shape == ARRAY.shape


def _source(kind):
    image = nib.Nifti1Image(ARRAY, None)
    c, s = np.cos(0.3), np.sin(0.3)
    oblique = AFFINE @ np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    affine = oblique if kind == "oblique" else AFFINE
    image.set_sform(affine, 0 if kind == "qform" else 2)
    image.set_qform(affine, 0 if kind == "sform" else 1)
    image.header["descrip"], image.header["intent_name"] = b"DOE^JANE 1970", b"DOE"
    return decode(image.to_bytes())


@pytest.mark.parametrize("kind", ["sform", "qform", "both", "oblique"])
def test_a_mask_keeps_the_grid_and_its_codes(kind):
    source = _source(kind)
    mask = decode(encode_mask((ARRAY > 50).astype(np.uint8), source))
    assert np.array_equal(mask.array, ARRAY > 50)
    assert np.array_equal(mask.affine, source.affine)
    for field in ("qform_code", "sform_code", "srow_x", "quatern_b", "qoffset_x", "pixdim", "xyzt_units"):
        assert np.array_equal(mask.header[field], source.header[field]), field


def test_a_mask_carries_no_free_text():
    data = gzip.decompress(encode_mask(np.zeros(ARRAY.shape, np.uint8), _source("both")))
    assert b"DOE" not in data


def test_equal_masks_are_equal_bytes():
    mask = (ARRAY > 3).astype(np.uint8)
    assert encode_mask(mask, _source("both")) == encode_mask(mask, _source("both"))


@pytest.mark.parametrize("codes", ["LPS", "SRA", "ASL"])
def test_a_label_stored_in_another_orientation_lands_on_the_image(codes):
    image = as_volume(ARRAY, AFFINE)
    turned = nib.Nifti1Image(ARRAY, AFFINE).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    )
    assert np.array_equal(onto_grid(decode(turned.to_bytes()), image.array.shape, image.affine), ARRAY)


@pytest.mark.parametrize(
    "change", [np.diag([1, 1, 1.1, 1]), np.array(AFFINE) - AFFINE + np.eye(4) + np.eye(4, k=3)]
)
def test_a_label_elsewhere_is_a_mismatch(change):
    with pytest.raises(BadScan) as caught:
        onto_grid(as_volume(ARRAY, AFFINE @ change), ARRAY.shape, AFFINE)
    assert caught.value.code == "grid_mismatch"


def test_a_label_of_another_shape_is_a_mismatch():
    with pytest.raises(BadScan, match=r"\[4, 5, 5\] is not the image's \[4, 5, 6\]"):
        onto_grid(as_volume(ARRAY[..., :5], AFFINE), ARRAY.shape, AFFINE)


def test_rounding_of_an_affine_is_no_mismatch():
    assert onto_grid(as_volume(ARRAY, AFFINE + 1e-4), ARRAY.shape, AFFINE).shape == ARRAY.shape
