"""Patches: balanced as asked, the same for any number of workers, never outside the volume."""

from types import SimpleNamespace

import numpy as np
import pytest

from segcloud.config import AugmentConfig
from segcloud.data.sampling import PatchLoader, augment, crop, draw_center
from tests.helpers import tiny_config

RECIPE = tiny_config().train


def volume(shape=(40, 30, 20), organ=(slice(5, 12), slice(20, 28), slice(3, 9))):
    """A prepared volume in memory: a bright box of organ in a darker body, air (0) in the last columns."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0.2, 0.6, shape).astype(np.float16)
    image[..., -3:] = 0
    label = np.zeros(shape, np.uint8)
    label[organ] = 1
    made = SimpleNamespace(image=image, label=label, foreground=np.flatnonzero(label).astype(np.int32))
    made.decode = lambda region: image[region].astype(np.float32)
    return made


def test_centres_are_balanced_as_the_weights_say():
    v, rng = volume(), np.random.default_rng(1)
    recipe = RECIPE.model_copy(update={"positive": 3.0, "negative": 1.0})
    centers = [draw_center(v, rng, recipe) for _ in range(2000)]
    assert np.mean([v.label[c] > 0 for c in centers]) == pytest.approx(0.75, abs=0.03)
    assert all(v.image[c] > 0 for c in centers)


def test_background_centres_cover_the_background_evenly():
    v, rng = volume(), np.random.default_rng(1)
    recipe = RECIPE.model_copy(update={"positive": 0.0})
    x = np.array([draw_center(v, rng, recipe)[0] for _ in range(4000)])
    inside = (v.label == 0) & (v.image > 0)
    assert x.mean() == pytest.approx(np.argwhere(inside)[:, 0].mean(), abs=0.6)


def test_a_volume_without_organ_still_gives_patches():
    v = volume(organ=(slice(0, 0),) * 3)
    assert len(draw_center(v, np.random.default_rng(0), RECIPE)) == 3


@pytest.mark.parametrize("center", [(0, 0, 0), (39, 29, 19), (20, 15, 10), (0, 29, 10)])
def test_a_crop_is_moved_inside(center):
    v = volume()
    image, label = crop(v, center, (16, 16, 16))
    start = [min(max(c - 8, 0), n - 16) for c, n in zip(center, v.label.shape, strict=True)]
    region = tuple(slice(s, s + 16) for s in start)
    assert np.array_equal(image, v.image[region].astype(np.float32))
    assert np.array_equal(label, v.label[region])


def test_a_short_axis_is_padded_on_both_sides():
    image, label = crop(volume(), (20, 15, 10), (16, 16, 32))
    assert image.shape == label.shape == (16, 16, 32)
    assert not image[..., :6].any()
    assert not image[..., 26:].any()


def _loader(rank=0, world=1, **changes):
    volumes = [volume(), volume((20, 20, 20)), volume((30, 16, 25))]
    return PatchLoader(volumes, RECIPE.model_copy(update=changes), rank, world)


def test_two_ranks_together_see_the_batches_of_one():
    whole = list(_loader().epoch(3))
    halves = [list(_loader(rank, 2).epoch(3)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert np.array_equal(batch.image, np.concatenate([first.image, second.image]))
        assert np.array_equal(batch.label, np.concatenate([first.label, second.label]))


def test_an_epoch_is_repeatable_and_epochs_differ():
    loader = _loader()
    first, again, other = (next(iter(loader.epoch(e))).image for e in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shuffle", ["patches", "cases"])
def test_every_patch_is_seen_and_the_last_batch_is_filled(shuffle):
    loader = _loader(shuffle=shuffle, samples_per_case=3)  # 9 patches, batches of 4
    order = loader.order(1)
    assert order.shape == (3, 4, 2)
    assert len({tuple(pair) for pair in order.reshape(-1, 2)}) == 9


def test_shuffling_cases_keeps_their_patches_together():
    order = _loader(shuffle="cases", samples_per_case=4).order(1)
    assert all(len(set(batch[:, 0])) == 1 for batch in order)


def test_augmentation_moves_image_and_label_together():
    v, rng = volume((16, 16, 16), (slice(2, 5),) * 3), np.random.default_rng(3)
    image = np.where(v.label, 1, 0).astype(np.float32)
    flipped, label = augment(image, v.label, rng, AugmentConfig(flip=1.0))
    assert np.array_equal(flipped > 0.5, label > 0)
    assert not np.array_equal(label, v.label)


def test_augmentation_off_changes_nothing():
    v = volume()
    image, label = augment(v.decode(...), v.label, np.random.default_rng(0), AugmentConfig())
    assert np.array_equal(image, v.decode(...))
    assert np.array_equal(label, v.label)
