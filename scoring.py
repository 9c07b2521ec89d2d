"""Scores of items for users, from a float model or a simulated one.

Shapes: B users, C items of each, N = B * C pairs, I items in all, F = mf_dim, L_0 .. L_n = mlp_layer_sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.train_aware import is_quantization_aware
from neumf import NeuMF

# From users (B,) int64 and items (B, C) int64 to probabilities (B, C).
Scorer = Callable[[Tensor, Tensor], Tensor]

Computation = TypeVar("Computation", bound=Callable)

# Pairs computed with at once. The published model's widest activations, 4000 x 256 float32, then take 4 MB and stay in
# the cache between layers: with four times as many, two Xeon cores scored 15 % fewer pairs a second in FP32 and 37 %
# fewer in simulated INT8 (ml-1m, medians of 3 passes, 2026-11-23). Compiled layers leave no such activations.
# A GPU has no such cache, and wants few trips from the host.
PAIRS_AT_ONCE = {"cpu": 4_000, "cuda": 250_000}
COMPILED_PAIRS_AT_ONCE = PAIRS_AT_ONCE | {"cpu": 8_000}


def in_parts(compute: Callable[..., Tensor], pairs: Mapping[str, int], *tensors: Tensor) -> Tensor:
    """A function of tensors computed for a few users at a time.

    Args:
        compute: Takes the tensors, B rows each, to results of B rows.
        pairs: So many at a time, on each kind of device.
        tensors: Their rows are users; the last one is their items (B, C).

    Returns:
        The results for all users, one after the other.
    """
    items = tensors[-1]
    users = max(1, pairs[items.device.type] // items.shape[1])
    parts = zip(*(tensor.split(users) for tensor in tensors), strict=True)
    for start, part in zip(range(0, len(items), users), parts, strict=True):
        values = compute(*part)
        if not start:
            results = values.new_empty(len(items), *values.shape[1:])
        results[start : start + users] = values
        # Memory that is given back whole is used again for the next part, while it still is in the cache.
        del values
    return results


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
    """

    def __init__(self, model: nn.Module, one_user: bool = False):
        self._model = model.eval()
        self._pairs = dict.fromkeys(PAIRS_AT_ONCE, 1) if one_user else PAIRS_AT_ONCE

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """The probabilities (B, C) of items (B, C) int64 for users (B,) int64."""
        return in_parts(self._scores, self._pairs, users, items)

    def _scores(self, users: Tensor, items: Tensor) -> Tensor:
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
        self._pairs = COMPILED_PAIRS_AT_ONCE if compiled else PAIRS_AT_ONCE

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """The probabilities (B, C), in the weights' dtype, of items (B, C) int64 for users (B,) int64."""
        user_sums = F.linear(self._model.mlp_user_embed(users), self._user_weight, self._model.mlp[0].bias)
        user_factors = self._model.mf_user_embed(users) * self._mf_weight
        return in_parts(self._compute, self._pairs, user_sums, user_factors, items)

    def _scores(self, user_sums: Tensor, user_factors: Tensor, items: Tensor) -> Tensor:
        logit = (self._hidden(user_sums, items) @ self._mlp_weight).view(items.shape)
        product = torch.bmm(self._model.mf_item_embed(items), user_factors[:, :, None])
        return logit.add_(product[:, :, 0]).add_(self._final_bias).sigmoid_()

    def _hidden(self, user_sums: Tensor, items: Tensor) -> Tensor:
        """What the last ReLU puts out: (N, L_n), in the weights' dtype."""
        hidden = self._item_sums.index_select(0, items.flatten())
        hidden.view(*items.shape, -1).add_(user_sums[:, None]).relu_()
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
