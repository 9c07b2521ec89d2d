"""Scorers: functions that give items their scores for users, with a float model or simulated quantization.

Shapes: B users, C items of each, N = B * C pairs, I items in all, L_0 .. L_n = mlp_layer_sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.train_aware import is_quantization_aware
from distiller.system.cli import InputError
from neural_cf.model import NeuMF
from neural_cf.ranking.blocks import COMPILED_PAIRS_AT_ONCE, PAIRS_AT_ONCE, InParts, for_one_shape

# A function from users (B,) int64 and items (B, C) int64 to probabilities (B, C).
Scorer = Callable[[Tensor, Tensor], Tensor]


def check_finite_scores(scores: Tensor) -> None:
    """Raise an ``InputError`` where a score is not finite, so that it has no rank."""
    if not torch.isfinite(scores).all():
        raise InputError("the model's scores are not finite: its weights are damaged or training diverged")


def sum_of_sides(item_sums: Tensor, items: Tensor, user_sums: Tensor) -> Tensor:
    """Return the first layer's sums of pairs: each is the sum of its user's part and its item's part.

    Args:
        item_sums: (I, L_1), the parts of all items.
        items: (B, C) int64, the users' items, or (1, C) where all users share them.
        user_sums: (B, L_1), the parts of the users.

    Returns:
        (N, L_1), one user's pairs after the other's.
    """
    sums = item_sums.index_select(0, items.flatten()).view(*items.shape, -1)
    own = len(items) == len(user_sums)
    sums = sums.add_(user_sums[:, None]) if own else sums + user_sums[:, None]
    return sums.flatten(0, 1)


class PairScorer:
    """A scorer that calls the model on pairs of user and item, as training does.

    Args:
        model: A model that is called as ``model(users, items, sigmoid=True)`` on (N,) int64 each. It is put into
            evaluation mode.
        one_user: Whether a batch is always the items of one user, for a model whose arithmetic depends on the whole
            batch.
        retry: Whether to go on with smaller batches where memory runs out, as in ``InParts``.
    """

    def __init__(self, model: nn.Module, one_user: bool = False, retry: bool = True):
        self._model = model.eval()
        self._one_user = one_user
        self._parts = InParts(PAIRS_AT_ONCE, retry)

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities (B, C) of items (B, C) int64 for users (B,) int64."""
        if self._one_user:
            rows = zip(users.split(1), items.split(1), strict=True)
            return torch.cat([self._scores(user, row) for user, row in rows])
        return self._parts(self._scores, users, items)

    def _scores(self, users: Tensor, items: Tensor) -> Tensor:
        items = items.expand(len(users), -1)
        pairs = users.repeat_interleave(items.shape[1]), items.flatten()
        return self._model(*pairs, sigmoid=True).view(items.shape)


class FactoredScorer:
    """A scorer that computes once per user or per item what depends on one of them only, not once per pair.

    The first layer acts on [user, item], so that its output is the sum of a user's part and an item's part. The final
    layer's weights of the product of embeddings are multiplied into the user's embedding. Results are the model's up
    to rounding.

    Args:
        model: A float NeuMF. The items' parts are computed here, so that new weights need a new scorer.
        dtype: The dtype of the matrix products between the first layer and the final one; by default that of the
            weights.
        compiled: Whether to compute with ``torch.compile``, for as many users and items as the first call has.
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
        self.compiled = compiled
        self._compute = for_one_shape(self._scores) if compiled else self._scores
        self._parts = InParts(COMPILED_PAIRS_AT_ONCE if compiled else PAIRS_AT_ONCE)

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities (B, C), in the weights' dtype, of items (B, C) int64 for users (B,) int64."""
        user_sums = F.linear(self._model.mlp_user_embed(users), self._user_weight, self._model.mlp[0].bias)
        user_factors = self._model.mf_user_embed(users) * self._mf_weight
        return self._parts(self._compute, user_sums, user_factors, items)

    def _scores(self, user_sums: Tensor, user_factors: Tensor, items: Tensor) -> Tensor:
        logit = (self._hidden(user_sums, items) @ self._mlp_weight).view(len(user_sums), -1)
        product = torch.matmul(self._model.mf_item_embed(items), user_factors[:, :, None])
        return logit.add_(product[:, :, 0]).add_(self._final_bias).sigmoid_()

    def _hidden(self, user_sums: Tensor, items: Tensor) -> Tensor:
        """Return the output of the last hidden layer, (N, L_n), in the weights' dtype."""
        hidden = sum_of_sides(self._item_sums, items, user_sums).relu_()
        for weight, bias in self._later:
            hidden = F.linear(hidden.to(self._dtype), weight, bias).relu_()
        return hidden.to(user_sums.dtype)


def float_scorer(model: NeuMF, dtype: torch.dtype | None = None, compiled: bool = False) -> Scorer:
    """Return the scorer of a model that is not quantized.

    That is a ``FactoredScorer`` where the model has an MLP, unless it is quantization-aware and rounds the sums.

    Args:
        model: A NeuMF.
        dtype: The dtype of matrix products, as in ``FactoredScorer``.
        compiled: Whether to compute with ``torch.compile``, as in ``FactoredScorer``.
    """
    if is_quantization_aware(model) or not model.mlp:
        return PairScorer(model)
    return FactoredScorer(model, dtype, compiled)
