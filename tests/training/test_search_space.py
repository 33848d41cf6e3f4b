"""A sweep's space and budget: what cannot run is left out with its reason, and all trials see equal voxels."""

import pytest
import ray.tune
import torch

from segcloud.config import ConfigError, load_config
from segcloud.errors import UsageError
from segcloud.model.network import activation_bytes, build_network
from segcloud.training import search_space
from segcloud.training.search_space import step_fits, usable_space
from segcloud.training.tuning import epoch_voxels, trial_config, trials_csv
from tests.helpers import tiny_config

WANTED = {"CPU": 1.0}


@pytest.fixture
def roomy(monkeypatch):
    monkeypatch.setattr(search_space, "memory_limit", lambda wanted, workers: 1e12)


def _config(space, **sections):
    config = tiny_config(run={"uri": "/runs/sweep"}, **sections)
    return config.model_copy(update={"tune": config.tune.model_copy(update={"space": space})})


def test_domains_become_ray_tunes(roomy):
    space = {
        "train.lr": {"loguniform": [1e-4, 1e-2]},
        "train.roi_size": {"choice": [[16, 16, 16], [32, 32, 32]]},
    }
    domains, left_out = usable_space(_config(space), WANTED)
    assert left_out == []
    assert isinstance(domains["train.lr"], ray.tune.search.sample.Float)
    assert domains["train.roi_size"].categories == [[16, 16, 16], [32, 32, 32]]


def test_a_choice_the_strides_forbid_is_left_out_with_the_reason(roomy):
    config = _config({"train.roi_size": {"choice": [[16, 16, 16], [17, 16, 16]]}})
    domains, left_out = usable_space(config, WANTED)
    assert domains["train.roi_size"].categories == [[16, 16, 16]]
    ((path, value, reason),) = left_out
    assert (path, value) == ("train.roi_size", [17, 16, 16])
    assert "multiple of 2" in reason


def test_a_choice_that_cannot_fit_a_worker_is_left_out(monkeypatch):
    config = _config({"train.roi_size": {"choice": [[16, 16, 16], [64, 64, 64]]}})
    monkeypatch.setattr(search_space, "memory_limit", lambda wanted, workers: 2e7)
    _, left_out = usable_space(config, WANTED)
    assert [value for _, value, _ in left_out] == [[64, 64, 64]]
    assert "a worker has 0.0 GB" in left_out[0][2]


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"train.roi_size": {"choice": [[17, 16, 16]]}}, "no choice of train.roi_size can run"),
        ({"train.lr": {"uniform": [-1, 1]}}, "train.lr: Input should be greater than 0"),
        ({"train.lrr": {"uniform": [1, 2]}}, "did you mean train.lr?"),
        ({"prepare.dtype": {"choice": ["uint8"]}}, "search train.* or model.* fields"),
    ],
)
def test_a_space_that_cannot_work_is_refused(roomy, space, told):
    with pytest.raises(UsageError) as caught:
        usable_space(_config(space), WANTED)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "domain",
    ["{}", "{loguniform: [0, 1]}", "{uniform: [2, 1]}", "{choice: []}", "{normal: [0, 1]}", "{randint: [1]}"],
)
def test_a_malformed_domain_is_refused_with_its_field(domain):
    with pytest.raises(ConfigError, match=r"train\.lr"):
        load_config(None, [f"tune.space={{train.lr: {domain}}}"])


@pytest.mark.parametrize("roi", [[16, 16, 16], [24, 24, 24], [32, 32, 32]])
def test_every_trial_sees_the_same_voxels_whatever_its_roi(roi):
    base = _config({"train.roi_size": {"choice": [roi]}}, train={"epochs": 40, "roi_size": [32, 32, 32]})
    budget = epoch_voxels(base, 6) * 40
    config = trial_config(base, {"train.roi_size": roi}, 6, budget, "t1")
    seen = epoch_voxels(config, 6) * config.train.epochs
    assert 0.97 * budget < seen <= budget
    assert config.train.checkpoint_every == config.validation.every == max(1, config.train.epochs // 8)
    assert config.run.uri == "/runs/sweep/trials/t1"


def test_activations_count_every_layer_and_grow_with_the_window():
    config = tiny_config()
    outputs = []
    network = build_network(config)
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, o: outputs.append(o.numel() * 4))
    network(torch.zeros(config.train.batch_size, 1, *config.train.roi_size))
    assert activation_bytes(config) == sum(outputs)
    assert activation_bytes(tiny_config(train={"roi_size": [32, 32, 32]})) == 8 * sum(outputs)


def test_a_step_that_fits_is_told_to_fit():
    assert step_fits(tiny_config(), torch.device("cpu"))


def test_trials_csv_has_a_row_per_trial_and_empty_cells_for_what_is_unknown():
    trial = {
        "trial": "a",
        "params": {"train.lr": 0.1},
        "status": "failed",
        "reason": "x, y",
        "val_dice": None,
    }
    text = trials_csv([{**trial, "curve": [], "seconds": 1.25}]).decode()
    assert text.splitlines() == [
        "trial,train.lr,status,reason,val_dice,voxels,seconds",
        'a,0.1,failed,"x, y",,0,1.2',
    ]
