"""What a sweep may try: the config's domains as Ray Tune's, without values that cannot run."""

from typing import Any

import ray
import ray.tune
import torch

from segcloud.config import Config, ConfigError, replaced
from segcloud.errors import UsageError
from segcloud.model.network import activation_bytes, build_network
from segcloud.model.precision import autocast
from segcloud.training.recipe import build_loss, build_optimizer

ACTIVATION_FACTOR = 3.0
"""Peak memory of a training step over the sum of the layers' outputs: gradients and workspace beside them."""


def usable_space(
    config: Config, wanted: dict[str, float]
) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """The search space as Ray Tune's domains, without the choices that cannot run.

    A choice is tried on the config by itself; an ROI whose activations cannot fit a worker is left out too.

    Raises:
        UsageError: a field does not exist, or no choice of a field can run.
    """
    domains: dict[str, Any] = {}
    left_out: list[tuple[str, Any, str]] = []
    limit = memory_limit(wanted, config.compute.workers)
    for path, domain in config.tune.space.items():
        ((kind, values),) = domain.items()
        if path.split(".")[0] not in ("train", "model"):
            raise UsageError(
                f"tune.space: {path} changes more than the training; search train.* or model.* fields"
            )
        usable = []
        for value in values:
            try:
                changed = replaced(config, {path: value})
                _require_memory(changed, wanted, limit)
                usable.append(value)
            except ConfigError as error:
                if kind != "choice":
                    raise UsageError(f"tune.space: {error}") from None
                left_out.append((path, value, str(error)))
        if not usable:
            raise UsageError(f"tune.space: no choice of {path} can run: {left_out[-1][2]}")
        domains[path] = getattr(ray.tune, kind)(*([usable] if kind == "choice" else usable))
    return domains, left_out


def _require_memory(config: Config, wanted: dict[str, float], limit: float) -> None:
    """Refuse a config whose training step does not fit a worker: estimated, and on a GPU tried.

    Raises:
        ConfigError: with the estimate and what a worker has.
    """
    needed = activation_bytes(config) * ACTIVATION_FACTOR
    if needed > limit:
        raise ConfigError(f"needs about {needed / 1e9:.1f} GB for a step, a worker has {limit / 1e9:.1f} GB")
    if "GPU" in wanted and not ray.get(_probe.remote(config)):
        raise ConfigError(
            f"a step does not fit the GPU's {limit / 1e9:.1f} GB (estimate {needed / 1e9:.1f} GB)"
        )


def memory_limit(wanted: dict[str, float], workers: int) -> float:
    """Bytes that one worker may fill: its GPU's free memory, or its share of the smallest node's memory."""
    if "GPU" in wanted:
        return ray.get(_free_gpu_memory.remote())
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return min(node["memory"] / max(1, min(workers, node["CPU"] // wanted["CPU"])) for node in nodes)


def step_fits(config: Config, device: torch.device) -> bool:
    """Run one training step of one worker's share on zeros; False where memory runs out."""
    try:
        network = build_network(config).to(device)
        optimizer = build_optimizer(config.train, list(network.parameters()), fused=True)
        shape = (config.train.batch_size // config.compute.workers, 1, *config.train.roi_size)
        with autocast(config.train.precision, device):
            logits = network(torch.zeros(shape, device=device))
        build_loss(config.train)(logits.float(), torch.zeros(shape, device=device)).backward()
        optimizer.step()
        return True
    except torch.OutOfMemoryError:
        return False


@ray.remote(num_gpus=1)
def _probe(config: Config) -> bool:
    return step_fits(config, torch.device("cuda"))


@ray.remote(num_gpus=1)
def _free_gpu_memory() -> float:
    return float(torch.cuda.mem_get_info()[0])
