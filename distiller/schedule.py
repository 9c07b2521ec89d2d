"""The ``--compress`` file: which quantizer and which learning-rate schedulers act in which epochs. An example:

quantizers:
  aware:
    class: NCFQuantAwareTrainQuantizer
    bits_activations: 8
lr_schedulers:
  decay:
    class: ExponentialLR
    gamma: 0.5
policies:
  - quantizer: {instance_name: aware}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
  - lr_scheduler: {instance_name: decay}
    epochs: [1, 2]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from distiller.quantization.train_aware import NCFQuantAwareTrainQuantizer, is_quantization_aware
from distiller.system.cli import InputError
from distiller.untrusted.yaml import read_yaml

KINDS = {"quantizer": "quantizers", "lr_scheduler": "lr_schedulers"}
WHEN = {"starting_epoch", "ending_epoch", "frequency", "epochs"}
MAX_EPOCH = 1 << 31  # the largest number of epochs that can be trained
# What PyTorch's schedulers raise for arguments that they cannot use; NotImplementedError is a RuntimeError.
WRONG_ARGUMENTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
WRONG_ARGUMENTS += (AssertionError, RuntimeError)

Require = Callable[[bool, str], None]  # raises an ``InputError`` with the message unless the condition holds


@dataclass(frozen=True)
class Policy:
    """A quantizer or a scheduler of the file, by name, and the epochs in which it acts.

    Attributes:
        kind: "quantizer" or "lr_scheduler", the keys of ``KINDS``.
        instance: The name under which the file defines it.
        epochs: Epoch numbers in ascending order, counted from 0. A quantizer acts in all epochs from the first on.
    """

    kind: str
    instance: str
    epochs: Sequence[int]


class CompressionSchedule:
    """A schedule of quantization-aware training and learning-rate schedulers; the default does nothing.

    Args:
        quantizer: The arguments of ``NCFQuantAwareTrainQuantizer``; None for no quantization.
        schedulers: For each learning-rate scheduler by name, ``class`` (the name of a class in
            ``torch.optim.lr_scheduler``) and the arguments of that class.
        policies: The epochs in which the quantizer and the schedulers act.
    """

    def __init__(
        self,
        quantizer: Mapping[str, Any] | None = None,
        schedulers: Mapping[str, Mapping[str, Any]] | None = None,
        policies: Collection[Policy] = (),
    ):
        self.quantizer = quantizer
        self._arguments = dict(schedulers or {})
        self._policies = policies
        self._schedulers: dict[str, Any] = {}

    def epoch_begin(self, epoch: int, model: nn.Module) -> None:
        """Prepare the model for quantization-aware training, from the quantizer's first epoch on.

        Raises:
            InputError: the quantizer does not accept its arguments.
        """
        for policy in self._policies:
            if policy.kind == "quantizer" and epoch >= policy.epochs[0] and not is_quantization_aware(model):
                self._prepare(model)

    def check(self, model: nn.Module) -> None:
        """Prepare a copy of the model that is to be trained; raise an ``InputError`` if that fails."""
        if self.quantizer is not None:
            self._prepare(model)

    def _prepare(self, model: nn.Module) -> None:
        """Prepare the model with the quantizer, in whose errors the message names the flag and the section."""
        try:
            prepare_quantization_aware(model, self.quantizer)
        except InputError as error:
            raise InputError(f"--compress: quantizers: {error}") from error

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the learning-rate schedulers, which act on this optimizer.

        Raises:
            InputError: a scheduler does not accept its arguments.
        """
        for name, arguments in self._arguments.items():
            kind = getattr(lr_scheduler, arguments["class"])
            with _arguments_of(name):
                self._schedulers[name] = kind(
                    optimizer, **{key: value for key, value in arguments.items() if key != "class"}
                )

    def epoch_end(self, epoch: int, metric: float) -> None:
        """Step the schedulers whose policies include an epoch.

        Args:
            epoch: The number of the epoch that has ended.
            metric: The metric that ``ReduceLROnPlateau`` watches. Higher is better, so it needs ``mode: max``.

        Raises:
            InputError: a scheduler fails on its arguments, which some schedulers notice only here.
        """
        for policy in self._policies:
            if policy.kind == "lr_scheduler" and epoch in policy.epochs:
                scheduler = self._schedulers[policy.instance]
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                with _arguments_of(policy.instance):
                    scheduler.step(metric) if plateau else scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the learning-rate schedulers' states by name."""
        return {name: scheduler.state_dict() for name, scheduler in self._schedulers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; schedulers that it lacks start afresh.

        Raises:
            InputError: a state is that of another kind of scheduler.
        """
        for name in self._schedulers.keys() & state.keys():
            own = self._schedulers[name].state_dict()
            with _arguments_of(name):
                # PyTorch sets attributes of the scheduler from whatever the state holds.
                for key, value in dict(state[name]).items():
                    if not _alike(own[key], value):
                        raise ValueError(f"its saved {key} is another scheduler's")
                self._schedulers[name].load_state_dict(state[name])


def _alike(first: object, second: object) -> bool:
    """Return whether two values of a scheduler's state are of one kind; int, float and None count as one."""
    numbers = (int, float, NoneType)
    return type(first) is type(second) or (type(first) in numbers and type(second) in numbers)


@contextmanager
def _arguments_of(name: str) -> Iterator[None]:
    """Turn a scheduler's errors about its arguments into an ``InputError`` that names the scheduler."""
    try:
        yield
    except WRONG_ARGUMENTS as error:
        reason = str(error) or type(error).__name__
        raise InputError(" ".join(f"--compress: lr_schedulers: {name}: {reason}".split())) from error


def prepare_quantization_aware(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Prepare a model for quantization-aware training, or for the evaluation of a checkpoint from such training.

    Raises:
        InputError: the quantizer does not accept the arguments.
    """
    try:
        NCFQuantAwareTrainQuantizer(model, **arguments).prepare_model()
    except TypeError as error:
        raise InputError(" ".join(str(error).split())) from error


def _policy(entry: object, instances: Mapping[str, Mapping], require: Require) -> Policy:
    """Return the policy of an entry in the file, whose quantizer or scheduler must be among ``instances``."""
    kinds = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    require(len(kinds) == 1, f"policies: {entry}: not a map with one of {', '.join(KINDS)}")
    reference, when = entry[kinds[0]], {key: value for key, value in entry.items() if key != kinds[0]}
    name = reference.get("instance_name") if isinstance(reference, dict) else None
    require(
        isinstance(name, str) and name in instances[KINDS[kinds[0]]],
        f"policies: {name} is none of the file's {KINDS[kinds[0]]}",
    )
    listed = when.get("epochs") if isinstance(when.get("epochs"), list) else []
    numbers = [*listed, *(value for key, value in when.items() if key != "epochs")]
    whole = all(type(number) is int and 0 <= number <= MAX_EPOCH for number in numbers)
    require(
        when.keys() <= WHEN and whole,
        f"policies: {name}: takes {', '.join(sorted(WHEN))}, whole numbers up to {MAX_EPOCH}",
    )
    if "epochs" in when:
        require(
            isinstance(when["epochs"], list) and len(when) == 1, f"policies: {name}: epochs is a list, alone"
        )
        epochs: Sequence[int] = sorted(when["epochs"])
    else:
        require(
            "ending_epoch" in when and when.get("frequency", 1) > 0, f"policies: {name}: when does it end?"
        )
        epochs = range(when.get("starting_epoch", 0), when["ending_epoch"], when.get("frequency", 1))
    require(len(epochs) > 0, f"policies: {name}: no epoch in which it acts")
    return Policy(kinds[0], name, epochs)


def _is_scheduler(kind: object) -> bool:
    """Return whether an attribute of ``lr_scheduler`` is a scheduler's class, other than their common base."""
    base = lr_scheduler.LRScheduler
    return isinstance(kind, type) and issubclass(kind, base) and kind is not base


def load_schedule(path: str | os.PathLike) -> CompressionSchedule:
    """Read a ``--compress`` file, with the safe YAML loader.

    Raises:
        InputError: the file does not have the form shown at the top of this module; the message names the part.
        OSError: the file cannot be read.
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(" ".join(f"--compress: {path}: {message}".split()))

    content = read_yaml(path, "--compress")
    require(isinstance(content, dict) and content.keys() <= {*KINDS.values(), "policies"}, "not a schedule")
    instances = _instances(content, require)
    entries = content.get("policies") or []
    require(isinstance(entries, list), "policies: not a list")
    policies = [_policy(entry, instances, require) for entry in entries]
    used = {(KINDS[policy.kind], policy.instance) for policy in policies}
    for section, named in instances.items():
        for name in named:
            require((section, name) in used, f"{section}: {name} is in no policy")
    quantizer = next(iter(instances["quantizers"].values()), None)
    if quantizer is not None:
        quantizer = {key: value for key, value in quantizer.items() if key != "class"}
    return CompressionSchedule(quantizer, instances["lr_schedulers"], policies)


def _instances(content: Mapping[str, Any], require: Require) -> dict[str, dict]:
    """Return the quantizers and schedulers that the file defines, as maps from name to arguments by section."""
    instances: dict[str, dict] = {}
    for section in KINDS.values():
        instances[section] = content.get(section) or {}
        require(isinstance(instances[section], dict), f"{section}: not a map of instances")
        for name, arguments in instances[section].items():
            require(
                isinstance(arguments, dict) and "class" in arguments, f"{section}: {name}: it has no class"
            )
    require(len(instances["quantizers"]) <= 1, "more than one quantizer")
    for name, arguments in instances["quantizers"].items():
        expected = NCFQuantAwareTrainQuantizer.__name__
        require(arguments["class"] == expected, f"quantizers: {name}: its class is not {expected}")
    for name, arguments in instances["lr_schedulers"].items():
        kind = str(arguments["class"])
        known = _is_scheduler(getattr(lr_scheduler, kind, None)) and not kind.startswith("_")
        require(known, f"lr_schedulers: {name}: PyTorch has no {kind}")
    return instances
