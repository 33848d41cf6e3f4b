"""Connecting a job to Ray: the cluster it was submitted to, or one on this machine for its lifetime."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources

from segcloud.config import ComputeConfig
from segcloud.errors import UsageError

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # the controller drains reports once per poll: 2 s by default, so that an epoch would wait for it
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # without it every line of a worker appears twice
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # a rank that is lost ends the run instead of hanging it
    "RAY_DATA_LOG_LEVEL": "ERROR",  # the plan of each dataset; the jobs show their own progress
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the same on driver and workers
}


@contextmanager
def connect(verbose: bool = False) -> Iterator[None]:
    """Connect to ``RAY_ADDRESS`` or the job's cluster; without one, start Ray here and stop it at the end.

    Args:
        verbose: show the workers' own output.

    Raises:
        UsageError: the cluster cannot be reached.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray has a token and would not send it
    try:
        ray.init(
            log_to_driver=verbose,
            logging_level=logging.ERROR,
            include_dashboard=False if not os.environ.get("RAY_ADDRESS") else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot connect to Ray at {os.environ.get('RAY_ADDRESS', 'this machine')}: "
            f"{str(error).splitlines()[0]}; check RAY_ADDRESS, and RAY_AUTH_MODE with its token"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _has_token() -> bool:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


def resources(config: ComputeConfig) -> dict[str, float]:
    """CPU and GPU of one worker, as the config and the cluster's nodes allow.

    Raises:
        UsageError: ``compute.device=cuda`` on a cluster without GPUs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if config.device == "cuda" and gpus == 0:
        raise UsageError("compute.device=cuda, but the cluster has no GPU; set compute.device=auto or cpu")
    cpus = config.cpus_per_worker or _share([int(node.get("CPU", 0)) for node in nodes], config.workers)
    wanted = {"CPU": float(cpus)}
    if config.device != "cpu" and gpus >= 1:
        wanted["GPU"] = 1.0
    return wanted


def _share(node_cpus: list[int], workers: int) -> int:
    """The most CPUs per worker with which all workers still find a node."""
    for share in range(max(node_cpus, default=1), 1, -1):
        if sum(cpus // share for cpus in node_cpus) >= workers:
            return share
    return 1


def require_capacity(wanted: dict[str, float], config: ComputeConfig) -> None:
    """Refuse what this cluster cannot hold, after ``compute.wait_for_nodes`` seconds for nodes to join.

    Raises:
        UsageError: says what is needed and what there is.
    """
    deadline = time.monotonic() + config.wait_for_nodes
    if short := _missing(wanted, config.workers):
        request_resources(bundles=[wanted] * config.workers)  # an autoscaler adds nodes only on demand
        try:
            while short and time.monotonic() < deadline:
                time.sleep(1)
                short = _missing(wanted, config.workers)
        finally:
            request_resources(bundles=[])
    if short:
        raise UsageError(
            f"{short}; lower compute.workers or compute.cpus_per_worker, add nodes, "
            "or let them join with compute.wait_for_nodes"
        )


def _missing(wanted: dict[str, float], workers: int) -> str:
    have = ray.cluster_resources()
    for kind, amount in wanted.items():
        if amount * workers > have.get(kind, 0):
            return (
                f"{workers} worker(s) of {amount:g} {kind} need {amount * workers:g} {kind}, "
                f"the cluster has {have.get(kind, 0):g}"
            )
    return ""
