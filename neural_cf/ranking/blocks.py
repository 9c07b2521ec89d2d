"""Computing scores in blocks of pairs that fit the processor's cache, and in smaller ones where memory runs out."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from distiller.system.memory import MEMORY_ERRORS, is_out_of_memory

Computation = TypeVar("Computation", bound=Callable)
log = logging.getLogger("ncf")
# Pairs scored at once, by kind of device. The published model's widest activations, 4000 x 256 float32, then take 4 MB
# and stay in the cache between layers: with four times as many pairs, two Xeon cores scored 15 % fewer pairs a second
# in FP32 and 37 % fewer in simulated INT8 (ml-1m, medians of 3 passes, 2026-11-23). Compiled layers leave no such
# activations and can take more pairs. A GPU has no such cache and runs best on few large batches.
PAIRS_AT_ONCE = {"cpu": 4_000, "cuda": 250_000}
COMPILED_PAIRS_AT_ONCE = PAIRS_AT_ONCE | {"cpu": 8_000}
# Items scored at once where several users share them: their embeddings stay in the cache from one user to the next.
ITEMS_AT_ONCE = {"cpu": 250, "cuda": 10_000}


class InParts:
    """A runner that computes functions of users and items part by part, in smaller parts where memory runs out.

    A part is a few users; where all users share their items, it is also only a few of these items.

    Args:
        pairs: The greatest number of pairs of user and item in a part, by kind of device.
        retry: Whether to go on with fewer users after running out of memory. Without it that is an error, as it must
            be for a model with observers, such as calibration's, which must see each pair once.
    """

    def __init__(self, pairs: Mapping[str, int], retry: bool = True):
        self._pairs = pairs
        self._retry = retry
        self._most_users: float = math.inf  # in a part: halved whenever memory runs out

    def __call__(self, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return the results for all users, in their order.

        Args:
            compute: A function of the tensors' parts with the results (B, C) or (B, C, ...). It gets shared items
                as (1, C).
            tensors: Tensors with a row for each user; the last one holds their items, (B, C). Users count as sharing
                these where all rows are one row in memory, as ``Tensor.expand`` makes them.

        Raises:
            MemoryError, RuntimeError: memory ran out even for a single user, or without ``retry``.
        """
        *of_users, items = tensors
        kind, (nb_users, nb_items) = items.device.type, items.shape
        shared = nb_users == 1 or items.stride(0) == 0
        # All tiles of items have the same width: the last one overlaps the one before it.
        width = -(-nb_items // -(-nb_items // ITEMS_AT_ONCE[kind])) if shared else nb_items
        results, start = None, 0
        while start < nb_users:
            users = max(1, min(self._pairs[kind] // width, self._most_users))
            part = [tensor[start : start + users] for tensor in of_users]
            rows = items[:1] if shared else items[start : start + users]
            try:
                for left in range(0, nb_items, width):
                    left = min(left, nb_items - width)
                    values = compute(*part, rows[:, left : left + width])
                    if results is None:
                        results = values.new_empty(*items.shape, *values.shape[2:])
                    results[start : start + users, left : left + width] = values
                    # Freed before the next part is computed, this memory is used for it while still in the cache.
                    del values
            except MEMORY_ERRORS as error:
                if not self._retry:
                    raise
                self._most_users = fewer_users(min(users, nb_users - start), error)
                continue
            start += users
        return results


def fewer_users(users: int, error: Exception) -> int:
    """Return half as many users, to go on with after running out of memory.

    Raises:
        Exception: ``error`` itself, where it is not about memory or there is only one user.
    """
    if users == 1 or not is_out_of_memory(error):
        raise error
    log.warning("out of memory with %d users at a time: going on with %d", users, users // 2)
    return users // 2


def for_one_shape(compute: Computation) -> Computation:
    """Return a function that runs compiled on tensors of its first call's shapes, and uncompiled on any others."""
    compiled, known = torch.compile(compute, dynamic=False, fullgraph=True), []

    @functools.wraps(compute)
    def call(*tensors: Tensor) -> Tensor | list[Tensor]:
        shapes = [tensor.shape for tensor in tensors]
        known[:] = known or shapes
        return (compiled if shapes == known else compute)(*tensors)

    return call
