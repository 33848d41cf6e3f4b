"""What makes the phantoms a fair task: known anatomy on every grid, and no shortcut that solves them."""

import json

import nibabel as nib
import numpy as np
import pytest

from segcloud.synthetic import Phantom, make_phantom, save_nifti, write_dataset

SPACING = (4.0, 4.0, 4.0)
BINS = np.arange(-60.0, 261.0, 4.0)  # soft tissue, HU


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(seed, SPACING, orientation="RAS") for seed in range(12)]


def volume_ml(phantom: Phantom, label: int = 1) -> float:
    return np.count_nonzero(phantom.label == label) * abs(np.linalg.det(phantom.affine[:3, :3])) / 1000


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def smooth(volume: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    taps = np.arange(-5, 6)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    for axis in range(3):
        volume = sum(w * np.roll(volume, t, axis) for t, w in zip(taps, weights / weights.sum(), strict=True))
    return volume


def best_window_dice(hu: np.ndarray, spleen: np.ndarray) -> float:
    """The highest Dice of all masks lo ≤ HU < hi, from two histograms."""
    hit = np.append(0, np.histogram(hu[spleen], BINS)[0].cumsum())
    size = np.append(0, np.histogram(hu, BINS)[0].cumsum())
    scores = 2 * np.subtract.outer(hit, hit) / (np.abs(np.subtract.outer(size, size)) + spleen.sum())
    return float(scores.max())


def test_the_same_seed_is_the_same_scan() -> None:
    first, second = make_phantom(5, None), make_phantom(5, None)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.label, second.label)
    np.testing.assert_array_equal(first.affine, second.affine)


def test_another_seed_is_another_patient(phantoms: list[Phantom]) -> None:
    assert dice(phantoms[0].label == 1, phantoms[1].label == 1) < 0.9


def test_types_and_range(phantoms: list[Phantom]) -> None:
    phantom = phantoms[0]
    assert (phantom.image.dtype, phantom.label.dtype) == (np.int16, np.uint8)
    assert phantom.affine.dtype == np.float64
    assert -1024 <= phantom.image.min() < -950  # air
    assert phantom.image.max() > 350  # bone
    assert set(np.unique(phantom.label)) == {0, 1}


def test_a_patient_is_the_same_on_every_grid(phantoms: list[Phantom]) -> None:
    fine = make_phantom(3, (2.5, 2.5, 3.0), orientation="LAS")
    assert volume_ml(fine) == pytest.approx(volume_ml(phantoms[3]), rel=0.03)


def test_spleen_volumes_are_human(phantoms: list[Phantom]) -> None:
    volumes = [volume_ml(p) for p in phantoms]
    assert min(volumes) > 110
    assert max(volumes) < 370
    assert np.std(volumes) > 30


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "PIR", "SRA"])
def test_spleen_is_left_and_behind_in_the_world(orientation: str) -> None:
    for seed in range(3):
        phantom = make_phantom(seed, SPACING, orientation=orientation)
        body = nib.affines.apply_affine(phantom.affine, np.argwhere(phantom.image > -300)).mean(axis=0)
        spleen = nib.affines.apply_affine(phantom.affine, np.argwhere(phantom.label == 1)).mean(axis=0)
        assert spleen[0] < body[0] - 50  # RAS+: the patient's left is negative
        assert spleen[1] < body[1] + 5


@pytest.mark.parametrize("orientation", ["LPS", "PIR", "SRA"])
def test_orientation_changes_storage_and_not_the_scan(orientation: str, phantoms: list[Phantom]) -> None:
    stored = make_phantom(0, SPACING, orientation=orientation)
    assert "".join(nib.aff2axcodes(stored.affine)) == orientation
    back = nib.as_closest_canonical(nib.Nifti1Image(stored.image, stored.affine))
    np.testing.assert_array_equal(np.asarray(back.dataobj), phantoms[0].image)
    np.testing.assert_allclose(back.affine, phantoms[0].affine)


@pytest.mark.parametrize("blur", [False, True])
def test_no_threshold_finds_the_spleen(phantoms: list[Phantom], blur: bool) -> None:
    for phantom in phantoms:
        hu = phantom.image.astype(np.float32)
        assert best_window_dice(smooth(hu) if blur else hu, phantom.label == 1) < 0.4


