"""The search for the cheapest quantization that keeps hit rate (HR@k) and NDCG@k within a budget.

Some users choose, so that metrics can be reported on the others. Settings are tried from the cheapest to the dearest:

1. Everything in 8 bits, with three ways to compute the final layer.
2. The final layer in float, and more bits where they cost no matrix product: in the inputs of that layer, and in the
   first layer, which is computed once for every user and item.
3. More bits in the inputs of the other layers, one after the other, each at the cost of a second matrix product.

All of them have 8-bit embedding tables and a scale per output feature of weights and of activations, and all can be
computed in integers. Each layer's clip mode is the one that least changes the differences between the logits of a
user's best items.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distiller.quantization import ClipMode, PostTrainLinearQuantizer
from distiller.quantization.configuration import IN_FLOAT
from distiller.quantization.statistics import Statistics
from neural_cf.data.negatives import UnseenItems
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.int8.scorer import quantized_scorer
from neural_cf.model import NeuMF
from neural_cf.ranking.candidates import candidate_items
from neural_cf.ranking.metrics import Metrics, gains_of_ranks, metrics_of_ranks
from neural_cf.ranking.places import rank_test_items
from neural_cf.ranking.scorers import Scorer, float_scorer
from neural_cf.runs.models import dummy_input
from neural_cf.split import Split

# On ml-1m, a fifth of the users is enough to see a loss of a tenth of a point of NDCG. More than 2000 take long.
CALIBRATION_SHARE, MOST_CALIBRATION_USERS = 0.2, 2000
LISTS = 5  # of candidates for each calibration user: fresh negatives tell more than the split's one list
# The logits of this many users are compared, each on TUNING_ITEMS * k best items: the top k are decided among these.
TUNING_USERS, TUNING_ITEMS = 100, 5
CLIP_MODES = [mode for mode in ClipMode if mode is not ClipMode.N_STD]  # N_STD has a parameter to choose
# asym_u is the best mode on ml-1m; the other arguments cost nothing.
BASE = {"mode": "asym_u", "per_channel_wts": True, "per_channel_acts": True, "embedding_bits": 8}
# A 256th of the squared error of 8 bits. Even with inputs and weights of 12 bits, 32 bits hold the sums of products.
MORE_BITS = 12
WIDE = {"bits_activations": MORE_BITS, "clip_acts": ClipMode.NONE}  # enough bits for the whole range
POINT = 0.01  # a point of HR or NDCG, which are in [0, 1]


@dataclass(frozen=True)
class Setting:
    """A way to quantize a model.

    Attributes:
        name: Words that tell it from the other settings.
        split_final: Whether the model has a split final layer.
        arguments: Arguments of ``PostTrainLinearQuantizer``, apart from the statistics.
    """

    name: str
    split_final: bool
    arguments: dict[str, Any]


class Estimate(NamedTuple):
    """A mean over users with its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Trial:
    """The result of trying a setting on the calibration users.

    Attributes:
        setting: The setting that was tried.
        metrics: Metrics of the quantized model over all lists of the calibration users.
        hr_loss: HR@k of the float model minus HR@k of the quantized model, in points.
        ndcg_loss: NDCG@k of the float model minus NDCG@k of the quantized model, in points.
        in_integers: Whether the quantized model can be computed in integers.
    """

    setting: Setting
    metrics: Metrics
    hr_loss: Estimate
    ndcg_loss: Estimate
    in_integers: bool

    @property
    def loss(self) -> float:
        """Return the loss in points that counts against the budget.

        It is the larger of NDCG@k's loss plus its standard error and HR@k's loss minus its standard error. HR@k changes
        only with the few users whose test item crosses rank k. Its standard error is twice that of NDCG@k and larger
        than any budget of interest, but damage to rankings shows in NDCG@k.
        """
        return max(self.hr_loss.mean - self.hr_loss.error, self.ndcg_loss.mean + self.ndcg_loss.error)

    def __str__(self) -> str:
        how = "" if self.in_integers else ", only simulated"
        return f"{self.setting.name}{how}: {self.metrics}, loses {self.hr_loss} and {self.ndcg_loss} points"


