"""The predictor agrees with MONAI's plain sliding window and writes the config's label values."""

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from segcloud.inference.predictor import Predictor
from segcloud.model.network import build_network
from tests.helpers import phantom_volumes, tiny_config

CPU = torch.device("cpu")


def _network(config):
    torch.manual_seed(0)
    return build_network(config).eval()


@pytest.mark.parametrize("labels", [{"spleen": 1}, {"spleen": 1, "liver": 5}])
def test_classes_equal_argmax_of_the_plain_sliding_window(labels):
    config = tiny_config(data={"labels": labels}, train={"precision": "fp32"})
    image = np.random.default_rng(0).random((30, 25, 40), dtype=np.float32)
    network = _network(config)
    with torch.no_grad():
        plain = sliding_window_inference(
            torch.from_numpy(image)[None, None], (16, 16, 16), 4, network, overlap=0.25
        )
    assert np.array_equal(Predictor(network, config, CPU).classes(image), plain.argmax(1)[0].numpy())


def test_a_volume_smaller_than_the_window_is_predicted():
    config = tiny_config()
    assert Predictor(_network(config), config, CPU).classes(np.zeros((5, 9, 20), np.float32)).shape == (
        5,
        9,
        20,
    )


def test_segment_answers_on_the_source_grid_with_the_label_values():
    config = tiny_config(data={"labels": {"spleen": 7}})
    image, _ = phantom_volumes(0, spacing=(7, 8, 9), orientation="LPS")
    mask = Predictor(_network(config), config, CPU).segment(image)
    assert (mask.shape, mask.dtype) == (image.array.shape, np.uint8)
    assert set(np.unique(mask)) <= {0, 7}
