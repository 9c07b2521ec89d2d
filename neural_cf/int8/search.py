"""The cheapest quantization that keeps HR@k and NDCG@k within a budget, chosen by some users to report on the others.

Settings are tried from the cheapest to the dearest, all of them with 8-bit tables and a scale per output feature of
weights and of activations. The first are all in 8 bits. The next has the last layer in float, and more bits where they
cost no product of matrices: in what that layer reads, and in the first layer, which is computed once for every user and
item. The last have more bits in what other layers read, each at the cost of a second product. All of them can be
computed in integers. Ranges come first: every layer's are found by the clip mode that least changes how far the logits
of a user's best items are apart.
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

# A fifth of the users tells losses of a tenth of a point of NDCG apart on ml-1m. More than this takes long.
CALIBRATION_SHARE, MOST_CALIBRATION_USERS = 0.2, 2000
LISTS = 5  # of candidates for each of them: fresh negatives tell more about a user than her one list does
TUNING_USERS = 100  # whose logits are compared, of so many times k items: a list's place is among them
TUNING_ITEMS = 5
CLIP_MODES = [
    mode for mode in ClipMode if mode is not ClipMode.N_STD
]  # which has a number of its own to choose
# asym_u is the best of the modes on ml-1m; the others cost nothing.
BASE = {"mode": "asym_u", "per_channel_wts": True, "per_channel_acts": True, "embedding_bits": 8}
MORE_BITS = 12  # a 256th of 8 bits' error; of inputs and weights too, 32 bits hold the sums of their products
WIDE = {"bits_activations": MORE_BITS, "clip_acts": ClipMode.NONE}  # of more bits, and so of the whole range
POINT = 0.01  # of HR or NDCG


@dataclass(frozen=True)
class Setting:
    """A way to quantize.

    Attributes:
        name: What is special about it.
        split_final: Whether the model's final layer is split.
        arguments: Of ``PostTrainLinearQuantizer``, but for the statistics.
    """

    name: str
    split_final: bool
    arguments: dict[str, Any]


class Estimate(NamedTuple):
    """A mean over users and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Trial:
    """What a setting costs the calibration users.

    Attributes:
        setting: That was tried.
        metrics: Over their lists.
        hr_loss: What HR@k loses to the float model, in points.
        ndcg_loss: Likewise NDCG@k.
        in_integers: Whether the model can be computed in integers.
    """

    setting: Setting
    metrics: Metrics
    hr_loss: Estimate
    ndcg_loss: Estimate
    in_integers: bool

    @property
    def loss(self) -> float:
        """What counts against the budget: what NDCG@k loses, and a standard error more, or HR@k, and one less.

        HR@k changes with the few users whose item crosses one rank: its error is twice that of NDCG@k, and larger than
        any budget of interest. What harms rankings shows in NDCG@k.
        """
        return max(self.hr_loss.mean - self.hr_loss.error, self.ndcg_loss.mean + self.ndcg_loss.error)

    def __str__(self) -> str:
        how = "" if self.in_integers else ", only simulated"
        return f"{self.setting.name}{how}: {self.metrics}, loses {self.hr_loss} and {self.ndcg_loss} points"


def nb_calibration_users(split: Split) -> int:
    """How many users, the first ones, settings are chosen by."""
    return max(1, min(round(CALIBRATION_SHARE * split.nb_users), MOST_CALIBRATION_USERS))


