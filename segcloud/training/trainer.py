"""Ray Train around the training worker: the only place that knows where world size and devices come from.

The driver finds and prepares the cases, claims the run's folder, starts one worker per rank and writes the
summary. Checkpoints, history and model live in the run's folder (see ``model/checkpoint.py``), so that a
worker restarted by Ray, a driver started again and a second cluster all continue from the same place.
"""

import math
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import monai
import ray
import ray.train
import torch
import yaml
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model

from segcloud import __version__, cluster, storage
from segcloud.config import Config, digest
from segcloud.data.cases import Verdict, admit, load_dataset, split_cases
from segcloud.data.prepare import prepare_cases, prepared_uri
from segcloud.data.prepared import PreparedRef, PreparedStore
from segcloud.errors import SegcloudError, UsageError, last_line
from segcloud.training.follow import Board, Follower, Listener, Terminal
from segcloud.training.loop import DivergedError, Row
from segcloud.training.ranks import Ranks
from segcloud.training.worker import Outlet, run_worker

CONTROLLER_ATTEMPTS = 3
"""Starts of Ray's training controller: its death reaches the driver as an actor error, not as a retry."""
# Settings that may differ between the first and a later start of one run: they change no result.
FREE = (
    "prepare.uri",
    "prepare.cache_dir",
    "prepare.cache_gb",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)
FREE_SECTIONS = ("compute.", "run.", "tune.", "data.bad_cases", "validation.panels")


class TrainingError(SegcloudError):
    """Training ended without a result."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has.

    Attributes:
        run_uri: the run's folder.
        history: one row per epoch.
        best: the history row of the best validation, if any Dice was defined.
        native: per validation case, worst first: Dice, IoU and volumes on its own grid.
        verdicts: cases left out.
    """

    run_uri: str
    history: list[Row]
    best: Row | None
    native: list[dict[str, Any]]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Plan:
    """What a run works on: prepared, admitted and split.

    Attributes:
        training: prepared volumes to train on.
        validation: prepared volumes to validate on.
        verdicts: cases left out.
        made: volumes that were prepared now; the others were there.
    """

    training: list[PreparedRef]
    validation: list[PreparedRef]
    verdicts: list[Verdict]
    made: int


def make_plan(config: Config) -> Plan:
    """Check the places, find and prepare the cases, apply ``data.bad_cases`` and ``data.split``.

    Raises:
        UsageError: dataset or config do not allow a start.
        StorageError: a place cannot be read or written.
    """
    if not config.run.uri:
        raise UsageError("run.uri is not set; pass run.uri=s3://bucket/runs/name or a folder")
    cluster.refuse_temporary(config.run.uri, prepared_uri(config))
    storage.check_writable(config.run.uri)
    storage.check_writable(prepared_uri(config))
    dataset = load_dataset(config.data)
    if not dataset.verdicts:
        split_cases(dataset.cases, config.data.split)  # a split that cannot work fails before the preparing
    refs, found, made = prepare_cases(dataset.cases, config)
    verdicts = admit([*dataset.verdicts, *found], config.data.bad_cases)
    print(f"data: {len(refs)} cases ready, {made} prepared now, {len(verdicts)} left out", flush=True)
    by_case = {ref.case: ref for ref in refs}
    training, validation = split_cases(list(by_case), config.data.split)
    print(f"split: {len(training)} to train, {len(validation)} to validate", flush=True)
    PreparedStore(prepared_uri(config), config.prepare).check_budget(refs)
    return Plan([by_case[c] for c in training], [by_case[c] for c in validation], verdicts, made)


def train(config: Config) -> TrainResult:
    """Train the config's model, continuing a run that was interrupted. Needs a connected Ray.

    Raises:
        UsageError: dataset, config or cluster do not allow the start.
        TrainingError: workers failed too often.
        SegcloudError: training diverged, or storage failed.
    """
    started = time.monotonic()
    wanted = cluster.acquire(config.compute)
    plan = make_plan(config)
    finished = _claim(config, plan)
    if finished is None:
        text = " + ".join(f"{amount:g} {kind}" for kind, amount in wanted.items())
        print(f"training: {config.compute.workers} worker(s) of {text}, starting", flush=True)
        result = fit_workers(config, plan, wanted, Terminal(config.train.epochs))
        finished = _summary(config, result, plan.verdicts, time.monotonic() - started)
        storage.put_json(finished, storage.join(config.run.uri, "result.json"))
    else:
        print(f"{config.run.uri}: already finished, nothing to train", flush=True)
    return TrainResult(
        config.run.uri, finished["history"], finished["best"], finished["native"], plan.verdicts
    )


def _identity(config: Config, plan: Plan) -> dict[str, Any]:
    """The settings and data that make a run what it is, flat."""
    flat = {}
    for section, values in config.to_dict().items():
        for key, value in values.items():
            path = f"{section}.{key}"
            if path not in FREE and not path.startswith(FREE_SECTIONS):
                flat[path] = value
    if config.train.schedule == "constant":
        del flat["train.epochs"]  # more epochs continue the same curve; under a schedule they would bend it
    flat["training volumes"] = [storage.name(ref.uri) for ref in plan.training]
    flat["validation volumes"] = [storage.name(ref.uri) for ref in plan.validation]
    return flat


