"""The prepared grid is the article's, voxel for voxel, and the way back lands where MONAI's does."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import (
    AsDiscreted,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from segcloud.config import PrepareConfig
from segcloud.data import nifti
from segcloud.data.nifti import BadScan
from segcloud.data.transforms import classes, prepare, to_source
from tests.helpers import REAL_DATA, as_volume, dice, needs_real_data, phantom_volumes

SPLEEN = {"spleen": 1}
BOTH = ["image", "label"]


def article_transforms():
    """The article's deterministic transforms, written out as it writes them."""
    return Compose(
        [
            LoadImaged(keys=BOTH),
            EnsureChannelFirstd(keys=BOTH),
            ScaleIntensityRanged(keys=["image"], a_min=-57, a_max=164, b_min=0.0, b_max=1.0, clip=True),
            CropForegroundd(keys=BOTH, source_key="image"),
            Orientationd(keys=BOTH, axcodes="RAS", labels=None),
            Spacingd(keys=BOTH, pixdim=(1.5, 1.5, 2.0), mode=("bilinear", "nearest")),
        ]
    )


def _check_parity(image_file, label_file):
    expected = article_transforms()({"image": str(image_file), "label": str(label_file)})
    image, label = nifti.decode(image_file.read_bytes()), nifti.decode(label_file.read_bytes())
    prepared = prepare(image, label, PrepareConfig(), SPLEEN)
    assert np.array_equal(prepared.image, expected["image"][0].numpy())
    assert np.array_equal(prepared.label, expected["label"][0].numpy() == 1)
    assert np.allclose(prepared.affine, expected["image"].affine.numpy())


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_prepared_equals_the_articles_compose(tmp_path, orientation):
    image, label = phantom_volumes(3, spacing=(3, 3.4, 5), orientation=orientation)
    for name, volume in (("image", image), ("label", label)):
        (tmp_path / f"{name}.nii").write_bytes(nib.Nifti1Image(volume.array, volume.affine).to_bytes())
    _check_parity(tmp_path / "image.nii", tmp_path / "label.nii")


@needs_real_data
@pytest.mark.real_data
def test_prepared_equals_the_articles_compose_on_a_real_scan():
    folder = REAL_DATA / "spleen_ct"
    _check_parity(folder / "example_ct.nii.gz", folder / "example_seg.nii.gz")


def _rotate(volume, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return as_volume(volume.array, turn @ volume.affine)


@pytest.mark.parametrize("degrees", [0, 12])
@pytest.mark.parametrize("orientation", ["RAS", "LPI", "ASL"])
def test_a_mask_survives_the_way_there_and_back(orientation, degrees):
    image, label = phantom_volumes(1, spacing=(3, 3, 4), orientation=orientation)
    image, label = _rotate(image, degrees), _rotate(label, degrees)
    prepared = prepare(image, label, PrepareConfig(), SPLEEN)
    scores = torch.from_numpy(prepared.label).float()[None] - 0.5
    assert dice(to_source(scores, prepared) > 0, label.array == 1) > 0.99


def test_two_channels_and_their_difference_give_the_same_mask():
    image, label = phantom_volumes(2, spacing=(4, 4, 4))
    prepared = prepare(image, label, PrepareConfig(), SPLEEN)
    scores = torch.randn(2, *prepared.image.shape, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(to_source(scores, prepared), to_source(scores[1:] - scores[:1], prepared))


def test_the_way_back_agrees_with_monais_invertd(tmp_path):
    image, label = phantom_volumes(5, spacing=(3, 3, 5), orientation="LPS")
    for name, volume in (("image", image), ("label", label)):
        (tmp_path / f"{name}.nii").write_bytes(nib.Nifti1Image(volume.array, volume.affine).to_bytes())
    article = article_transforms()
    data = article({key: str(tmp_path / f"{key}.nii") for key in BOTH})
    noise = torch.randn(data["label"].shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool3d(data["label"].as_tensor() + noise, 5, 1, 2)
    logits = torch.cat([-blurred, blurred - 0.5])
    batch = list_data_collate([data])
    batch["pred"] = MetaTensor(torch.softmax(logits, 0)[None])
    post = Compose(
        [
            Invertd("pred", article, "image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
        ]
    )
    expected = post(decollate_batch(batch)[0])["pred"][0].numpy()
    prepared = prepare(image, label, PrepareConfig(), SPLEEN)
    assert dice(to_source(logits, prepared) == 1, expected == 1) > 0.995


def test_several_organs_become_consecutive_classes():
    label = np.array([0, 5, 1, 7, 5], dtype=np.uint16)
    assert classes(label, {"liver": 5, "spleen": 1}).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("label", "code"),
    [
        (np.zeros(4), "empty_label"),
        (np.array([0, 2, 3]), "empty_label"),
        (np.array([0, 1.5]), "label_values"),
        (np.array([0, np.nan]), "label_values"),
    ],
)
def test_an_unusable_label_gets_its_code(label, code):
    with pytest.raises(BadScan) as caught:
        classes(label, SPLEEN)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ((0, 800), "not_ct"),
        ((-1000, np.nan), "not_finite"),
        ((-1000, np.inf), "not_finite"),
        ((-1000, -900), "not_ct"),
    ],
)
def test_what_is_not_a_ct_gets_its_code(values, code):
    array = np.full((4, 4, 4), values[0], np.float32)
    array[0] = values[1]
    with pytest.raises(BadScan) as caught:
        prepare(as_volume(array, np.eye(4)), None, PrepareConfig(), SPLEEN)
    assert caught.value.code == code


def test_nothing_inside_the_window_gets_its_code():
    array = np.full((4, 4, 4), -1000, np.int16)
    array[0] = -100
    with pytest.raises(BadScan) as caught:
        prepare(as_volume(array, np.eye(4)), None, PrepareConfig(), SPLEEN)
    assert caught.value.code == "no_foreground"


@needs_real_data
@pytest.mark.real_data
def test_a_real_mr_is_not_a_ct():
    volume = nifti.decode((REAL_DATA / "spleen_ct" / "example_mr_sm.nii.gz").read_bytes())
    with pytest.raises(BadScan, match="not_ct"):
        prepare(volume, None, PrepareConfig(), SPLEEN)


@pytest.mark.parametrize(("degrees", "refused"), [(0.02, False), (1.0, True)])
def test_a_sheared_scan_is_a_verdict_before_the_network_runs(degrees, refused):
    image, _ = phantom_volumes(0, spacing=(6, 6, 6), orientation="RAS")
    tilt = np.eye(4)
    tilt[1, 2] = np.tan(np.radians(degrees))
    sheared = dataclasses.replace(image, affine=tilt @ image.affine)
    if not refused:
        prepare(sheared, None, PrepareConfig(), SPLEEN)
        return
    with pytest.raises(BadScan) as caught:
        prepare(sheared, None, PrepareConfig(), SPLEEN)
    assert caught.value.code == "sheared"
