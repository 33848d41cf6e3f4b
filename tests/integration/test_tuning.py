"""Sweeps on a real cluster: fair, resumable, untroubled by bad trials, and their best config trains."""

import csv
import io
import re

import pytest
import yaml

from segcloud import storage
from segcloud.config import Config
from tests.helpers import merge, overrides, tiny_config, write_cases

pytestmark = pytest.mark.ray
SUBMIT = ("-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--", "python")


@pytest.fixture(scope="module")
def dataset(s3, tmp_path_factory) -> str:
    """Six coarse phantoms in the bucket."""
    folder = write_cases(tmp_path_factory.mktemp("scans"), 6, spacing=6.0)
    uri = s3.uri("tuning-tests")
    for path in folder.rglob("*.nii.gz"):
        storage.put(path, storage.join(uri, *path.relative_to(folder).parts))
    return uri


def _config(dataset: str, name: str, space: dict, **sections) -> Config:
    base = {
        "data": {"uri": dataset, "split": {"n": 2}},
        "run": {"uri": f"{dataset}/sweeps/{name}"},
        "prepare": {"spacing": [6, 6, 6]},
        "model": {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1},
        "train": {"epochs": 16, "roi_size": [32, 32, 32], "samples_per_case": 4, "positive": 2, "lr": 0.01},
        "validation": {"roi_size": [32, 32, 32]},
        "tune": {"samples": 2, "checks": 4, "scheduler": "none"},
    }
    config = tiny_config(**merge(base, sections))
    return config.model_copy(update={"tune": config.tune.model_copy(update={"space": space})})


def _trials(config: Config) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.read_text(storage.join(config.run.uri, "trials.csv")))))


def _written(config: Config, trials: list[str]) -> dict:
    """When each object of some trials was written."""
    folders = [storage.join(config.run.uri, "trials", trial) for trial in trials]
    return {info.uri: info.modified for folder in folders for info in storage.list_objects(folder)}


def test_a_submitted_sweep_leaves_trials_a_picture_and_a_config_that_trains(cluster, dataset):
    space = {
        "train.lr": {"choice": [0.003, 0.01]},
        "train.roi_size": {"choice": [[32, 32, 32], [30, 32, 32]]},
    }
    config = _config(dataset, "short", space)
    job = cluster.run(*SUBMIT, "jobs/tune.py", *overrides(config))
    assert job.process.returncode == 0, job.output
    assert "left out: train.roi_size=30×32×32: config: train.roi_size [30, 32, 32]: every edge" in job.output
    trials = _trials(config)
    assert [trial["status"] for trial in trials] == ["finished", "finished"]
    assert storage.read(f"{config.run.uri}/sweep.png").startswith(b"\x89PNG")
    begun = storage.stat(f"{config.run.uri}/sweep.json").modified
    prepared = list(storage.list_objects(f"{dataset}/sweeps/prepared"))
    assert len(prepared) == 6
    assert all(info.modified <= begun for info in prepared)  # no trial prepared anything

    best = cluster.run("jobs/train.py", "--config", f"{config.run.uri}/best.yaml")
    assert best.process.returncode == 0, best.output
    assert "0 prepared now" in best.output
    result = storage.read_json(f"{config.run.uri}/best/result.json")
    assert result["best"]["val_dice"] == float(trials[0]["val_dice"])  # the same run again, to the bit


def test_a_cluster_too_small_for_one_trial_is_refused_at_once(cluster, dataset):
    config = _config(dataset, "small", {"train.lr": {"loguniform": [1e-3, 1e-2]}}, compute={"workers": 4})
    job = cluster.run("jobs/tune.py", *overrides(config))
    assert job.process.returncode == 2
    assert "4 worker(s) of 1 CPU are wanted and the cluster's 1 node(s) hold 2" in job.lines[-1]


