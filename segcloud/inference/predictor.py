"""One scan through the network: windows over the prepared grid, then back to the source's grid. No Ray."""

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from segcloud.config import Config
from segcloud.data import transforms
from segcloud.data.nifti import Volume
from segcloud.model.precision import autocast


class Predictor:
    """Sliding-window prediction with one network.

    Args:
        network: weights as trained; moved to the device.
        config: of the training: transforms, window, precision.
        device: where to compute.
    """

    def __init__(self, network: nn.Module, config: Config, device: torch.device):
        if config.train.channels_last:
            network = network.to(memory_format=torch.channels_last_3d)
        self.network, self.config, self.device = network.to(device), config, device

    @torch.no_grad()
    def scores(self, image: np.ndarray) -> torch.Tensor:
        """Merged scores of a prepared image.

        Args:
            image: float32 [X, Y, Z] in 0..1, on the prepared grid.

        Returns:
            float32 [C, X, Y, Z] logits; for one organ [1, X, Y, Z], its logit minus the background's, which
            holds all that argmax and interpolation need in half the memory.
        """
        self.network.eval()
        window = self.config.validation
        with autocast(self.config.train.precision, self.device):
            return sliding_window_inference(
                torch.from_numpy(image)[None, None],
                roi_size=window.roi_size,
                sw_batch_size=window.sw_batch_size,
                predictor=self._forward,
                overlap=window.overlap,
                sw_device=self.device,
                device=self.device,
            )[0]

    def _forward(self, windows: torch.Tensor) -> torch.Tensor:
        if self.config.train.channels_last:
            windows = windows.contiguous(memory_format=torch.channels_last_3d)
        logits = self.network(windows).float()
        return logits[:, 1:] - logits[:, :1] if logits.shape[1] == 2 else logits

    def classes(self, image: np.ndarray) -> np.ndarray:
        """uint8 [X, Y, Z] class indices of a prepared image, on the prepared grid."""
        scores = self.scores(image)
        winner = scores[0] > 0 if len(scores) == 1 else scores.argmax(0)
        return winner.to(torch.uint8).cpu().numpy()

    def segment(self, volume: Volume) -> np.ndarray:
        """Label map of a scan on its own grid: uint8, with the values of ``data.labels``.

        Raises:
            BadScan: the scan is not a CT or holds nothing inside the window.
        """
        prepared = transforms.prepare(volume, None, self.config.prepare, self.config.data.labels)
        return self.to_labels(transforms.to_source(self.scores(prepared.image), prepared))

    def to_labels(self, classes: np.ndarray) -> np.ndarray:
        """Class indices → the values of ``data.labels``, uint8."""
        return np.array([0, *self.config.data.labels.values()], dtype=np.uint8)[classes]
