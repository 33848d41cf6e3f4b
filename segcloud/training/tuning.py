"""Ray Tune around the trainer: search over config fields, every trial a full DDP run on shared volumes.

Fairness: all trials validate on the same cases with the same window, and each may see the same number of patch
voxels, so that a large ROI pays for its cost with fewer patches. The data are prepared once, before the first
trial; a trial gets references to prepared volumes and runs no preparation.
"""

import csv
import io
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
import yaml
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from segcloud import cluster, storage
from segcloud.config import Config, digest, replaced
from segcloud.data.cases import Verdict
from segcloud.data.prepare import prepared_uri
from segcloud.data.sampling import steps_per_epoch
from segcloud.errors import SegcloudError, UsageError, last_line
from segcloud.model.checkpoint import FOLDER
from segcloud.progress import Progress, table
from segcloud.report.sweep import draw_sweep, format_value
from segcloud.training.loop import Row
from segcloud.training.search_space import usable_space
from segcloud.training.trainer import Plan, fit_workers, make_plan

HALVING = 2
"""ASHA keeps one in this many at each rung."""
TRIAL_MEMORY = 2**28
"""Bytes; the only resource of a trial's driver. Asking for a CPU, drivers would take those of their workers."""


class SweepError(SegcloudError):
    """No trial of the sweep has a result."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        trials: per trial: id, params, status, reason, best Dice, curve, seconds; the best first.
        left_out: values of the search space that cannot run, as (field, value, reason).
        verdicts: cases left out.
        best_config: URI of the best trial's config.
    """

    trials: list[dict[str, Any]]
    left_out: list[tuple[str, Any, str]]
    verdicts: list[Verdict]
    best_config: str


def tune(config: Config) -> SweepResult:
    """Run the sweep of ``config.tune``, or continue it. Needs a connected Ray with its dashboard.

    Raises:
        UsageError: dataset, search space or cluster do not allow the start.
        SweepError: no trial has a result.
        StorageError: results cannot be stored.
    """
    wanted = cluster.acquire(config.compute)
    plan = make_plan(config)
    budget = config.tune.budget_voxels or config.train.epochs * epoch_voxels(config, len(plan.training))
    space, left_out = usable_space(config, wanted)
    for path, value, reason in left_out:
        print(f"left out: {path}={format_value(value)}: {reason}", flush=True)
    # the trials see the same volumes wherever their own folders are
    base = replaced(config, {"prepare.uri": prepared_uri(config)})
    _claim(base, plan, budget)
    room = cluster.room(wanted) // config.compute.workers
    concurrent = min(config.tune.max_concurrent or room, room, config.tune.samples)
    print(
        f"sweep: {config.tune.samples} trials of {budget:.3g} patch voxels, {concurrent} at a time, "
        f"{config.compute.workers} worker(s) each",
        flush=True,
    )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables; SweepProgress shows what is needed
    grid = _tuner(base, plan, wanted, space, budget, concurrent).fit()
    trials = sorted((_describe(result, base, plan, budget) for result in grid), key=_rank)
    return _publish(base, trials, left_out, plan, budget)


def epoch_voxels(config: Config, cases: int) -> int:
    """Patch voxels that one epoch sees."""
    return steps_per_epoch(config.train, cases) * config.train.batch_size * math.prod(config.train.roi_size)


def trial_config(base: Config, params: dict[str, Any], cases: int, budget: float, trial: str) -> Config:
    """The config of one trial: its params, and as many epochs as the budget pays for.

    Raises:
        ConfigError: the params do not make a valid config.
    """
    values = {"run.uri": storage.join(base.run.uri, "trials", trial), "validation.panels": 0, **params}
    sized = replaced(base, values, origin=trial)
    epochs = max(1, int(budget // epoch_voxels(sized, cases)))
    every = max(1, epochs // base.tune.checks)
    return replaced(
        sized,
        {"train.epochs": epochs, "train.checkpoint_every": every, "validation.every": every},
        origin=trial,
    )


def _claim(base: Config, plan: Plan, budget: float) -> None:
    """Bind the sweep's folder to its settings.

    Raises:
        UsageError: it holds a sweep of other settings or data.
    """
    identity = {
        "config": {k: v for k, v in base.to_dict().items() if k not in ("compute", "run")},
        "volumes": [[storage.name(ref.uri) for ref in side] for side in (plan.training, plan.validation)],
        "budget": budget,
    }
    identity["config"]["tune"] = {**identity["config"]["tune"], "max_concurrent": None}
    marker = storage.join(base.run.uri, "sweep.json")
    try:
        storage.put_json({"digest": digest(identity), "identity": identity}, marker, if_absent=True)
    except storage.AlreadyExistsError:
        if storage.read_json(marker)["digest"] != digest(identity):
            raise UsageError(
                f"{base.run.uri} holds a sweep with other settings or data; choose another run.uri, or restore "
                "the settings to continue it"
            ) from None


def _tuner(
    base: Config, plan: Plan, wanted: dict[str, float], space: dict[str, Any], budget: float, concurrent: int
) -> ray.tune.Tuner:
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, base=base, plan=plan, wanted=wanted, budget=budget),
        {"memory": TRIAL_MEMORY},
    )
    place, name = storage.join(base.run.uri, "ray"), "tune"
    if ray.tune.Tuner.can_restore(storage.join(place, name)):
        print("continuing the sweep that was begun here; finished trials are kept", flush=True)
        return ray.tune.Tuner.restore(
            storage.join(place, name), trainable=trainable, param_space=space, resume_unfinished=True
        )
    return ray.tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            metric="val_dice",
            mode="max",
            num_samples=base.tune.samples,
            max_concurrent_trials=concurrent,
            scheduler=_scheduler(base, space, budget),
            search_alg=_search(base, concurrent),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=name, storage_path=place, verbose=0, callbacks=[SweepProgress(base.tune.samples, budget)]
        ),
    )


