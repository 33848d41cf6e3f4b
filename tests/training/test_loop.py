"""The loop without Ray: resumed equals uninterrupted to the bit, divergence ends it, learning happens."""

import math
from itertools import pairwise

import pytest
import torch

from segcloud.config import Config
from segcloud.model.network import build_network
from segcloud.model.precision import autocast_dtype
from segcloud.training.loop import DivergedError, Hooks, TrainState, fit
from segcloud.training.ranks import Ranks
from segcloud.training.recipe import build_loss, build_optimizer, lr_factor
from tests.data.test_sampling import _loader
from tests.helpers import tiny_config


class Recorder:
    """Hooks that remember."""

    def __init__(self, dices=()):
        self.saved, self.bests, self.rows = [], [], []
        self.dices = iter(dices)

    def hooks(self):
        return Hooks(
            validate=lambda network: {"val_dice": next(self.dices, 0.5), "val_iou": 0.4},
            save=lambda state: self.saved.append(torch_copy(state.state_dict())),
            best=lambda state: self.bests.append(state.best["epoch"]),
            report=lambda row, state: self.rows.append(row),
        )


def torch_copy(state):
    """What a checkpoint file would hold."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _run(config, recorder=None, resume=None):
    recorder = recorder or Recorder()
    torch.manual_seed(config.train.seed)
    state = TrainState.create(build_network(config), config, torch.device("cpu"))
    if resume:
        state.load_state_dict(resume)
    recipe = config.train
    loader = _loader(batch_size=recipe.batch_size, shuffle=recipe.shuffle, seed=recipe.seed)
    return fit(state, loader, config, Ranks(), recorder.hooks()), recorder


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(optimizer):
    config = tiny_config(train={"epochs": 4, "optimizer": optimizer}, model={"dropout": 0.2})
    whole, recorder = _run(config)
    resumed, _ = _run(config, resume=recorder.saved[1])
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]
    for a, b in zip(whole.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_loss_falls():
    state, _ = _run(tiny_config(train={"epochs": 12, "lr": 0.01}))
    assert state.history[-1]["loss"] < 0.7 * state.history[0]["loss"]


def test_the_best_is_the_first_highest_dice():
    state, recorder = _run(tiny_config(train={"epochs": 5}), Recorder([0.1, 0.6, 0.3, 0.6, 0.2]))
    assert (state.best["epoch"], recorder.bests) == (2, [1, 2])


def test_validation_and_checkpoints_keep_their_rhythm_and_the_last_epoch_has_both():
    config = tiny_config(train={"epochs": 5, "checkpoint_every": 2}, validation={"every": 3})
    state, recorder = _run(config)
    assert [row["epoch"] for row in state.history if row["val_dice"] is not None] == [3, 5]
    assert [saved["epoch"] for saved in recorder.saved] == [2, 4, 5]


def test_the_best_weights_travel_in_the_checkpoint():
    config = tiny_config(train={"epochs": 3})
    state, recorder = _run(config, Recorder([0.6, 0.1, 0.2]))
    first, last = recorder.saved[0], recorder.saved[-1]
    assert last["best"]["epoch"] == 1
    for name, weight in first["network"].items():
        assert torch.equal(weight, last["best_weights"][name])
    assert not torch.equal(
        state.best_weights["model.0.conv.unit0.conv.weight"],
        last["network"]["model.0.conv.unit0.conv.weight"],
    )


def test_an_undefined_dice_is_no_best():
    state, recorder = _run(tiny_config(), Recorder([None, None]))
    assert (state.best, recorder.bests) == (None, [])


def test_a_diverged_loss_ends_the_run_with_the_remedy():
    with pytest.raises(DivergedError, match=r"epoch \d+ at learning rate .* lower train\.lr"):
        _run(tiny_config(train={"epochs": 60, "lr": 1e30, "optimizer": "sgd", "schedule": "constant"}))


def test_finished_training_is_left_alone():
    config = tiny_config()
    _, recorder = _run(config)
    _, again = _run(config, resume=recorder.saved[-1])
    assert again.rows == []


def test_cosine_warms_up_peaks_and_ends_near_zero():
    recipe = Config().train
    factors = [lr_factor(recipe, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[-1] < 0.001
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_constant_is_constant():
    recipe = Config().train.model_copy(update={"schedule": "constant"})
    assert {lr_factor(recipe, step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize("kind", ["dice", "dice_ce"])
def test_the_loss_is_a_mean_over_samples(kind):
    loss = build_loss(Config().train.model_copy(update={"loss": kind}))
    logits = torch.randn(4, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    label = (torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.7).to(torch.uint8)
    halves = [loss(logits[i : i + 2], label[i : i + 2]).item() for i in (0, 2)]
    assert math.isclose(loss(logits, label).item(), sum(halves) / 2, rel_tol=1e-5)


def test_optimizers_are_what_the_config_says():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    made = {
        name: build_optimizer(Config().train.model_copy(update={"optimizer": name}), parameters, fused=True)
        for name in ("adam", "adamw", "sgd")
    }
    assert {name: type(o).__name__ for name, o in made.items()} == {
        "adam": "Adam",
        "adamw": "AdamW",
        "sgd": "SGD",
    }
    assert made["sgd"].defaults["nesterov"]


def test_precision_follows_the_config():
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) is torch.bfloat16
    assert autocast_dtype("auto", cpu) in (None, torch.bfloat16)
