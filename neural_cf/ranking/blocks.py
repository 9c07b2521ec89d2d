"""Scoring in blocks that fit the cache, and ever smaller ones where memory runs out."""

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
# Pairs computed with at once. The published model's widest activations, 4000 x 256 float32, then take 4 MB and stay in
# the cache between layers: with four times as many, two Xeon cores scored 15 % fewer pairs a second in FP32 and 37 %
# fewer in simulated INT8 (ml-1m, medians of 3 passes, 2026-11-23). Compiled layers leave no such activations.
# A GPU has no such cache, and wants few trips from the host.
PAIRS_AT_ONCE = {"cpu": 4_000, "cuda": 250_000}
COMPILED_PAIRS_AT_ONCE = PAIRS_AT_ONCE | {"cpu": 8_000}
# Items that several users share, at once: their rows stay in the cache from one user to the next.
ITEMS_AT_ONCE = {"cpu": 250, "cuda": 10_000}


class InParts:
    """Computes functions of tensors for a few users at a time, and for ever fewer where memory runs out.

    Where users share their items, it is for a few of these at a time too.

    Args:
        pairs: So many at a time, on each kind of device.
        retry: Try with fewer; else running out of memory is an error, for a model that somebody watches.
    """

    def __init__(self, pairs: Mapping[str, int], retry: bool = True):
        self._pairs = pairs
        self._retry = retry
        self._most: float = math.inf  # users at a time, of those for whom memory sufficed

    def __call__(self, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Compute the results for all users, one after the other.

        Args:
            compute: Takes the tensors, B rows each, to results (B, C) or (B, C, ...). Shared items come as (1, C).
            tensors: Their rows are users; the last one is their items (B, C). Users share them where it repeats one
                row in memory, as ``Tensor.expand`` does.

        Raises:
            MemoryError, RuntimeError: out of memory for a single user.
        """
        *of_users, items = tensors
        kind, (nb_users, nb_items) = items.device.type, items.shape
        shared = nb_users == 1 or items.stride(0) == 0
        # Tiles are of one width: the last one overlaps the one before.
        width = -(-nb_items // -(-nb_items // ITEMS_AT_ONCE[kind])) if shared else nb_items
        results, start = None, 0
        while start < nb_users:
            users = max(1, min(self._pairs[kind] // width, self._most))
            part = [tensor[start : start + users] for tensor in of_users]
            rows = items[:1] if shared else items[start : start + users]
            try:
                for left in range(0, nb_items, width):
                    left = min(left, nb_items - width)
                    values = compute(*part, rows[:, left : left + width])
                    if results is None:
                        results = values.new_empty(*items.shape, *values.shape[2:])
                    results[start : start + users, left : left + width] = values
                    # Memory that is given back whole is used again for the next part, while it still is in the cache.
                    del values
            except MEMORY_ERRORS as error:
                if not self._retry:
                    raise
                self._most = fewer_users(min(users, nb_users - start), error)
                continue
            start += users
        return results


def fewer_users(users: int, error: Exception) -> int:
    """Half as many users at a time, after running out of memory; raises any other error again, and for one user."""
    if users == 1 or not is_out_of_memory(error):
        raise error
    log.warning("out of memory with %d users at a time: going on with %d", users, users // 2)
    return users // 2


def for_one_shape(compute: Computation) -> Computation:
    """A function of tensors, compiled for the shapes of its first call; with others it runs as it is."""
    compiled, known = torch.compile(compute, dynamic=False, fullgraph=True), []

    @functools.wraps(compute)
    def call(*tensors: Tensor) -> Tensor | list[Tensor]:
        shapes = [tensor.shape for tensor in tensors]
        known[:] = known or shapes
        return (compiled if shapes == known else compute)(*tensors)

    return call
