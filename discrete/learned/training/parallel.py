"""Meta-training over several processes: fixed shards, added in a fixed order.

A batch is cut into shards whatever the number of processes; each process runs some of them, and all
of them get the gradient of every shard and add them in the same order. So any number of processes
that divides that of the shards gives the same bits (each with one number of threads).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

__all__ = ["Processes", "processes"]


class Processes:
    """The processes of a run, of which this is one.

    Args:
        shards: Of a batch.

    Attributes:
        rank: Its number.
        count: How many there are.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        there = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if there else 0
        self.count = distributed.get_world_size() if there else 1
        if shards % self.count:
            raise ValueError(
                f"the number of processes must divide shards = {shards}; got {self.count}"
            )

    @property
    def shards(self) -> list[int]:
        """The shards that are this process's."""
        return list(range(self.rank, self._shards, self.count))

    def total(self, parts: Mapping[int, Tensor]) -> Tensor:
        """The sum over all shards, of vectors of one length; the same bits in every process."""
        rows = self.gathered(parts)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total

    def gathered(self, parts: Mapping[int, Tensor]) -> Tensor:
        """The vectors of all shards, shape (shards, length)."""
        like = next(iter(parts.values()))
        rows = like.new_zeros((self._shards, *like.shape))
        for shard, part in parts.items():
            rows[shard] = part
        if self.count > 1:
            # Each row is zero in all processes but one, so that the order does not matter.
            distributed.all_reduce(rows)
        return rows

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def processes(device: torch.device, shards: int) -> Iterator[Processes]:
    """The processes that `torchrun` started, or the group that is there already."""
    wanted = int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.is_available()
    ours = wanted and not distributed.is_initialized()
    if ours:
        # Its functions have the group that there is at their import as a default (10 of them): a
        # later import would keep the group, and its threads would run into the interpreter's end,
        # where they abort it.
        importlib.import_module("torch.distributed.nn.functional")
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(shards)
    finally:
        if ours:
            distributed.destroy_process_group()
