"""Scores of items for users, from a float model or a simulated one.

Shapes: B users, C items of each, N = B * C pairs, I items in all, F = mf_dim, L_0 .. L_n = mlp_layer_sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.train_aware import is_quantization_aware
from distiller.system.cli import InputError
from neural_cf.model import NeuMF
from neural_cf.ranking.blocks import (
    COMPILED_PAIRS_AT_ONCE,
    PAIRS_AT_ONCE,
    InParts,
    for_one_shape,
)

# From users (B,) int64 and items (B, C) int64 to probabilities (B, C).
Scorer = Callable[[Tensor, Tensor], Tensor]


def check_finite_scores(scores: Tensor) -> None:
    """Raise an ``InputError`` where a score is not finite, so that it has no rank."""
    if not torch.isfinite(scores).all():
        raise InputError("the model's scores are not finite: its weights are damaged or training diverged")


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
