"""Real patients, end to end through S3: the job overfits one scan, and masks come back on both scans' own grids."""

import json

import dicom2nifti
import nibabel as nib
import numpy as np
import pytest

from segcloud import storage
from segcloud.data.nifti import decode
from segcloud.storage import join
from tests.helpers import REAL_DATA, dice, needs_real_data, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.real_data, needs_real_data]
SPLEEN = REAL_DATA / "spleen_ct"


@pytest.fixture(scope="module")
def scans(s3, tmp_path_factory):
    """Patient 2 with the label, and patient 1 converted from DICOM, in the bucket."""
    uri, folder = s3.uri("real"), tmp_path_factory.mktemp("converted")
    for name in ("example_ct.nii.gz", "example_seg.nii.gz"):
        storage.put(SPLEEN / name, join(uri, name))
    storage.put_json(
        {"training": [{"image": "example_ct.nii.gz", "label": "example_seg.nii.gz"}]}, join(uri, "list.json")
    )
    dicom2nifti.dicom_series_to_nifti(
        str(SPLEEN / "example_ct_dicom"), str(folder / "patient_1.nii.gz"), reorient_nifti=False
    )
    storage.put(folder / "patient_1.nii.gz", join(uri, "inputs", "patient_1.nii.gz"))
    storage.put(SPLEEN / "example_ct.nii.gz", join(uri, "inputs", "patient_2.nii.gz"))
    return uri


def _overfit(cluster, scans, name, epochs):
    config = tiny_config(
        data={"uri": scans, "datalist": join(scans, "list.json"), "split": {"kind": "overfit"}},
        run={"uri": join(scans, "runs", name)},
        prepare={"spacing": [3, 3, 3]},
        model={"channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2], "num_res_units": 2},
        train={
            **{
                "epochs": epochs,
                "batch_size": 8,
                "samples_per_case": 8,
                "roi_size": [64, 64, 64],
                "precision": "auto",
            },
            **{"lr": 3e-3, "positive": 2, "checkpoint_every": 20},
        },
        validation={"every": 20, "roi_size": [96, 96, 96], "sw_batch_size": 1},
        compute={"workers": 2},
    )
    job = cluster.train(config)
    assert job.finish() == 0, job.output
    (native,) = storage.read_json(join(config.run.uri, "result.json"))["native"]
    return config.run.uri, native["dice_spleen"]


def _check_masks(cluster, scans, run):
    """Every mask lies on its source's grid; returns patient 2's Dice."""
    output = join(run, "masks")
    job = cluster.run("jobs/infer.py", "--model", run, "--input", join(scans, "inputs"), "--output", output)
    assert job.process.returncode == 0, job.output
    masks = {}
    for patient in ("patient_1", "patient_2"):
        source = decode(storage.read(join(scans, "inputs", f"{patient}.nii.gz")))
        mask = masks[patient] = decode(storage.read(join(output, f"{patient}_seg.nii.gz")))
        assert mask.array.shape == source.array.shape
        assert np.array_equal(mask.affine, source.affine)
        for field in ("qform_code", "sform_code"):
            assert mask.header[field] == source.header[field]
        assert mask.array.dtype == np.uint8
        assert json.loads(storage.read(join(output, f"{patient}_seg.json")))["shape"] == list(
            source.array.shape
        )
    truth = decode(storage.read(join(scans, "example_seg.nii.gz")))
    return dice(truth.array == 1, masks["patient_2"].array == 1)


def test_patient_1_lies_on_its_label_maps_grid_after_reorientation(scans):
    image = decode(storage.read(join(scans, "inputs", "patient_1.nii.gz")))
    label = nib.as_closest_canonical(nib.load(SPLEEN / "example_seg_dicom.nii.gz"))
    assert image.array.shape == (512, 512, 20)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(image.array, image.affine))
    assert np.allclose(canonical.affine, label.affine, atol=1e-2)


def test_the_job_learns_a_real_scan_and_masks_both_patients(cluster, scans):
    run, native = _overfit(cluster, scans, "short", 60)
    assert native > 0.6
    assert _check_masks(cluster, scans, run) == pytest.approx(native, abs=0.02)


@pytest.mark.slow
def test_the_job_overfits_a_real_scan(cluster, scans):
    run, native = _overfit(cluster, scans, "long", 160)
    assert native >= 0.90
    assert _check_masks(cluster, scans, run) >= 0.90