def _scheduler(base: Config, space: dict[str, Any], budget: float) -> TrialScheduler:
    if base.tune.scheduler == "asha":
        # rungs a little past a quarter and a half, none at the end: a trial that gets there is to finish by itself
        first = 1.0001 * budget / HALVING**2
        return ASHAScheduler(
            time_attr="voxels",
            max_t=first * HALVING**2 * 0.9999,
            grace_period=first,
            reduction_factor=HALVING,
        )
    if base.tune.scheduler == "pbt":
        numbers = {path: domain for path, domain in space.items() if "choice" not in base.tune.space[path]}
        if not numbers:
            raise UsageError(
                "tune.scheduler=pbt changes numbers, and tune.space holds choices only; use asha"
            )
        return PopulationBasedTraining(
            time_attr="voxels", perturbation_interval=budget / base.tune.checks, hyperparam_mutations=numbers
        )
    return FIFOScheduler()


def _search(base: Config, concurrent: int) -> Any:
    if base.tune.search == "random":
        return ray.tune.search.BasicVariantGenerator(max_concurrent=concurrent, random_state=base.tune.seed)
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=base.tune.seed)
    except (ImportError, AssertionError):
        raise UsageError("tune.search=optuna needs optuna: pip install 'segcloud[tune]'") from None


def run_trial(
    params: dict[str, Any], base: Config, plan: Plan, wanted: dict[str, float], budget: float
) -> None:
    """One trial: a training run in a folder of its own, reporting to Tune at each validation."""
    trial = ray.tune.get_context().get_trial_id()
    config = trial_config(base, params, len(plan.training), budget, trial)
    if (given := ray.tune.get_checkpoint()) is not None:
        _inherit(given, config)
    listener = _TrialListener(config, epoch_voxels(config, len(plan.training)))
    fit_workers(config, plan, wanted, listener, trial=True)


def _inherit(given: ray.tune.Checkpoint, config: Config) -> None:
    """Continue from another trial's checkpoint (population based training), or from this trial's own."""
    with given.as_directory() as folder:
        source = json.loads((Path(folder) / "source.json").read_text())
    target = storage.join(config.run.uri, FOLDER, source["name"])
    if source["uri"] != target:
        for info in list(storage.list_objects(storage.join(config.run.uri, FOLDER))):
            storage.delete(info.uri)
        with tempfile.TemporaryDirectory() as folder:
            storage.fetch(source["uri"], Path(folder) / source["name"])
            storage.put(Path(folder) / source["name"], target)


class _TrialListener:
    """Reports validated epochs to Tune, with a pointer to the checkpoint instead of a copy."""

    def __init__(self, config: Config, voxels: int):
        self.config, self.voxels = config, voxels

    def line(self, text: str) -> None:
        """Lines of a trial go to its log."""
        print(text, flush=True)

    def resumed(self, done: int, best: Row | None) -> None:
        """Likewise."""
        print(f"resuming after epoch {done}", flush=True)

    def epoch(self, row: Row) -> None:
        """Report Dice and the voxels seen so far."""
        if row["val_dice"] is None:
            return
        name = f"epoch_{row['epoch']:05d}.pt"
        metrics = {k: row[k] for k in ("epoch", "loss", "val_dice", "val_iou")}
        with tempfile.TemporaryDirectory() as folder:
            uri = storage.join(self.config.run.uri, FOLDER, name)
            (Path(folder) / "source.json").write_text(json.dumps({"uri": uri, "name": name}))
            ray.tune.report(
                {**metrics, "voxels": row["epoch"] * self.voxels, "epochs": self.config.train.epochs},
                checkpoint=ray.tune.Checkpoint.from_directory(folder),
            )

    def close(self) -> None:
        """Nothing is held open."""


