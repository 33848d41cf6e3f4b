"""Bad input: one line with the case and the remedy, an exit code, and nothing half-written."""

import os
from dataclasses import replace

import numpy as np
import pytest

from segcloud import storage
from segcloud.data.nifti import decode, encode_mask
from segcloud.embedded_s3 import EmbeddedS3
from tests.helpers import overrides, tiny_config, write_cases

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("scans"), 8)


def _label(scans, index):
    return decode((scans / f"labelsTr/case_{index}.nii.gz").read_bytes())


def _moved(volume):
    """The volume 20 mm to the side."""
    return encode_mask(volume.array, replace(volume, affine=volume.affine + 20 * np.eye(4, k=3)))


def _bad_files(scans):
    """File → new content (None: left out), one defect per case."""
    image = (scans / "imagesTr/case_2.nii.gz").read_bytes()
    return {
        "labelsTr/case_0.nii.gz": None,
        "imagesTr/case_1.nii.gz": None,
        "imagesTr/case_2.nii.gz": image[:-900],
        "labelsTr/case_3.nii.gz": _moved(_label(scans, 3)),
        "labelsTr/case_4.nii.gz": encode_mask(np.zeros_like(_label(scans, 4).array), _label(scans, 4)),
        "labelsTr/case_5.nii.gz": b"",
    }


VERDICTS = {
    "case_0": ("no_label", "image without a label; add labelsTr/"),
    "case_1": ("no_image", "label without an image; add imagesTr/"),
    "case_2": ("truncated", "copy the file again"),
    "case_3": ("grid_mismatch", "20.0 mm off the image's grid; resample the label"),
    "case_4": ("empty_label", "all background"),
    "case_5": ("label_empty_file", "copy it again"),
}


@pytest.fixture(scope="module")
def bad_dataset(scans, s3):
    uri, changes = s3.uri("bad-input"), _bad_files(scans)
    for path in scans.rglob("*.nii.gz"):
        key = str(path.relative_to(scans))
        data = changes.get(key, path.read_bytes())
        if data is not None:
            storage.put(data, storage.join(uri, *key.split("/")))
    return uri


def test_bad_cases_stop_training_with_a_verdict_each_and_no_run_begun(cluster, bad_dataset, bucket_uri):
    job = cluster.train(tiny_config(data={"uri": bad_dataset}, run={"uri": f"{bucket_uri}/runs/a"}))
    assert job.finish() == 2, job.output
    told = job.lines[job.lines.index(next(line for line in job.lines if line.startswith("error:"))) + 1 :]
    assert len(told) == len(VERDICTS)
    for case, (code, remedy) in VERDICTS.items():
        assert any(line.startswith(f"  {case}: [{code}] ") and remedy in line for line in told), (case, told)
    left = {storage.name(info.uri)[:6] for info in storage.list_objects(f"{bucket_uri}/runs")}
    assert left == {"case_6", "case_7"}  # the others' prepared volumes, for the next try


def test_skipping_trains_on_the_rest_and_says_so_in_the_exit_code(cluster, bad_dataset, bucket_uri):
    config = tiny_config(
        data={"uri": bad_dataset, "bad_cases": "skip"},
        run={"uri": f"{bucket_uri}/runs/a"},
        train={"epochs": 1},
    )
    job = cluster.train(config)
    assert job.finish() == 3, job.output
    assert "error: done, but 6 case(s) were left out:" in job.output
    result = storage.read_json(f"{bucket_uri}/runs/a/result.json")
    assert {left["case"]: left["code"] for left in result["left_out"]} == {
        c: v[0] for c, v in VERDICTS.items()
    }


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("s3://no-such-bucket/data", "no such bucket 'no-such-bucket'"),
        ("", "expected imagesTr/ and labelsTr/"),
    ],
)
def test_a_missing_bucket_or_an_empty_prefix_is_one_line(cluster, bucket_uri, data, told):
    config = tiny_config(data={"uri": data or f"{bucket_uri}/empty"}, run={"uri": f"{bucket_uri}/runs/a"})
    job = cluster.train(config)
    assert job.finish() in (1, 2)
    assert job.lines[-1].startswith("error: ")
    assert told in job.lines[-1]
    assert list(storage.list_objects(bucket_uri)) == []


def test_wrong_credentials_are_one_line_without_the_secret(cluster, monkeypatch):
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")  # this server checks keys after its first request
    before = dict(os.environ)
    with EmbeddedS3(bucket="locked") as locked:
        env = {**locked.env, "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
        config = tiny_config(data={"uri": locked.uri("data")}, run={"uri": locked.uri("runs/a")})
        job = cluster.run("jobs/train.py", *overrides(config), **env)
    assert dict(os.environ) == before
    assert job.process.returncode == 1
    assert job.lines[-1].startswith("error: s3://locked/")
    assert "access denied" in job.lines[-1].lower()
    assert "not-the-secret" not in job.output


def test_an_unreachable_endpoint_is_one_line(cluster):
    config = tiny_config(data={"uri": "s3://b/data"}, run={"uri": "s3://b/runs/a"})
    job = cluster.run("jobs/train.py", *overrides(config), AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert job.process.returncode == 1
    assert "check AWS_ENDPOINT_URL" in job.lines[-1]