def test_no_fixed_position_finds_the_spleen(phantoms: list[Phantom]) -> None:
    masks = np.array([p.label == 1 for p in phantoms])
    for index, mask in enumerate(masks):
        prior = np.delete(masks, index, axis=0).mean(axis=0) > 0.5
        assert dice(prior, mask) < 0.75


def test_label_lies_on_spleen_tissue(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        inside = phantom.image[phantom.label == 1]
        assert 75 < inside.mean() < 130
        assert np.mean((inside > 20) & (inside < 200)) > 0.9


def test_noise_is_a_scanner_s(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        core = (phantom.label == 1) & (smooth((phantom.label == 1).astype(np.float32)) > 0.95)
        steps = np.diff(phantom.image.astype(np.float32), axis=0)[core[1:] & core[:-1]]
        assert 8 < steps.std() / np.sqrt(2) < 30  # anatomy is smooth: what changes per voxel is noise


def test_multi_organ_labels_are_totalsegmentator_s(phantoms: list[Phantom]) -> None:
    phantom = make_phantom(0, SPACING, orientation="RAS", multi_organ=True)
    assert set(np.unique(phantom.label)) == {0, 1, 2, 3, 5}
    np.testing.assert_array_equal(phantom.label == 1, phantoms[0].label == 1)
    x = {organ: np.argwhere(phantom.label == organ)[:, 0].mean() for organ in (2, 3, 5)}
    assert x[2] > x[3]  # the right kidney is on the right
    assert volume_ml(phantom, 5) > 500


def test_drawn_spacing_stays_in_range() -> None:
    for seed in range(4):
        x, y, z = nib.affines.voxel_sizes(make_phantom(seed, None, field_mm=(60, 60, 60)).affine)
        assert x == pytest.approx(y)
        assert 2.4 <= x <= 3.4
        assert 2.5 <= z <= 5


def test_shape_sets_the_grid() -> None:
    assert make_phantom(0, shape=(20, 18, 16), orientation="RAS").image.shape == (20, 18, 16)
    whole = make_phantom(0, None, shape=(33, 27, 24), orientation="RAS")
    np.testing.assert_allclose(nib.affines.voxel_sizes(whole.affine), 10)


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"orientation": "RRS"}, {"orientation": "RA"}, {"shape": (0, 9, 9)}]
)
def test_a_wrong_request_is_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"seed|orientation|voxels"):
        make_phantom(**{"seed": 0, **wrong})


def test_dataset_has_the_decathlon_layout(tmp_path) -> None:
    written = write_dataset(tmp_path, 2, 1, seed=3, spacing=(8, 8, 8))
    about = json.loads((tmp_path / "dataset.json").read_text())
    assert all(path.is_file() for path in written)
    assert (about["numTraining"], about["numTest"], len(about["training"])) == (2, 1, 2)
    assert about["labels"] == {"background": 0, "spleen": 1}
    assert about["test"] == ["./imagesTs/phantom_002.nii.gz"]
    assert (tmp_path / "labelsTs" / "phantom_002.nii.gz") in written


def test_dataset_pairs_share_one_grid(tmp_path) -> None:
    write_dataset(tmp_path, 2, 0, seed=0)
    for pair in json.loads((tmp_path / "dataset.json").read_text())["training"]:
        image, label = nib.load(tmp_path / pair["image"]), nib.load(tmp_path / pair["label"])
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)


def test_dataset_is_equal_byte_for_byte(tmp_path) -> None:
    first, second = (write_dataset(tmp_path / n, 1, 1, seed=7, spacing=(9, 9, 9)) for n in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_saved_nifti_says_where_it_lies(tmp_path, name: str) -> None:
    phantom = make_phantom(0, (9, 9, 9), orientation="LPS")
    loaded = nib.load(save_nifti(tmp_path / "new" / name, phantom.image, phantom.affine))
    np.testing.assert_array_equal(np.asarray(loaded.dataobj), phantom.image)
    for form, code in (loaded.get_qform(coded=True), loaded.get_sform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(form, phantom.affine, atol=1e-4)
    assert loaded.header.get_xyzt_units()[0] == "mm"
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_saving_refuses_what_is_no_volume(tmp_path) -> None:
    with pytest.raises(ValueError, match="3D"):
        save_nifti(tmp_path / "a.nii.gz", np.zeros((2, 2), np.uint8), np.eye(4))
    with pytest.raises(ValueError, match=r"\.nii"):
        save_nifti(tmp_path / "a.png", np.zeros((2, 2, 2), np.uint8), np.eye(4))
