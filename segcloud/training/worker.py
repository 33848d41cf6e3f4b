"""What one training worker does, from its share of the data to the artefacts of the run. Knows no Ray.

``trainer.py`` calls it under Ray Train; a test or ``torchrun`` calls it with its own ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from segcloud import storage
from segcloud.config import Config
from segcloud.data.prepared import PreparedRef, PreparedStore
from segcloud.data.sampling import PatchLoader
from segcloud.evaluation.metrics import mean_dice
from segcloud.inference.predictor import Predictor
from segcloud.model import checkpoint
from segcloud.model.network import build_network, synchronise_batch_norm
from segcloud.report.panels import draw_panel
from segcloud.training.artefacts import RunRecord
from segcloud.training.loop import Hooks, Row, TrainState, fit
from segcloud.training.ranks import Ranks
from segcloud.training.validation import ValidationCase, score_native, validate


@dataclass(frozen=True)
class Outlet:
    """Where a worker speaks to.

    Attributes:
        line: a line for the user; called on rank 0 only.
        epoch: each finished epoch's row; called on every rank.
        resumed: number of epochs found done and the best row among them; called on rank 0 only.
    """

    line: Callable[[str], None]
    epoch: Callable[[Row], None]
    resumed: Callable[[int, Row | None], None]


def run_worker(
    config: Config,
    training: list[PreparedRef],
    validation: list[PreparedRef],
    store: PreparedStore,
    ranks: Ranks,
    trial: bool,
    wrap: Callable[[nn.Module], nn.Module],
    outlet: Outlet,
) -> dict[str, Any]:
    """Train, or continue, and score the best model on the native grid.

    Args:
        config: resolved.
        training: all training volumes, in the same order on every rank.
        validation: all validation volumes; each rank takes its share.
        store: where the volumes are.
        ranks: this worker's place.
        trial: of a sweep: each validated epoch is stored before it is told of, and nothing is scored at the end.
        wrap: network on the device → network in DDP (identity for one worker).
        outlet: progress.

    Returns:
        history, best row, rows of native scores and the number of failed uploads; complete on rank 0.

    Raises:
        DivergedError: the loss is not finite.
        StorageError: volumes cannot be read, or the best model was not stored.
    """
    mine = [ValidationCase(ref.case, store.open(ref)) for ref in ranks.mine(validation)]
    loader = PatchLoader([store.open(ref) for ref in training], config.train, ranks.rank, ranks.world_size)
    torch.manual_seed(config.train.seed)  # the same weights on every rank
    network = build_network(config)
    if config.model.sync_batch_norm and ranks.world_size > 1:
        network = synchronise_batch_norm(network, ranks.device)
    if config.train.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
    state = TrainState.create(wrap(network.to(ranks.device)), config, ranks.device)
    _resume(state, config, ranks, outlet)

    uploader = checkpoint.Uploader(outlet.line)
    checkpoints = checkpoint.CheckpointStore(config.run.uri, config.train.keep_checkpoints, uploader)
    record = RunRecord(config.run.uri, storage.name(config.run.uri))

    def model_file(state: TrainState) -> bytes:
        return checkpoint.encode_model(state.best_weights or {}, config, state.best or {})

    target = checkpoint.model_uri(config.run.uri)

    def best(state: TrainState) -> None:
        data = model_file(state)
        uploader.submit("the best model", lambda: storage.put(data, target))

    def report(row: Row, state: TrainState) -> None:
        if ranks.rank == 0 and row["val_dice"] is not None:
            rows = list(state.history)
            uploader.submit("the learning curves", lambda: record.write(rows))
            if trial:
                uploader.flush()
        outlet.epoch(row)

    fit(
        state,
        loader,
        config,
        ranks,
        Hooks(
            validate=lambda network: validate(network, mine, config, ranks),
            save=lambda state: checkpoints.save(state.epoch, state.state_dict()),
            best=best,
            report=report,
        ),
    )
    if state.best is None:  # no validation case ever had a defined Dice: the last weights are the best known
        state.keep_best(state.history[-1])
    if ranks.rank == 0:
        uploader.submit("the learning curves", lambda: record.write(list(state.history), final=True))
        outlet.line("training done; storing the model and scoring it on the native grid")
        uploader.flush()
        # once more and in the foreground: a resumed run, or a failed upload, may have left an older model there
        storage.put(model_file(state), target)
    ranks.sum(torch.zeros(1))  # wait until rank 0 has stored the model that all ranks load next
    scores = [] if trial else _score(config, mine, ranks)
    return {
        "history": state.history,
        "best": state.best,
        "native": scores,
        "upload_failures": uploader.failures,
    }


def _resume(state: TrainState, config: Config, ranks: Ranks, outlet: Outlet) -> None:
    """Continue from the newest whole checkpoint; rank 0 chooses, so that all ranks hold the same one."""
    found: list[Any] = [None]
    if ranks.rank == 0:
        found = [checkpoint.load_latest(config.run.uri, outlet.line)]
    if ranks.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return
    state.load_state_dict(found[0])
    if ranks.rank == 0:
        outlet.resumed(state.epoch, state.best)


def _score(config: Config, mine: list[ValidationCase], ranks: Ranks) -> list[dict[str, Any]]:
    """Native-grid rows of all ranks' cases, worst first; the worst cases' panels go to the run's folder."""
    model = checkpoint.load_model(config.run.uri)
    predictor = Predictor(model.network, config, ranks.device)
    rows, pictures = [], {}
    for item in mine:
        score = score_native(predictor, item)
        rows.append(score.row)
        if config.validation.panels:
            dice = mean_dice(score.row)
            pictures[score.row["case"]] = draw_panel(
                score.image,
                score.truth,
                score.prediction,
                score.spacing,
                affine=score.affine,
                case=score.row["case"],
                dice=None if math.isnan(dice) else dice,
                window=config.prepare.window,
            )
    rows = sorted(ranks.gather(rows), key=lambda row: (mean_dice(row), row["case"]))
    for row in rows[: config.validation.panels]:
        if row["case"] in pictures:
            target = storage.join(config.run.uri, "panels", f"{row['case']}.png")
            storage.put(pictures[row["case"]], target, content_type="image/png")
    return rows
