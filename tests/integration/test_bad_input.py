"""Bad input: one line with the case and the remedy, an exit code, and nothing half-written."""

import os

import numpy as np
import pytest

from segcloud import storage
from segcloud.data.nifti import decode, encode_mask
from segcloud.embedded_s3 import EmbeddedS3
from tests.helpers import overrides, tiny_config, write_cases

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("scans"), 3)


def _upload(scans, uri, **changes):
    """The dataset with some files replaced (bytes) or left out (None)."""
    for path in scans.rglob("*.nii.gz"):
        key = str(path.relative_to(scans))
        data = changes.get(key, path.read_bytes())
        if data is not None:
            storage.put(data, storage.join(uri, *key.split("/")))
    return uri


LABEL, IMAGE = "labelsTr/case_1.nii.gz", "imagesTr/case_1.nii.gz"


def _change_label(scans, change):
    label = decode((scans / LABEL).read_bytes())
    return encode_mask(*change(label))


def _shifted(label):
    moved = decode(encode_mask(label.array, label))
    for row in ("srow_x", "qoffset_x"):
        moved.header[row] = np.asarray(moved.header[row]) + 20
    return moved.array, moved


BAD = {
    "no_label": (LABEL, lambda scans: None, "image without a label; add labelsTr/"),
    "no_image": (IMAGE, lambda scans: None, "label without an image; add imagesTr/"),
    "truncated": (IMAGE, lambda scans: (scans / IMAGE).read_bytes()[:-900], "copy the file again"),
    "grid_mismatch": (LABEL, lambda scans: _change_label(scans, _shifted), "resample the label onto the image"),
    "empty_label": (
        LABEL,
        lambda scans: _change_label(scans, lambda v: (np.zeros_like(v.array), v)),
        "all background",
    ),
}


@pytest.mark.parametrize("code", BAD)
def test_a_bad_case_stops_training_with_its_verdict(cluster, scans, bucket_uri, code):
    key, make, remedy = BAD[code]
    data = _upload(scans, f"{bucket_uri}/data", **{key: make(scans)})
    job = cluster.train(tiny_config(data={"uri": data}, run={"uri": f"{bucket_uri}/runs/a"}))
    assert job.finish() == 2, job.output
    assert job.lines[-1].startswith(f"  case_1: [{code}] ")
    assert remedy in job.lines[-1]
    assert list(storage.list_objects(f"{bucket_uri}/runs")) == []


def test_skipping_trains_on_the_rest_and_says_so_in_the_exit_code(cluster, scans, bucket_uri):
    data = _upload(scans, f"{bucket_uri}/data", **{LABEL: None})
    config = tiny_config(
        data={"uri": data, "bad_cases": "skip"}, run={"uri": f"{bucket_uri}/runs/a"}, train={"epochs": 1}
    )
    job = cluster.train(config)
    assert job.finish() == 3, job.output
    assert job.lines[-2:][0] == "error: done, but 1 case(s) were left out:"
    result = storage.read_json(f"{bucket_uri}/runs/a/result.json")
    assert [(left["case"], left["code"]) for left in result["left_out"]] == [("case_1", "no_label")]


@pytest.mark.parametrize(
    ("data", "told"),
    [("s3://no-such-bucket/data", "no such bucket 'no-such-bucket'"), ("", "expected imagesTr/ and labelsTr/")],
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
