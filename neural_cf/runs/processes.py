"""The processes of one training: alone, or started by ``torchrun`` on one machine or several.

All of them hold the whole model and draw the same batches; each computes its share of a batch, and what they
compute is summed over all.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distiller.system.cli import InputError

Value = TypeVar("Value")


@dataclass
class Processes:
    """The processes that share a run, as this process sees them.

    Attributes:
        rank: Its number.
        world_size: How many there are.
    """

    rank: int = 0
    world_size: int = 1
    _asked: bool = field(default=False, init=False)
    _asked_of_all: Tensor | None = field(default=None, init=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's part of ``range(count)``."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def ask_to_stop(self) -> None:
        """Make ``asked_to_stop`` true in all processes, at the same moment: after the next ``sum``."""
        self._asked = True

    @property
    def asked_to_stop(self) -> bool:
        """Whether one of the processes has asked to stop; all get the same answer. Waits for a GPU's exchange."""
        if self.world_size == 1:
            return self._asked
        return self._asked_of_all is not None and bool(self._asked_of_all)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all processes, in one exchange.

        Raises:
            InputError: another process has ended.
        """
        if self.world_size == 1:
            return
        asked = tensors[0].new_full((1,), self._asked)
        flat = torch.cat([*(tensor.flatten() for tensor in tensors), asked])
        self._exchange(lambda: dist.all_reduce(flat))
        *parts, self._asked_of_all = flat.split([*(tensor.numel() for tensor in tensors), 1])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, value: Value) -> Value:
        """Return the first process's value, once all processes have come here.

        Raises:
            InputError: another process has ended.
        """
        if self.world_size == 1:
            return value
        values = [value]
        self._exchange(lambda: dist.broadcast_object_list(values))
        return values[0]

    def _exchange(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"process {self.rank} of {self.world_size}: another one has ended or is out of reach: {reason}"
            ) from error


def join_processes(device_type: str) -> Processes:
    """Join the processes that ``torchrun`` started, if it did: over NCCL between GPUs, else over Gloo.

    Raises:
        InputError: the others cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        return Processes()
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"torchrun: {str(error).strip().splitlines()[0]}") from error
    return Processes(dist.get_rank(), dist.get_world_size())


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def leave_processes(processes: Processes) -> None:
    """End this process as a success if it is one of several; to be called once all is done.

    At once and without cleaning up, in the midst of which PyTorch's threads now and then abort the process.
    """
    if processes.world_size > 1:
        processes.agree(None)  # the others do not leave while the first is still at work
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
