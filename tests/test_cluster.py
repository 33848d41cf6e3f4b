"""A worker's resources: an equal share that fits whole workers on nodes, GPUs where they are."""

import pytest

from segcloud import cluster
from segcloud.config import ComputeConfig
from segcloud.errors import UsageError


@pytest.mark.parametrize(
    ("nodes", "changes", "expected"),
    [
        ([{"CPU": 8}], {"workers": 2}, {"CPU": 4}),
        ([{"CPU": 8}, {"CPU": 4}], {"workers": 3}, {"CPU": 4}),
        ([{"CPU": 2}], {"workers": 4}, {"CPU": 1}),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], {"workers": 1}, {"CPU": 8, "GPU": 1}),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 2}], {"workers": 2}, {"CPU": 4, "GPU": 1}),
        ([{"CPU": 8, "GPU": 1}], {"workers": 1, "device": "cpu"}, {"CPU": 8}),
        ([{"CPU": 8}], {"workers": 1, "device": "cuda"}, {"CPU": 1, "GPU": 1}),
        ([{"CPU": 8}], {"workers": 1, "cpus_per_worker": 3}, {"CPU": 3}),
    ],
)
def test_a_workers_share(nodes, changes, expected):
    assert cluster.worker_resources(ComputeConfig(**changes), nodes) == expected


def test_cores_spread_over_nodes_do_not_make_a_worker(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}] * 2
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    with pytest.raises(
        UsageError, match=r"1 worker\(s\) of 4 CPU are wanted and the cluster's 2 node\(s\) hold 0"
    ):
        cluster.acquire(ComputeConfig(cpus_per_worker=4))


def test_results_in_a_submitted_jobs_own_folder_are_refused():
    with pytest.raises(UsageError, match="would be deleted with the submitted job"):
        cluster.refuse_temporary("/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1/runs/a")
    cluster.refuse_temporary("/data/runs/a", "s3://b/working_dir_files/a")
