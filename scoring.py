"""Scores of items for users, from a float model or a simulated one.

Shapes: B users, C items of each, N = B * C pairs, I items in all, F = mf_dim, L_0 .. L_n = mlp_layer_sizes.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.cli import InputError
from distiller.memory import MEMORY_ERRORS, is_out_of_memory
from distiller.quantization.train_aware import is_quantization_aware
from neumf import NeuMF

# From users (B,) int64 and items (B, C) int64 to probabilities (B, C).
Scorer = Callable[[Tensor, Tensor], Tensor]


class Candidates(NamedTuple):
    """What a block of users' test items are ranked against, with scores; each row's last item is the test item.

    Attributes:
        items: (B, C) int64.
        scores: (B, C).
        counted: (B, C) bool: what is ranked, each item once in a row at most, the test item once.
    """

    items: Tensor
    scores: Tensor
    counted: Tensor


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


def check_finite_scores(scores: Tensor) -> None:
    """Raise an ``InputError`` where a score is not finite, so that it has no rank."""
    if not torch.isfinite(scores).all():
        raise InputError("the model's scores are not finite: its weights are damaged or training diverged")


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


def sum_of_sides(item_sums: Tensor, items: Tensor, user_sums: Tensor) -> Tensor:
    """The first layer's sums of pairs, (N, L_1), from (I, L_1) of all items and (B, L_1) of users.

    Args:
        item_sums: Of all items.
        items: (B, C) int64, or (1, C) of all users.
        user_sums: Of the users.
    """
    sums = item_sums.index_select(0, items.flatten()).view(*items.shape, -1)
    own = len(items) == len(user_sums)
    sums = sums.add_(user_sums[:, None]) if own else sums + user_sums[:, None]
    return sums.flatten(0, 1)


def for_one_shape(compute: Computation) -> Computation:
    """A function of tensors, compiled for the shapes of its first call; with others it runs as it is."""
    compiled, known = torch.compile(compute, dynamic=False, fullgraph=True), []

    @functools.wraps(compute)
    def call(*tensors: Tensor) -> Tensor | list[Tensor]:
        shapes = [tensor.shape for tensor in tensors]
        known[:] = known or shapes
        return (compiled if shapes == known else compute)(*tensors)

    return call


class PairScorer:
    """Calls a model on pairs.

    Args:
        model: Called as ``model(users, items, sigmoid=True)`` on (N,) int64 each; put into evaluation mode.
        one_user: A call is of one user's items, for a model whose arithmetic depends on the whole batch.
        retry: As for ``InParts``.
    """

    def __init__(self, model: nn.Module, one_user: bool = False, retry: bool = True):
        self._model = model.eval()
        self._one_user = one_user
        self._parts = InParts(PAIRS_AT_ONCE, retry)

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """The probabilities (B, C) of items (B, C) int64 for users (B,) int64."""
        if self._one_user:
            rows = zip(users.split(1), items.split(1), strict=True)
            return torch.cat([self._scores(user, row) for user, row in rows])
        return self._parts(self._scores, users, items)

    def _scores(self, users: Tensor, items: Tensor) -> Tensor:
        items = items.expand(len(users), -1)
        pairs = users.repeat_interleave(items.shape[1]), items.flatten()
        return self._model(*pairs, sigmoid=True).view(items.shape)


class FactoredScorer:
    """What the model computes, up to rounding, without computing for every pair what belongs to one side of it.

    The first layer acts on [user, item], so that its sum is one of the user plus one of the item. The last layer's
    weights of the product of embeddings go to the user's side too.

    Args:
        model: A float NeuMF, whose weights are those of this moment.
        dtype: Of the matrix products between the first layer and the last; the weights' own by default.
        compiled: Compute with ``torch.compile``, for as many users and items as the first call has.
    """

    @torch.no_grad()
    def __init__(self, model: NeuMF, dtype: torch.dtype | None = None, compiled: bool = False):
        self._model = model
        self._dtype = dtype or model.mlp[0].weight.dtype
        self._user_weight, item_weight = model.mlp[0].weight.chunk(2, dim=1)
        self._item_sums = F.linear(model.mlp_item_embed.weight, item_weight)  # (I, L_1)
        self._later = [
            (linear.weight.to(self._dtype), linear.bias.to(self._dtype)) for linear in model.mlp[1:]
        ]
        if model.split_final:
            self._final_bias = model.final_mf.bias + model.final_mlp.bias
            self._mf_weight, self._mlp_weight = model.final_mf.weight[0], model.final_mlp.weight[0]
        else:
            self._final_bias = model.final.bias
            mf_dim = model.mf_item_embed.weight.shape[1]
            self._mf_weight, self._mlp_weight = model.final.weight[0].tensor_split([mf_dim])
        self._compute = for_one_shape(self._scores) if compiled else self._scores
        self._parts = InParts(COMPILED_PAIRS_AT_ONCE if compiled else PAIRS_AT_ONCE)

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """The probabilities (B, C), in the weights' dtype, of items (B, C) int64 for users (B,) int64."""
        user_sums = F.linear(self._model.mlp_user_embed(users), self._user_weight, self._model.mlp[0].bias)
        user_factors = self._model.mf_user_embed(users) * self._mf_weight
        return self._parts(self._compute, user_sums, user_factors, items)

    def _scores(self, user_sums: Tensor, user_factors: Tensor, items: Tensor) -> Tensor:
        logit = (self._hidden(user_sums, items) @ self._mlp_weight).view(len(user_sums), -1)
        product = torch.matmul(self._model.mf_item_embed(items), user_factors[:, :, None])
        return logit.add_(product[:, :, 0]).add_(self._final_bias).sigmoid_()

    def _hidden(self, user_sums: Tensor, items: Tensor) -> Tensor:
        """What the last ReLU puts out: (N, L_n), in the weights' dtype."""
        hidden = sum_of_sides(self._item_sums, items, user_sums).relu_()
        for weight, bias in self._later:
            hidden = F.linear(hidden.to(self._dtype), weight, bias).relu_()
        return hidden.to(user_sums.dtype)


def float_scorer(model: NeuMF, dtype: torch.dtype | None = None, compiled: bool = False) -> Scorer:
    """What scores with a model that is not quantized: factored, where it has a first layer that nothing rounds.

    Args:
        model: A NeuMF.
        dtype: As for ``FactoredScorer``.
        compiled: Likewise.
    """
    if is_quantization_aware(model) or not model.mlp:
        return PairScorer(model)
    return FactoredScorer(model, dtype, compiled)