@pytest.mark.slow
def test_asha_stops_some_of_eight_trials_and_the_best_config_reaches_its_dice(cluster, dataset):
    space = {
        "train.lr": {"loguniform": [3e-4, 3e-2]},
        "train.roi_size": {"choice": [[32, 32, 32], [48, 48, 48], [64, 64, 64]]},
    }
    sections = {
        "tune": {"samples": 8, "scheduler": "asha", "checks": 8},
        "train": {"epochs": 12, "roi_size": [64] * 3},
    }
    config = _config(dataset, "asha", space, **sections)
    job = cluster.run(*SUBMIT, "jobs/tune.py", *overrides(config))
    assert job.process.returncode == 0, job.output
    trials = _trials(config)
    assert len(trials) == 8
    assert {trial["status"] for trial in trials} == {"finished", "stopped early"}
    budget = float(re.search(r"trials of ([\d.e+]+) patch voxels", job.output)[1])
    assert all(
        0.9 * budget < float(t["voxels"]) <= 1.01 * budget for t in trials if t["status"] == "finished"
    )
    assert len({trial["train.roi_size"] for trial in trials}) > 1
    assert cluster.run("jobs/train.py", "--config", f"{config.run.uri}/best.yaml").process.returncode == 0
    result = storage.read_json(f"{config.run.uri}/best/result.json")
    best = next(t for t in trials if t["val_dice"])
    assert result["best"]["val_dice"] >= float(best["val_dice"])


@pytest.mark.slow
def test_an_absurd_rate_is_recorded_and_the_rest_finish(cluster, dataset):
    space = {
        "train.lr": {"choice": [0.01, 100.0]},
        "train.roi_size": {"choice": [[32, 32, 32], [30, 30, 30]]},
    }
    config = _config(dataset, "absurd", space, tune={"samples": 4}, train={"optimizer": "sgd"})
    job = cluster.run("jobs/tune.py", *overrides(config))
    assert job.process.returncode == 0, job.output
    by_rate = {(trial["train.lr"], trial["status"]) for trial in _trials(config)}
    assert by_rate == {("0.01", "finished"), ("100.0", "failed")}
    assert all("lower train.lr" in t["reason"] for t in _trials(config) if t["status"] == "failed")
    assert re.search(r"warning: \d trial\(s\) failed", job.output)
    assert "30³" in job.output
    assert yaml.safe_load(storage.read_text(f"{config.run.uri}/best.yaml"))["train"]["lr"] == 0.01


@pytest.mark.slow
def test_a_killed_sweep_continues_and_keeps_its_finished_trials(cluster, dataset):
    config = _config(dataset, "killed", {"train.lr": {"loguniform": [1e-3, 1e-2]}}, tune={"samples": 5})
    job = cluster.start("jobs/tune.py", *overrides(config))
    finished = [job.wait_for("budget 100 %").split()[1] for _ in range(2)]
    job.wait_for("trial  ")  # the next table: Tune has stored its state by then
    job.process.kill()
    job.finish()
    before = _written(config, finished)
    again = cluster.run("jobs/tune.py", *overrides(config))
    assert again.process.returncode == 0, again.output
    assert "continuing the sweep" in again.output
    trials = _trials(config)
    assert len(trials) == 5
    assert {t["status"] for t in trials} == {"finished"}
    assert set(finished) <= {t["trial"] for t in trials}
    assert _written(config, finished) == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"scheduler": "pbt"}, {"search": "optuna"}])
def test_the_other_scheduler_and_search_finish_their_trials(cluster, dataset, options):
    name = "-".join(options.values())
    config = _config(dataset, name, {"train.lr": {"loguniform": [1e-3, 1e-2]}}, tune=options)
    job = cluster.run("jobs/tune.py", *overrides(config))
    assert job.process.returncode == 0, job.output
    assert [trial["status"] for trial in _trials(config)] == ["finished", "finished"]
    assert all(float(trial["val_dice"]) >= 0 for trial in _trials(config))