class SweepProgress(ray.tune.Callback):
    """A bar of finished trials, and a table of the running ones at most every half minute."""

    TABLE_EVERY_S = 30.0

    def __init__(self, samples: int, budget: float):
        self.samples, self.budget = samples, budget
        self._last = time.monotonic()
        self._progress: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_progress": None}  # Tune stores its callbacks; a terminal cannot be stored

    @property
    def progress(self) -> Progress:
        """Made at first use, in the process that shows it."""
        if self._progress is None:
            self._progress = Progress("sweep", self.samples, "trial")
        return self._progress

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """Show the table when it is due."""
        if time.monotonic() - self._last >= self.TABLE_EVERY_S:
            self._last = time.monotonic()
            rows = [self._row(t) for t in trials if t.status == "RUNNING"]
            self.progress.line(table(rows))

    def _row(self, trial: Any) -> dict[str, object]:
        last = trial.last_result or {}
        params = {path: format_value(value) for path, value in trial.config.items()}
        dice = last.get("val_dice")
        seen = 100 * last.get("voxels", 0) / self.budget
        return {
            "trial": trial.trial_id,
            **params,
            "budget": f"{seen:.0f} %",
            "Dice": f"{dice:.3f}" if dice else "-",
        }

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Count it."""
        self.progress.line("  ".join(f"{k} {v}" for k, v in self._row(trial).items()))
        self.progress.advance(quiet=True)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Count it, and say so."""
        self.progress.line(f"trial {trial.trial_id} failed; the sweep goes on")
        self.progress.advance(quiet=True)


def _describe(result: ray.tune.Result, base: Config, plan: Plan, budget: float) -> dict[str, Any]:
    trial = Path(result.path).name
    frame = result.metrics_dataframe
    curve = (
        []
        if frame is None or "val_dice" not in frame
        else list(zip(frame["voxels"], frame["val_dice"], strict=True))
    )
    curve = [(int(voxels), float(dice)) for voxels, dice in curve]
    metrics = result.metrics or {}
    if result.error is not None:
        status, reason = "failed", last_line(result.error)
    elif metrics.get("epoch", 0) >= metrics.get("epochs", 1):
        status, reason = "finished", ""
    else:
        status, reason = "stopped early", f"at {100 * metrics.get('voxels', 0) / budget:.0f} % of the budget"
    return {
        "trial": trial,
        "params": {path: result.config[path] for path in base.tune.space},
        "status": status,
        "reason": reason,
        "val_dice": max((dice for _, dice in curve if math.isfinite(dice)), default=None),
        "curve": curve,
        "seconds": float(metrics.get("time_total_s", 0.0)),
    }


def _rank(trial: dict[str, Any]) -> tuple[float, str]:
    return (-(trial["val_dice"] if trial["val_dice"] is not None else -1.0), trial["trial"])


def _publish(
    base: Config,
    trials: list[dict[str, Any]],
    left_out: list[tuple[str, Any, str]],
    plan: Plan,
    budget: float,
) -> SweepResult:
    """Write trials.csv, sweep.png and best.yaml."""
    storage.put(trials_csv(trials), storage.join(base.run.uri, "trials.csv"), content_type="text/csv")
    picture = draw_sweep(trials, int(budget), storage.name(base.run.uri))
    storage.put(picture, storage.join(base.run.uri, "sweep.png"), content_type="image/png")
    best = next((t for t in trials if t["val_dice"] is not None and t["status"] != "failed"), None)
    if best is None:
        reason = trials[0]["reason"] if trials else "no trial was started"
        raise SweepError(f"{base.run.uri}: no trial has a result; the last reason was: {reason}")
    config = trial_config(base, best["params"], len(plan.training), budget, best["trial"])
    config = replaced(
        config, {"run.uri": storage.join(base.run.uri, "best"), "validation.panels": base.validation.panels}
    )
    target = storage.join(base.run.uri, "best.yaml")
    storage.put(yaml.safe_dump(config.to_dict(), sort_keys=False).encode(), target)
    return SweepResult(trials, left_out, plan.verdicts, target)


def trials_csv(trials: list[dict[str, Any]]) -> bytes:
    """One row per trial, the best first: id, every searched field, status, reason, best Dice, voxels, seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    params = list(trials[0]["params"]) if trials else []
    writer.writerow(["trial", *params, "status", "reason", "val_dice", "voxels", "seconds"])
    for trial in trials:
        voxels = trial["curve"][-1][0] if trial["curve"] else 0
        values = [json.dumps(trial["params"][path]) for path in params]
        dice = "" if trial["val_dice"] is None else trial["val_dice"]
        writer.writerow(
            [
                trial["trial"],
                *values,
                trial["status"],
                trial["reason"],
                dice,
                voxels,
                round(trial["seconds"], 1),
            ]
        )
    return text.getvalue().encode()
