"""Training on a real cluster, from and to S3: artefacts, resume after kills, independence of worker count."""

import json

import pytest

from segcloud import storage
from segcloud.config import Config
from segcloud.model.checkpoint import load_model
from tests.helpers import overrides, tiny_config, write_cases

pytestmark = pytest.mark.ray
EPOCHS = 12
ARTEFACTS = {
    "best_model.safetensors",
    "config.yaml",
    "history.csv",
    "learning_curves.png",
    "result.json",
    "run.json",
}


@pytest.fixture(scope="module")
def dataset(s3, tmp_path_factory) -> str:
    """Four coarse phantoms in the bucket."""
    folder = write_cases(tmp_path_factory.mktemp("scans"), 4)
    uri = s3.uri("training-tests")
    for path in folder.rglob("*.nii.gz"):
        storage.put(path, storage.join(uri, *path.relative_to(folder).parts))
    return uri


def _config(dataset: str, run: str, workers: int = 2, **train) -> Config:
    return tiny_config(
        data={"uri": dataset},
        run={"uri": f"{dataset}/runs/{run}"},
        train={"epochs": EPOCHS, "checkpoint_every": 3, "lr": 0.01, **train},
        validation={"every": 2},
        compute={"workers": workers},
    )


def _curve(config: Config) -> list[tuple]:
    history = storage.read_json(storage.join(config.run.uri, "result.json"))["history"]
    return [(row["epoch"], row["loss"], row["val_dice"], row["val_iou"], row["lr"]) for row in history]


@pytest.fixture(scope="module")
def reference(cluster, dataset) -> Config:
    """An undisturbed run on two workers, by ``ray job submit``."""
    config = _config(dataset, "reference")
    job = cluster.run(
        *("-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."),
        *("--", "python", "jobs/train.py", *overrides(config)),
    )
    assert job.process.returncode == 0, job.output
    return config


def test_a_submitted_job_leaves_its_artefacts_in_the_bucket(reference):
    uri = reference.run.uri
    names = {info.uri.removeprefix(uri + "/") for info in storage.list_objects(uri)}
    assert names >= ARTEFACTS
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)
    assert "panels/case_3.png" in names
    assert storage.read(storage.join(uri, "learning_curves.png")).startswith(b"\x89PNG")
    result = storage.read_json(storage.join(uri, "result.json"))
    assert [row["case"] for row in result["native"]] == ["case_3"]
    assert result["best"]["val_dice"] == max(row["val_dice"] or 0 for row in result["history"])
    assert load_model(uri).info["epoch"] == result["best"]["epoch"]


def test_the_history_is_complete_and_learns(reference):
    curve = _curve(reference)
    assert [row[0] for row in curve] == list(range(1, EPOCHS + 1))
    assert curve[-1][1] < curve[0][1]
    assert [row[0] for row in curve if row[2] is not None] == list(range(2, EPOCHS + 1, 2))


def test_a_finished_run_is_not_trained_again(cluster, reference):
    job = cluster.train(reference)
    assert job.finish() == 0
    assert "already finished, nothing to train" in job.output
    assert "0 prepared now" in job.output


def test_a_runs_folder_refuses_other_settings(cluster, reference):
    changed = reference.model_copy(update={"train": reference.train.model_copy(update={"lr": 0.5})})
    job = cluster.train(changed)
    assert job.finish() == 2
    assert "holds a run with other settings (train.lr: 0.01 → 0.5)" in job.lines[-1]


def test_a_killed_driver_resumes_to_the_same_history(cluster, dataset, reference):
    config = _config(dataset, "driver-killed")
    job = cluster.train(config)
    job.wait_for("epoch 5/")
    job.process.kill()
    job.finish()
    again = cluster.train(config)
    assert again.finish() == 0, again.output
    assert "resuming after epoch" in again.output
    assert _curve(config) == _curve(reference)


def test_a_killed_worker_is_replaced_within_the_run_and_the_history_is_the_same(
    cluster, dataset, reference, kill
):
    config = _config(dataset, "worker-killed")
    job = cluster.train(config)
    job.wait_for("epoch 5/")
    kill("ray::RayTrainWorker")
    assert job.finish() == 0, job.output
    assert "resuming after epoch" in job.output
    assert _curve(config) == _curve(reference)


def test_one_and_two_workers_give_the_same_curve(cluster, dataset, reference):
    config = _config(dataset, "one-worker", workers=1)
    job = cluster.train(config)
    assert job.finish() == 0, job.output
    for one, two in zip(_curve(config), _curve(reference), strict=True):
        assert one[1] == pytest.approx(two[1], rel=1e-3)  # sums in another order, grown over twelve epochs
    assert _curve(config)[0][1] == pytest.approx(_curve(reference)[0][1], rel=1e-6)


def test_divergence_ends_the_job_once_with_the_remedy(cluster, dataset):
    job = cluster.train(
        _config(dataset, "diverged", lr=1e30, optimizer="sgd", schedule="constant", epochs=60)
    )
    assert job.finish() == 1
    assert "lower train.lr" in job.lines[-1]
    assert "resuming" not in job.output


def test_a_cluster_too_small_is_refused_at_once(cluster, dataset):
    config = _config(dataset, "too-small", workers=4)
    job = cluster.train(config)
    assert job.finish() == 2
    assert "4 worker(s) of 1 CPU are wanted and the cluster's 1 node(s) hold 2" in job.lines[-1]


def test_infer_writes_masks_beside_verdicts(cluster, dataset, reference, tmp_path):
    images, output = f"{dataset}/mixed", f"{dataset}/masks"
    good = storage.read(f"{dataset}/imagesTr/case_3.nii.gz")
    storage.put(good, f"{images}/good.nii.gz")
    storage.put(good[: len(good) // 2], f"{images}/cut.nii.gz")
    job = cluster.run("jobs/infer.py", "--model", reference.run.uri, "--input", images, "--output", output)
    assert job.process.returncode == 3, job.output
    assert "1 mask(s)" in job.output
    assert "cut: [truncated] the gzip stream ends early" in job.lines[-1]
    names = {storage.name(info.uri) for info in storage.list_objects(output)}
    assert names == {"good_seg.nii.gz", "good_seg.json"}
    sidecar = json.loads(storage.read(f"{output}/good_seg.json"))
    assert sidecar["provenance"]["model-sha256"] == load_model(reference.run.uri).digest
    assert (
        storage.stat(f"{output}/good_seg.nii.gz").metadata["model-sha256"]
        == load_model(reference.run.uri).digest
    )


def test_a_submitted_job_with_a_bad_config_fails_with_the_reason_last(cluster):
    job = cluster.run(
        *("-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."),
        *("--", "python", "jobs/train.py", "train.lrr=1"),
    )
    assert job.process.returncode != 0
    assert "train.lrr: no such field; did you mean train.lr?" in "\n".join(job.lines[-12:])
