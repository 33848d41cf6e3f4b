"""Connecting a job to Ray: the cluster it was submitted to, or one on this machine for its lifetime."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources

from segcloud import storage
from segcloud.config import ComputeConfig
from segcloud.errors import UsageError

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # the controller drains reports once per poll: 2 s by default, so that an epoch would wait for it
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # without it every line of a worker appears twice
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # a rank that is lost ends the run instead of hanging it
    "RAY_DATA_LOG_LEVEL": "ERROR",  # the plan of each dataset; the jobs show their own progress
}

_TOKEN_FILE = Path.home() / ".ray" / "auth_token"


@contextmanager
def connect(verbose: bool = False, temp_dir: str | None = None, dashboard: bool = False) -> Iterator[None]:
    """Connect to ``RAY_ADDRESS``; where it is not set, start Ray on this machine and stop it at the end.

    A submitted job finds ``RAY_ADDRESS`` set to its cluster.

    Args:
        verbose: show the workers' own output.
        dashboard: start it with a cluster here: Tune frees the workers of stopped trials through it.
        temp_dir: start a cluster here in any case, with this folder; a short path, since it holds sockets.

    Raises:
        UsageError: the cluster cannot be reached.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = None if temp_dir else os.environ.get("RAY_ADDRESS")
    if address and "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray has a token and would not send it
    local = {"include_dashboard": dashboard, "_temp_dir": temp_dir} if address is None else {}
    try:
        # "local", since without an address Ray joins whatever cluster was last started on this machine
        ray.init(address=address or "local", log_to_driver=verbose, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UsageError(
            f"cannot connect to Ray at {address or 'this machine'}: {str(error).splitlines()[0]}; "
            "check RAY_ADDRESS, and RAY_AUTH_MODE with its token"
        ) from None
    if address is None and _TOKEN_FILE.is_file():
        _TOKEN_FILE.chmod(0o600)  # Ray makes it readable to everybody on the machine
    try:
        yield
    finally:
        ray.shutdown()


def _has_token() -> bool:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or _TOKEN_FILE)
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


def refuse_temporary(*uris: str) -> None:
    """Refuse results in the working folder of a submitted job, which Ray deletes after it.

    Raises:
        UsageError: names the URI.
    """
    for uri in uris:
        if not storage.is_s3(uri) and "working_dir_files" in storage.local_path(uri).absolute().parts:
            raise UsageError(f"{uri}: would be deleted with the submitted job; use s3:// or an absolute path")


def acquire(config: ComputeConfig) -> dict[str, float]:
    """CPU and GPU of one worker, once the cluster's nodes can hold all workers.

    Waits up to ``compute.wait_for_nodes`` seconds for nodes to join, and asks an autoscaler for them.

    Raises:
        UsageError: says what is needed and what there is.
    """
    deadline = time.monotonic() + config.wait_for_nodes
    try:
        while True:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            wanted = worker_resources(config, nodes)
            room = sum(_room(node, wanted) for node in nodes)
            if room >= config.workers:
                return wanted
            if time.monotonic() >= deadline:
                break
            request_resources(bundles=[wanted] * config.workers)  # an autoscaler adds nodes only on demand
            time.sleep(1)
    finally:
        if config.wait_for_nodes:
            request_resources(bundles=[])
    each = " + ".join(f"{amount:g} {kind}" for kind, amount in wanted.items())
    raise UsageError(
        f"{config.workers} worker(s) of {each} are wanted and the cluster's {len(nodes)} node(s) hold {room}; "
        "lower compute.workers or compute.cpus_per_worker, add nodes, or let them join with compute.wait_for_nodes"
    )


def room(wanted: dict[str, float]) -> int:
    """Workers of the given resources that the cluster holds."""
    return sum(_room(node["Resources"], wanted) for node in ray.nodes() if node["Alive"])


def worker_resources(config: ComputeConfig, nodes: list[dict[str, float]]) -> dict[str, float]:
    """CPU and GPU of one worker, as the config asks and the nodes allow.

    Args:
        config: `cpus_per_worker` unset takes the largest equal share with which all workers find a node.
        nodes: each node's resources.
    """
    gpu = config.device == "cuda" or (
        config.device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)
    )
    base = {"GPU": 1.0} if gpu else {}
    if config.cpus_per_worker:
        return {"CPU": float(config.cpus_per_worker), **base}
    for share in range(int(max((node.get("CPU", 0) for node in nodes), default=1)), 1, -1):
        wanted = {"CPU": float(share), **base}
        if sum(_room(node, wanted) for node in nodes) >= config.workers:
            return wanted
    return {"CPU": 1.0, **base}


def _room(node: dict[str, float], wanted: dict[str, float]) -> int:
    return min(int(node.get(kind, 0) // amount) for kind, amount in wanted.items())
