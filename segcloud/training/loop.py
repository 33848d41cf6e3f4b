"""The training loop: plain PyTorch, knows no Ray and no storage layout.

Read :func:`fit` from top to bottom: it is the whole of training.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segcloud.config import Config
from segcloud.data.sampling import PatchLoader
from segcloud.errors import SegcloudError
from segcloud.model.precision import autocast, autocast_dtype
from segcloud.training.ranks import Ranks
from segcloud.training.recipe import build_loss, build_optimizer, lr_factor

Row = dict[str, Any]
"""One epoch of the history: epoch (1-based), loss, lr, seconds, seconds by phase, val_dice, val_iou."""


class DivergedError(SegcloudError):
    """The loss is no longer a finite number."""


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DDP, or the network itself."""
    return network.module if isinstance(network, DistributedDataParallel) else network


@dataclass
class TrainState:
    """Everything that a resumed run needs to continue the same curve.

    Patches, their order and dropout are functions of (seed, epoch, step, rank), so that the position is the
    number of finished epochs and no generator's state has to be kept per rank.

    Attributes:
        network: in DDP where there are several workers.
        epoch: finished epochs.
        history: one row per finished epoch.
        best: the history row of the best validation so far, if any.
        best_weights: the network's state at that epoch, on the CPU; part of every checkpoint, so that the model
            published after a resume is the one that the history names.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    history: list[Row] = field(default_factory=list)
    best: Row | None = None
    best_weights: dict[str, torch.Tensor] | None = None

    @classmethod
    def create(cls, network: nn.Module, config: Config, device: torch.device) -> "TrainState":
        """A fresh state around a network that is already on its device."""
        optimizer = build_optimizer(config.train, list(network.parameters()), fused=True)
        scaling = autocast_dtype(config.train.precision, device) is torch.float16
        return cls(network, optimizer, torch.amp.GradScaler(device.type, enabled=scaling))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: loads with ``weights_only=True``."""
        return {
            "network": unwrap(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        unwrap(self.network).load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.best, self.best_weights = state["best"], state["best_weights"]

    def keep_best(self, row: Row) -> None:
        """Remember the network as it is now, as the best so far."""
        weights = unwrap(self.network).state_dict()
        self.best, self.best_weights = row, {k: v.detach().cpu().clone() for k, v in weights.items()}


class PhaseTimer:
    """Seconds per named phase of an epoch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know.

    Attributes:
        validate: network → {"val_dice", "val_iou", …}; called on every rank, the same result on every rank.
        save: called on rank 0 with the state after an epoch that checkpoints.
        best: called on rank 0 with the state when validation is the best so far.
        report: called on every rank with each finished epoch's row.
    """

    validate: Callable[[nn.Module], Row]
    save: Callable[[TrainState], None]
    best: Callable[[TrainState], None]
    report: Callable[[Row, TrainState], None]


def fit(state: TrainState, loader: PatchLoader, config: Config, ranks: Ranks, hooks: Hooks) -> TrainState:
    """Train from ``state.epoch`` to ``train.epochs``.

    Raises:
        DivergedError: the loss of an epoch is not finite; on every rank.
    """
    loss_of = build_loss(config.train)
    recipe = config.train
    total_steps = recipe.epochs * loader.steps
    while state.epoch < recipe.epochs:
        epoch = state.epoch + 1
        started, phase = time.perf_counter(), PhaseTimer()
        state.network.train()
        loss_sum = torch.zeros((), device=ranks.device)  # read once per epoch, so that no step waits for it
        batches = loader.epoch(epoch)
        for number in range(loader.steps):
            with phase("data"):
                batch = next(batches)
                image, label = _to_device(batch.image, batch.label, ranks.device, recipe.channels_last)
            step = state.epoch * loader.steps + number
            torch.manual_seed(_mix(recipe.seed, step, ranks.rank))  # dropout: a function of the position
            for group in state.optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(recipe, step, total_steps)
            # ---- one optimizer step -------------------------------------------------------------------
            with phase("forward"):
                with autocast(recipe.precision, ranks.device):
                    logits = state.network(image)
                loss = loss_of(logits.float(), label)
            with phase("backward"):
                state.optimizer.zero_grad(set_to_none=True)
                state.scaler.scale(loss).backward()
            with phase("optimizer"):
                state.scaler.step(state.optimizer)
                state.scaler.update()
            # -------------------------------------------------------------------------------------------
            loss_sum += loss.detach()
        mean_loss = ranks.sum(loss_sum.double()).item() / (loader.steps * ranks.world_size)
        row = _close_epoch(state, epoch, mean_loss)
        if epoch % config.validation.every == 0 or epoch == recipe.epochs:
            with phase("validate"):
                ranks.share_buffers(unwrap(state.network))
                row.update(hooks.validate(unwrap(state.network)))
            if _better(row, state.best):
                state.keep_best(row)
                if ranks.rank == 0:
                    hooks.best(state)
        row["seconds"] = time.perf_counter() - started
        row["phases"] = dict(phase.seconds)
        state.history.append(row)
        state.epoch = epoch
        if ranks.rank == 0 and (epoch % recipe.checkpoint_every == 0 or epoch == recipe.epochs):
            hooks.save(state)
        hooks.report(row, state)
    return state


def _to_device(
    image: torch.Tensor, label: torch.Tensor, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if device.type == "cuda":
        image, label = image.pin_memory(), label.pin_memory()
    image = image.to(device, non_blocking=True)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last_3d)
    return image, label.to(device, non_blocking=True)


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4099 + rank


def _close_epoch(state: TrainState, epoch: int, loss: float) -> Row:
    lr = state.optimizer.param_groups[0]["lr"]
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss became {loss} in epoch {epoch} at learning rate {lr:.3g}; lower train.lr, "
            "or set train.precision=fp32"
        )
    return {"epoch": epoch, "loss": loss, "lr": lr, "val_dice": None, "val_iou": None}


def _better(row: Row, best: Row | None) -> bool:
    return row["val_dice"] is not None and (best is None or row["val_dice"] > best["val_dice"])