def _claim(config: Config, plan: Plan) -> dict[str, Any] | None:
    """Bind the run's folder to this config, and return its result if it has finished.

    Raises:
        UsageError: the folder holds a run of other settings or data.
    """
    marker = storage.join(config.run.uri, "run.json")
    identity = _identity(config, plan)
    described = {
        "identity": identity,
        "digest": digest(identity),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    try:
        storage.put_json(described, marker, if_absent=True)  # of two drivers at once, one claims the folder
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        storage.put(text.encode(), storage.join(config.run.uri, "config.yaml"))
        return None
    except storage.AlreadyExistsError:
        before = storage.read_json(marker)["identity"]
    changed = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
    if changed:
        details = "; ".join(f"{k}: {before.get(k)!r} → {identity.get(k)!r}"[:200] for k in changed[:4])
        raise UsageError(
            f"{config.run.uri} holds a run with other settings ({details}); choose another run.uri, "
            "or restore the settings to continue that run"
        )
    done = storage.join(config.run.uri, "result.json")
    if storage.stat(done) is None:
        return None
    result = storage.read_json(done)
    return result if len(result["history"]) >= config.train.epochs else None


def _versions() -> dict[str, str]:
    return {
        "segcloud": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "ray": ray.__version__,
    }


def fit_workers(
    config: Config, plan: Plan, wanted: dict[str, float], listener: Listener, trial: bool = False
) -> dict[str, Any]:
    """Run the workers under Ray Train and return rank 0's result (see :func:`run_worker`).

    Args:
        config: resolved.
        plan: the data.
        wanted: resources of one worker.
        listener: follows the workers' progress.
        trial: of a sweep: each validated epoch is stored before it is told of, and nothing is scored at the end.

    Raises:
        TrainingError: training diverged, or workers failed too often.
    """
    board = Board.remote()
    payload = {
        "config": config,
        "training": plan.training,
        "validation": plan.validation,
        "store": PreparedStore(prepared_uri(config), config.prepare),
        "board": board,
        "threads": int(wanted["CPU"]),
        "trial": trial,
    }
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=payload,
        torch_config=TorchConfig(timeout_s=1800),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.compute.workers, use_gpu="GPU" in wanted, resources_per_worker=wanted
        ),
        run_config=ray.train.RunConfig(
            # Ray's own state is bookkeeping only; a fresh name per start keeps it from resuming by itself
            name=f"{datetime.now(UTC):%Y%m%dT%H%M%S}",
            storage_path=storage.join(config.run.uri, "ray"),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            failure_config=ray.train.FailureConfig(
                max_failures=config.compute.max_failures, controller_failure_limit=10
            ),
        ),
    )
    with Follower(board, listener):
        result = _fit_with_retries(trainer)
    if "diverged" in result:
        raise TrainingError(result["diverged"])
    return result


def _fit_with_retries(trainer: TorchTrainer) -> dict[str, Any]:
    for attempt in range(1, CONTROLLER_ATTEMPTS + 1):
        try:
            return trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            raise TrainingError(
                f"training failed: {_reason(error)}; run the same command again to continue from the last "
                "checkpoint, with --verbose for the workers' output"
            ) from error
        except ray.exceptions.RayActorError:
            print(f"the training controller was lost (attempt {attempt}); continuing", flush=True)
    raise TrainingError(
        f"the training controller was lost {CONTROLLER_ATTEMPTS} times; see the nodes' memory"
    )


def _reason(error: ray.train.TrainingFailedError) -> str:
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    return last_line(failures[0])


def _train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Entry point on each worker."""
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    torch.set_num_threads(payload["threads"])
    board, first = payload["board"], ranks.rank == 0

    def epoch(row: Row) -> None:
        if first:
            board.post.remote(("epoch", (row,)))
        # Ray refuses NumPy scalars and NaN in metrics; the row holds floats, and None where nothing is known
        metrics = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        ray.train.report(metrics)

    outlet = Outlet(
        line=lambda text: board.post.remote(("line", (text,))),
        epoch=epoch,
        resumed=lambda done, best: board.post.remote(("resumed", (done, best))),
    )
    try:
        return run_worker(
            payload["config"],
            payload["training"],
            payload["validation"],
            payload["store"],
            ranks,
            payload["trial"],
            lambda network: prepare_model(network, move_to_device=False),
            outlet,
        )
    except DivergedError as error:
        # on all ranks at once, and a retry would diverge again: a value, so that Ray does not retry
        return {"diverged": str(error)}


def _summary(
    config: Config, result: dict[str, Any], verdicts: list[Verdict], seconds: float
) -> dict[str, Any]:
    return {
        "history": result["history"],
        "best": result["best"],
        "native": [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            for row in result["native"]
        ],
        "left_out": [{"case": v.case, "code": v.code, "message": v.message} for v in verdicts],
        "upload_failures": result["upload_failures"],
        "seconds": round(seconds, 1),
        "workers": config.compute.workers,
        "versions": _versions(),
    }