def calibration_lists(split: Split, seed: int) -> list[Split]:
    """The calibration users with their candidates, then ``LISTS`` - 1 times with fresh negatives."""
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
    """Tries settings on the calibration users.

    Args:
        models: In float, without and with a split final layer, on ``device``.
        statistics: Calibrated on these users, of both.
        lists: The users' candidates.
        k: Of HR@k and NDCG@k.
        device: The models'.
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
        """Try settings until one of them loses no more than ``max_loss`` points."""
        for setting in self.settings():
            trial = self._try(setting)
            yield trial
            if trial.loss <= max_loss:
                return

    def quantizer(self, setting: Setting, **changes: Any) -> PostTrainLinearQuantizer:
        """A setting's quantizer, with changes to its arguments; the model is a copy, and prepared."""
        quantizer = PostTrainLinearQuantizer(
            copy.deepcopy(self.models[setting.split_final]),
            model_activation_stats=self.statistics[setting.split_final],
            **setting.arguments | changes,
        )
        quantizer.prepare_model(dummy_input(self.device))
        return quantizer

    def settings(self) -> Iterator[Setting]:
        """From the cheapest to the dearest."""
        in_8_bits = (
            Setting("final layer not split", False, BASE),
            Setting("concatenation that keeps scales", False, BASE | {"scaled_concat": True}),
            Setting("split final layer", True, BASE),
        )
        for setting in in_8_bits:
            clips, errors = self._best_clips(setting)
            yield _with_changes(setting, clips)

        # Split, it reads each branch where it is, and needs no concatenation of floats.
        whole = in_8_bits[-1]
        *hidden, last = (f"mlp.{i}" for i in range(len(self.models[False].mlp)))
        changes = _changed(clips, ["final_mf", "final_mlp", "final_add", "sigmoid"], **IN_FLOAT)
        changes = _changed(changes, ["mlp_concat", "mf_mult", last], **WIDE)
        changes = _changed(changes, ["mlp.0"], bits_weights=MORE_BITS)
        name = f"split final layer in float, first layer of {MORE_BITS} bits"
        yield _with_changes(whole, changes, name)
        raised: list[str] = []
        for layer in sorted(hidden, key=errors.get, reverse=True):
            raised.append(layer)
            changes = _changed(changes, [layer], **WIDE)
            yield _with_changes(whole, changes, f"{name}, {MORE_BITS} bits out of {', '.join(raised)}")

    def _best_clips(self, whole: Setting) -> tuple[dict[str, dict], dict[str, float]]:
        """Every layer's clip mode, as changes, and the error that is left, both by the layer's name."""
        clips, errors = {}, {}
        for layer, entry in self.quantizer(whole).describe().items():
            # A sigmoid's range is [0, 1], and it is its input that is compared.
            if "clip_acts" in entry and layer != "sigmoid":
                found = {mode: self._error(whole, layer, mode) for mode in CLIP_MODES}
                best = min(found, key=found.get)
                clips[layer], errors[layer] = {"clip_acts": best}, found[best]
        return clips, errors

    def _error(self, setting: Setting, layer: str, clip: ClipMode) -> float:
        """How much quantizing one layer alone moves a user's best items past each other: a variance of logits."""
        overrides = {re.escape(layer): {"clip_acts": clip}, ".*": IN_FLOAT}
        model = self.quantizer(setting, overrides=overrides, embedding_bits=None).model
        changes = self._logits_of(model) - self._logits
        return (changes - changes.mean(1, keepdim=True)).square().mean().item()

    @torch.no_grad()
    def _logits_of(self, model: NeuMF) -> Tensor:
        """(users, items) float64."""
        users = self._users.repeat_interleave(self._items.shape[1])
        return model(users, self._items.flatten()).view(self._items.shape).double()

    def _try(self, setting: Setting) -> Trial:
        scorer = quantized_scorer(self.quantizer(setting))
        ranks = self._ranks_of(scorer)
        losses = [
            _estimate((gain(self._ranks) - gain(ranks)).mean(0) / POINT)
            for gain in (lambda ranks: (ranks < self._k).double(), partial(gains_of_ranks, k=self._k))
        ]
        metrics = metrics_of_ranks(ranks.flatten(), self._k)
        return Trial(setting, metrics, *losses, isinstance(scorer, IntegerNeuMF))

    def _ranks_of(self, scorer: Scorer) -> Tensor:
        """(lists, users) int64."""
        ranks = [rank_test_items(scorer, users, self._k, self.device) for users in self._lists]
        return torch.stack(ranks)


def _estimate(values: Tensor) -> Estimate:
    """Of (users,) float64; of one user, no error is known."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(values.mean().item(), error)


def _with_changes(setting: Setting, changes: Mapping[str, dict], name: str | None = None) -> Setting:
    """A setting with changes by layer, and with another name if there is one."""
    overrides = {re.escape(layer): of_layer for layer, of_layer in changes.items()}
    return replace(setting, name=name or setting.name, arguments=setting.arguments | {"overrides": overrides})


def _changed(changes: Mapping[str, dict], layers: Sequence[str], **more: Any) -> dict[str, dict]:
    """Changes by layer with more of them for some layers."""
    return {**changes, **{layer: changes.get(layer, {}) | more for layer in layers}}
