"""The few collective operations that training needs, the same with and without ``torch.distributed``."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This worker's place among all workers.

    Attributes:
        rank: 0 … world_size - 1.
        world_size: number of workers.
        device: where this worker computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, on every rank."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def share_buffers(self, network: nn.Module) -> None:
        """Give every rank rank 0's buffers: local batch norms count apart, and one network is to be validated."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: list[Any]) -> list[Any]:
        """The ranks' lists joined, in rank order, on every rank. Small Python objects only."""
        if self.world_size == 1:
            return value
        parts: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, value)
        return [item for part in parts for item in part]

    def mine(self, items: list[Any]) -> list[Any]:
        """This rank's share of a list that all ranks hold."""
        return items[self.rank :: self.world_size]
