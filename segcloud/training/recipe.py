"""Loss, optimizer, schedule and precision as the config names them."""

import math

import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import nn

from segcloud.config import TrainConfig


def build_loss(config: TrainConfig) -> nn.Module:
    """Loss of logits [B, C, X, Y, Z] against class indices [B, 1, X, Y, Z], background class included.

    Dice is taken per sample and class and then averaged (not over the batch): the mean over two workers'
    halves of a batch is then the same number as over the whole batch.
    """
    kind = DiceLoss if config.loss == "dice" else DiceCELoss
    return kind(to_onehot_y=True, softmax=True)


def build_optimizer(
    config: TrainConfig, parameters: list[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD with Nesterov momentum 0.9; `fused` updates all parameters in one kernel."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=fused
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)


def lr_factor(config: TrainConfig, step: int, total: int) -> float:
    """Share of ``train.lr`` at an optimizer step (0-based) out of `total`."""
    if config.schedule == "constant":
        return 1.0
    warmup = int(config.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