def nb_calibration_users(split: Split) -> int:
    """Return how many users settings are chosen by: the first ones of the split."""
    return max(1, min(round(CALIBRATION_SHARE * split.nb_users), MOST_CALIBRATION_USERS))


def calibration_lists(split: Split, seed: int) -> list[Split]:
    """Return the calibration users with their candidates, then ``LISTS`` - 1 times with fresh negatives."""
    nb_users = nb_calibration_users(split)
    unseen = UnseenItems(split.train_users, split.train_items, split.nb_users, split.nb_items)
    generator = torch.Generator().manual_seed(seed)
    users = torch.arange(nb_users).repeat_interleave(split.nb_candidates - 1)
    lists = [replace(split, nb_users=nb_users)]
    for _ in range(1, LISTS):
        share = torch.rand(len(users), generator=generator, dtype=torch.float64)
        ranks = (share * unseen.counts[users]).long()
        lists.append(replace(lists[0], negatives=unseen.item(users, ranks).view(nb_users, -1).numpy()))
    return lists


class Chooser:
    """A search for a quantization of one model, which tries settings on the calibration users.

    Attributes:
        in_float: Metrics of the float model over all lists.

    Args:
        models: The float model on ``device``, by whether its final layer is split.
        statistics: Calibration statistics of both models, from the calibration users.
        lists: The calibration users with their candidates, as ``calibration_lists`` returns them.
        k: The k of HR@k and NDCG@k.
        device: The device of the models.
    """

    def __init__(
        self,
        models: Mapping[bool, NeuMF],
        statistics: Mapping[bool, Statistics],
        lists: Sequence[Split],
        k: int,
        device: torch.device,
    ):
        self.models, self.statistics = models, statistics
        self._lists, self._k, self.device = lists, k, device
        self._ranks = self._ranks_of(float_scorer(models[False]))
        self.in_float = metrics_of_ranks(self._ranks.flatten(), k)
        sample = lists[0]
        self._users = torch.arange(min(TUNING_USERS, sample.nb_users), device=device)
        self._items = candidate_items(sample, 0, len(self._users)).to(device)
        best = self._logits_of(models[False]).topk(min(TUNING_ITEMS * k, sample.nb_candidates), dim=1)
        self._items, self._logits = self._items.gather(1, best.indices), best.values

    def choose(self, max_loss: float) -> Iterator[Trial]:
        """Yield the trials of settings, up to the first one that loses at most ``max_loss`` points."""
        for setting in self.settings():
            trial = self._try(setting)
            yield trial
            if trial.loss <= max_loss:
                return

    def quantizer(self, setting: Setting, **changes: Any) -> PostTrainLinearQuantizer:
        """Return a quantizer of a setting, with ``changes`` to it, that has prepared a copy of the model."""
        quantizer = PostTrainLinearQuantizer(
            copy.deepcopy(self.models[setting.split_final]),
            model_activation_stats=self.statistics[setting.split_final],
            **setting.arguments | changes,
        )
        quantizer.prepare_model(dummy_input(self.device))
        return quantizer

    def settings(self) -> Iterator[Setting]:
        """Yield all settings from the cheapest to the dearest."""
        in_8_bits = (
            Setting("final layer not split", False, BASE),
            Setting("concatenation that keeps scales", False, BASE | {"scaled_concat": True}),
            Setting("split final layer", True, BASE),
        )
        for setting in in_8_bits:
            clips, errors = self._best_clips(setting)
            yield _with_changes(setting, clips)

        # A final layer in float is cheapest when it is split: each half reads its branch, and nothing is concatenated.
        base = in_8_bits[-1]
        *hidden, last = (f"mlp.{i}" for i in range(len(self.models[False].mlp)))
        changes = _changed(clips, ["final_mf", "final_mlp", "final_add", "sigmoid"], **IN_FLOAT)
        changes = _changed(changes, ["mlp_concat", "mf_mult", last], **WIDE)
        changes = _changed(changes, ["mlp.0"], bits_weights=MORE_BITS)
        name = f"split final layer in float, first layer of {MORE_BITS} bits"
        yield _with_changes(base, changes, name)
        raised: list[str] = []
        for layer in sorted(hidden, key=errors.get, reverse=True):
            raised.append(layer)
            changes = _changed(changes, [layer], **WIDE)
            yield _with_changes(base, changes, f"{name}, {MORE_BITS} bits out of {', '.join(raised)}")

    def _best_clips(self, setting: Setting) -> tuple[dict[str, dict], dict[str, float]]:
        """Return each layer's best clip mode, as changes, and the error with it, both by layer name."""
        clips, errors = {}, {}
        for layer, entry in self.quantizer(setting).describe().items():
            # The sigmoid's range is always [0, 1], and its input, the logit, is what is compared.
            if "clip_acts" in entry and layer != "sigmoid":
                found = {mode: self._error(setting, layer, mode) for mode in CLIP_MODES}
                best = min(found, key=found.get)
                clips[layer], errors[layer] = {"clip_acts": best}, found[best]
        return clips, errors

    def _error(self, setting: Setting, layer: str, clip: ClipMode) -> float:
        """Return how much quantizing one layer shifts the logits of a user's best items against each other.

        It is the variance of the shifts over a user's items, averaged over users.
        """
        overrides = {re.escape(layer): {"clip_acts": clip}, ".*": IN_FLOAT}
        model = self.quantizer(setting, overrides=overrides, embedding_bits=None).model
        changes = self._logits_of(model) - self._logits
        return (changes - changes.mean(1, keepdim=True)).square().mean().item()

    @torch.no_grad()
    def _logits_of(self, model: NeuMF) -> Tensor:
        """Return a model's logits, (users, items) float64, of the items that are compared."""
        users = self._users.repeat_interleave(self._items.shape[1])
        return model(users, self._items.flatten()).view(self._items.shape).double()

    def _try(self, setting: Setting) -> Trial:
        """Quantize with a setting and measure what it loses to the float model."""
        scorer = quantized_scorer(self.quantizer(setting))
        ranks = self._ranks_of(scorer)
        losses = [
            _estimate((gain(self._ranks) - gain(ranks)).mean(0) / POINT)
            for gain in (lambda ranks: (ranks < self._k).double(), partial(gains_of_ranks, k=self._k))
        ]
        metrics = metrics_of_ranks(ranks.flatten(), self._k)
        return Trial(setting, metrics, *losses, isinstance(scorer, IntegerNeuMF))

    def _ranks_of(self, scorer: Scorer) -> Tensor:
        """Return the ranks of the test items, (lists, users) int64."""
        ranks = [rank_test_items(scorer, users, self._k, self.device) for users in self._lists]
        return torch.stack(ranks)


def _estimate(values: Tensor) -> Estimate:
    """Return the mean of (users,) float64 and its standard error, which is 0 for a single user."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(values.mean().item(), error)


def _with_changes(setting: Setting, changes: Mapping[str, dict], name: str | None = None) -> Setting:
    """Return a setting with changes by layer as its overrides, and with another name if one is given."""
    overrides = {re.escape(layer): of_layer for layer, of_layer in changes.items()}
    return replace(setting, name=name or setting.name, arguments=setting.arguments | {"overrides": overrides})


def _changed(changes: Mapping[str, dict], layers: Sequence[str], **more: Any) -> dict[str, dict]:
    """Return changes by layer with ``more`` changes for some of the layers."""
    return {**changes, **{layer: changes.get(layer, {}) | more for layer in layers}}
