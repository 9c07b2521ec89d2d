"""The ``--compress`` file: what it may say, when its instances act, and what ncf.py makes of it."""

from __future__ import annotations

import copy
import csv
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_ncf
from helpers_fuzz import no_hang
from helpers_quant import all_pairs, small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from distiller import schedule as schedule_module
from distiller.quantization.train_aware import is_quantization_aware, without_ranges
from distiller.schedule import CompressionSchedule, load_schedule
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("in_empty_directory")

AWARE = {"class": "NCFQuantAwareTrainQuantizer"}
TRAIN = ["--layers", "8", "6", "4", "-f", "4", "-s", "1", "-l", "0.01", "-b", "256"]
STEPS = 38  # an epoch at batches of 256: 1940 pairs and 4 negatives each
METRICS = re.compile(r"HR@10 = \d\.\d{4}, NDCG@10 = \d\.\d{4}")


def content(
    quantizer: dict | None = None, schedulers: dict | None = None, start: int = 0, end: int = 9
) -> dict:
    """A file that has the quantizer act from an epoch on, and every scheduler in all of the epochs."""
    result: dict = {"policies": []}
    if quantizer is not None:
        result["quantizers"] = {"aware": AWARE | quantizer}
        when = {"starting_epoch": start, "ending_epoch": end, "frequency": 1}
        result["policies"].append({"quantizer": {"instance_name": "aware"}, **when})
    if schedulers:
        result["lr_schedulers"] = schedulers
        for name in schedulers:
            when = {"starting_epoch": 0, "ending_epoch": end, "frequency": 1}
            result["policies"].append({"lr_scheduler": {"instance_name": name}, **when})
    return result


def written(value: object, name: str = "schedule.yaml") -> Path:
    """A file in the working directory, of text as it is or of anything as YAML."""
    path = Path(name)
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def loaded(value: object) -> CompressionSchedule:
    return load_schedule(written(value))


def optimizer_of(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def rates(schedule: CompressionSchedule, epochs: int, rate: float = 1.0, metrics: list | None = None) -> list:
    """The learning rate of each epoch."""
    optimizer = optimizer_of(rate)
    schedule.bind(optimizer)
    found = []
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.epoch_end(epoch, metrics[epoch] if metrics else 0.5)
    return found


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def same(first: object, second: object) -> bool:
    """Bit for bit, in dictionaries of dictionaries too."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if torch.is_tensor(first):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second


# --- the file ---

EXAMPLE = """
quantizers:
  aware:
    class: NCFQuantAwareTrainQuantizer
    bits_activations: 8
    bits_weights: 6
    bits_bias: 32
    mode: {activations: asym_u, weights: sym}
    ema_decay: 0.99
    per_channel_wts: true
    overrides:
      final.*: {bits_weights: 8}
lr_schedulers:
  decay:
    class: ExponentialLR
    gamma: 0.5
policies:
  - quantizer: {instance_name: aware}
    starting_epoch: 1
    ending_epoch: 3
    frequency: 1
  - lr_scheduler:
      instance_name: decay
    epochs: [1, 2]
"""


def test_good_file_loads():
    """All that it says."""
    schedule = loaded(EXAMPLE)
    assert schedule.quantizer == {
        "bits_activations": 8,
        "bits_weights": 6,
        "bits_bias": 32,
        "mode": {"activations": "asym_u", "weights": "sym"},
        "ema_decay": 0.99,
        "per_channel_wts": True,
        "overrides": {"final.*": {"bits_weights": 8}},
    }
    model = small_model(1)
    schedule.epoch_begin(0, model)
    assert not is_quantization_aware(model)
    schedule.epoch_begin(1, model)
    assert is_quantization_aware(model)
    assert rates(schedule, 5) == [1, 1, 0.5, 0.25, 0.25]


def test_example_of_the_module_is_a_good_file():
    """The one that the README points to."""
    example = schedule_module.__doc__.split("\n\n")[1]
    schedule = loaded(example)
    assert schedule.quantizer == {"bits_activations": 8}
    assert rates(schedule, 4) == [1, 1, 0.5, 0.25]


@pytest.mark.parametrize("text", ["{}", "policies: []", "quantizers: {}\nlr_schedulers:\npolicies:\n"])
def test_file_of_nothing_does_nothing(text):
    """Nor does the default."""
    model = small_model(1)
    for schedule in (loaded(text), CompressionSchedule()):
        schedule.epoch_begin(0, model)
        assert not is_quantization_aware(model)
        assert rates(schedule, 3) == [1, 1, 1]
        assert schedule.state_dict() == {}


def when(**epochs) -> dict:
    """A good file but for when its quantizer acts."""
    return content({}) | {"policies": [{"quantizer": {"instance_name": "aware"}, **epochs}]}


def named(name: object) -> dict:
    """A good file but for the instance that its policy names."""
    return content({}) | {"policies": [{"quantizer": {"instance_name": name}, "epochs": [0]}]}


MALFORMED = {
    "empty": "",
    "text": "compress it",
    "number": "8",
    "list": "- quantizers: {}",
    "not YAML": "quantizers: {aware: [",
    "tab": "quantizers:\n\taware: 1",
    "control character": "quantizers: \x00",
    "unknown alias": "quantizers: *aware",
    "two documents": "quantizers: {}\n---\npolicies: []",
    "bad date": "quantizers: {a: 2020-99-99}",
    "deeply nested": "[" * 5000,
    "python object": "quantizers: !!python/object/apply:os.mkdir [MARKER]",
    "python name": "quantizers: !!python/name:os.system",
    "unhashable key": "{[a]: b}",
    "unknown section": {"pruners": {}},
    "section is a list": {"quantizers": [AWARE]},
    "section is text": {"lr_schedulers": "StepLR"},
    "instance is text": {"quantizers": {"aware": "NCFQuantAwareTrainQuantizer"}},
    "instance is empty": {"quantizers": {"aware": None}},
    "quantizer without class": content({}) | {"quantizers": {"aware": {"bits_weights": 8}}},
    "scheduler without class": content(schedulers={"decay": {"gamma": 0.5}}),
    "unknown quantizer": content({}) | {"quantizers": {"aware": {"class": "QuantAwareTrainQuantizer"}}},
    "quantizer of post-training": content({})
    | {"quantizers": {"aware": {"class": "PostTrainLinearQuantizer"}}},
    "quantizer's class is a list": content({}) | {"quantizers": {"aware": {"class": ["a"]}}},
    "unknown scheduler": content(schedulers={"decay": {"class": "NoSuchLR"}}),
    "class that is no scheduler": content(schedulers={"decay": {"class": "Optimizer"}}),
    "scheduler's other name": content(schedulers={"decay": {"class": "_LRScheduler"}}),
    "function": content(schedulers={"decay": {"class": "warn"}}),
    "module's attribute": content(schedulers={"decay": {"class": "__builtins__"}}),
    "class that is a list": content(schedulers={"decay": {"class": ["StepLR"]}}),
    "class of two lines": content(schedulers={"decay": {"class": "Step\nLR"}}),
    "instance of two lines": content(schedulers={"de\ncay": {"class": "NoSuchLR"}}),
    "two quantizers": content({}) | {"quantizers": {"aware": AWARE, "other": AWARE}},
    "policies is a map": content({}) | {"policies": {"quantizer": {"instance_name": "aware"}}},
    "policies is text": content({}) | {"policies": "aware"},
    "policy is text": content({}) | {"policies": ["aware"]},
    "policy is empty": content({}) | {"policies": [None]},
    "policy of neither": content({}) | {"policies": [{"starting_epoch": 0, "ending_epoch": 2}]},
    "policy of a pruner": content({}) | {"policies": [{"pruner": {"instance_name": "aware"}, "epochs": [0]}]},
    "policy of both": content({}, {"decay": {"class": "ExponentialLR", "gamma": 0.5}})
    | {
        "policies": [
            {
                "quantizer": {"instance_name": "aware"},
                "lr_scheduler": {"instance_name": "decay"},
                "epochs": [0],
            }
        ]
    },
    "policy names no instance": content({}) | {"policies": [{"quantizer": {}, "epochs": [0]}]},
    "policy names as text": content({}) | {"policies": [{"quantizer": "aware", "epochs": [0]}]},
    "unknown instance": named("other"),
    "unknown instance of two lines": named("oth\ner"),
    "instance name is a list": named(["aware"]),
    "instance name is a map": named({"aware": 1}),
    "instance of the other section": content({})
    | {"policies": [{"lr_scheduler": {"instance_name": "aware"}, "epochs": [0]}]},
    "quantizer in no policy": content({}) | {"policies": []},
    "scheduler in no policy": content({})
    | {"lr_schedulers": {"decay": {"class": "ExponentialLR", "gamma": 0.5}}},
    "no policies at all": {"quantizers": {"aware": AWARE}},
    "no end": when(starting_epoch=0),
    "no end, but a frequency": when(starting_epoch=0, frequency=1),
    "no epochs at all": when(),
    "negative start": when(starting_epoch=-1, ending_epoch=2),
    "negative end": when(starting_epoch=0, ending_epoch=-2),
    "negative frequency": when(starting_epoch=0, ending_epoch=2, frequency=-1),
    "frequency 0": when(starting_epoch=0, ending_epoch=2, frequency=0),
    "negative epoch": when(epochs=[0, -1]),
    "no epoch between": when(starting_epoch=3, ending_epoch=3),
    "end before start": when(starting_epoch=3, ending_epoch=1),
    "list of no epochs": when(epochs=[]),
    "epochs is a number": when(epochs=3),
    "epochs is text": when(epochs="all"),
    "epochs is a map": when(epochs={0: 1}),
    "epochs of lists": when(epochs=[[0]]),
    "epochs of fractions": when(epochs=[0.5]),
    "epochs of text": when(epochs=["0"]),
    "epochs of truths": when(epochs=[True]),
    "epochs and an end": when(epochs=[0], ending_epoch=2),
    "start is text": when(starting_epoch="first", ending_epoch=2),
    "start is a fraction": when(starting_epoch=0.5, ending_epoch=2),
    "start is a list": when(starting_epoch=[0], ending_epoch=2),
    "start is empty": when(starting_epoch=None, ending_epoch=2),
    "end is a list": when(starting_epoch=0, ending_epoch=[2]),
    "end is endless": "quantizers: {a: {class: NCFQuantAwareTrainQuantizer}}\n"
    "policies: [{quantizer: {instance_name: a}, ending_epoch: .inf}]",
    "frequency is a list": when(starting_epoch=0, ending_epoch=2, frequency=[1]),
    "frequency is text": when(starting_epoch=0, ending_epoch=2, frequency="always"),
    "end beyond all epochs": when(starting_epoch=0, ending_epoch=1_000_000_000_000),
    "end beyond what a range can count": when(starting_epoch=0, ending_epoch=(1 << 63) + 1),
    "end of 20 digits": when(starting_epoch=0, ending_epoch=99999999999999999999),
    "start beyond all epochs": when(starting_epoch=1 << 32, ending_epoch=1 << 33),
    "frequency beyond all epochs": when(starting_epoch=0, ending_epoch=2, frequency=1 << 32),
    "epoch beyond all": when(epochs=[0, 1 << 32]),
    "unknown key of a policy": when(starting_epoch=0, ending_epoch=2, every=1),
}


def check_refusal(error: InputError) -> None:
    """One line that names the flag."""
    assert "--compress" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_file_is_refused(kind):
    """In one line, without running anything that is in it."""
    value = MALFORMED[kind]
    path = written(value.replace("MARKER", "marker") if isinstance(value, str) else value)
    with pytest.raises(InputError) as error:
        load_schedule(path)
    check_refusal(error.value)
    assert not Path("marker").exists()


def test_file_that_is_not_text_is_refused():
    """Another encoding."""
    Path("schedule.yaml").write_bytes(b"quantizers: \xff\xfe\x80")
    with pytest.raises(InputError) as error:
        load_schedule("schedule.yaml")
    check_refusal(error.value)


def test_missing_file_is_an_error_of_the_system():
    """It names the file."""
    with pytest.raises(OSError, match="no_such_file"):
        load_schedule("no_such_file.yaml")


SCALARS = st.sampled_from(
    [None, True, 0, 1, 2, -1, 0.5, "aware", "decay", "StepLR", "NCFQuantAwareTrainQuantizer", "two\nlines"]
)
WHEN = ["starting_epoch", "ending_epoch", "frequency", "epochs"]
NAMES = ["quantizer", "lr_scheduler", "instance_name", "class", "gamma", "aware", "decay"]
KEYS = st.sampled_from(["quantizers", "lr_schedulers", "policies", *NAMES, *WHEN])
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(KEYS, v, max_size=3), max_leaves=8
)


@st.composite
def damaged(draw) -> object:
    """A good file with another value in one or two places."""
    value = content({"bits_weights": 8}, {"decay": {"class": "StepLR", "step_size": 1}})
    for _ in range(draw(st.integers(1, 2))):
        place: object = value
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            below = place[key]
            if isinstance(below, dict | list) and below and draw(st.booleans()):
                place = below
            else:
                place[key] = draw(VALUES)
                break
    return value


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged())
def test_file_damaged_anywhere_loads_or_is_refused(value):
    """Whatever stands where."""
    path = written(yaml.safe_dump(value))
    try:
        load_schedule(path)
    except InputError as error:
        check_refusal(error)


BAD_SCHEDULERS = {
    "missing argument": {"class": "StepLR"},
    "unknown argument": {"class": "StepLR", "step_size": 1, "speed": 2},
    "argument that is no name": {"class": "StepLR", 1: 2},
    "optimizer": {"class": "StepLR", "optimizer": 1, "step_size": 1},
    "factor too large": {"class": "ReduceLROnPlateau", "factor": 1.5},
    "unknown mode": {"class": "ReduceLROnPlateau", "mode": "best"},
    "function of text": {"class": "LambdaLR", "lr_lambda": "epoch"},
    "last epoch without a first": {"class": "StepLR", "step_size": 1, "last_epoch": 5},
    "abstract class": {"class": "LRScheduler"},
    "of schedulers": {"class": "SequentialLR", "schedulers": ["decay"], "milestones": [1]},
    "chained": {"class": "ChainedScheduler", "schedulers": ["decay"]},
}


@pytest.mark.parametrize("kind", BAD_SCHEDULERS)
def test_arguments_that_a_scheduler_refuses(kind):
    """When it meets the optimizer, at the latest."""
    with pytest.raises(InputError) as error:
        loaded(content(schedulers={"decay": BAD_SCHEDULERS[kind]})).bind(optimizer_of(1.0))
    check_refusal(error.value)
    assert "decay" in str(error.value)


@pytest.mark.parametrize("kind", [NotImplementedError, RuntimeError, AssertionError, RecursionError])
def test_scheduler_that_cannot_be_made(kind, monkeypatch):
    """Whatever PyTorch's class raises, with a message or without."""

    class Fails(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer):
            raise kind

    monkeypatch.setattr(torch.optim.lr_scheduler, "Fails", Fails, raising=False)
    with pytest.raises(InputError, match=f"decay: {kind.__name__}") as error:
        loaded(content(schedulers={"decay": {"class": "Fails"}})).bind(optimizer_of(1.0))
    check_refusal(error.value)


BAD_STEPS = {
    "step of 0": {"class": "StepLR", "step_size": 0},
    "factor of text": {"class": "ExponentialLR", "gamma": "half"},
    "period of 0": {"class": "CosineAnnealingLR", "T_max": 0},
    "cycle that is over": {"class": "OneCycleLR", "max_lr": 0.1, "total_steps": 2, "cycle_momentum": False},
}


@pytest.mark.parametrize("kind", BAD_STEPS)
def test_arguments_that_a_scheduler_refuses_only_when_it_steps(kind):
    """They are the file's mistake all the same."""
    schedule = loaded(content(schedulers={"decay": BAD_STEPS[kind]}))
    with pytest.raises(InputError) as error:
        rates(schedule, 4)
    check_refusal(error.value)
    assert "decay" in str(error.value)


BAD_QUANTIZERS = {
    "unknown argument": {"bits": 8},
    "argument that is no name": {1: 8},
    "model": {"model": 1},
    "bits out of range": {"bits_weights": 17},
    "bits of text": {"bits_activations": "eight"},
    "bits of bias": {"bits_bias": 33},
    "mode": {"mode": "asymmetric"},
    "mode of one": {"mode": {"activations": "sym"}},
    "decay of 1": {"ema_decay": 1.0},
    "decay of text": {"ema_decay": "slow"},
    "override of no layer": {"overrides": {"no_such_layer": {"bits_weights": 4}}},
    "override's key": {"overrides": {"final": {"bits": 4}}},
    "override's bits": {"overrides": {"final": {"bits_weights": 40}}},
    "override that is no pattern": {"overrides": {"(": {"bits_weights": 4}}},
    "overrides of text": {"overrides": "final"},
}


@pytest.mark.parametrize("kind", BAD_QUANTIZERS)
def test_arguments_that_the_quantizer_refuses(kind):
    """When it meets the model, at the latest."""
    with pytest.raises(InputError) as error:
        loaded(content(BAD_QUANTIZERS[kind])).epoch_begin(0, small_model(1))
    check_refusal(error.value)


# --- when it acts ---


@pytest.mark.parametrize(
    "epochs", [{"starting_epoch": 1, "ending_epoch": 1 << 31}, {"epochs": [5, 1, 3, 1]}], ids=str
)
def test_quantizer_acts_from_its_first_epoch_however_many_follow(epochs):
    """Two billion of them are not gone through to find it; a list may come in any order."""
    schedule, model = loaded(when(**epochs)), small_model(1)
    with no_hang():
        schedule.epoch_begin(0, model)
        assert not is_quantization_aware(model)
        schedule.epoch_begin(1, model)
        assert is_quantization_aware(model)


def scheduled(scheduler: dict, **epochs) -> CompressionSchedule:
    """A schedule of one learning-rate scheduler."""
    policy = {"lr_scheduler": {"instance_name": "decay"}, **epochs}
    return loaded({"lr_schedulers": {"decay": scheduler}, "policies": [policy]})


HALF = {"class": "ExponentialLR", "gamma": 0.5}


@pytest.mark.parametrize(
    ("scheduler", "epochs", "expected"),
    [
        (HALF, {"starting_epoch": 0, "ending_epoch": 6}, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
        (HALF, {"ending_epoch": 2}, [1, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        (HALF, {"starting_epoch": 2, "ending_epoch": 4}, [1, 1, 1, 1 / 2, 1 / 4, 1 / 4]),
        (HALF, {"starting_epoch": 1, "ending_epoch": 6, "frequency": 2}, [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        (
            HALF,
            {"starting_epoch": 0, "ending_epoch": 6, "frequency": 5},
            [1, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2],
        ),
        (HALF, {"epochs": [0, 3]}, [1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        (HALF, {"epochs": [3, 0, 3]}, [1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        (HALF, {"epochs": [7]}, [1, 1, 1, 1, 1, 1]),
        (
            {"class": "StepLR", "step_size": 2, "gamma": 0.5},
            {"starting_epoch": 1, "ending_epoch": 5},
            [1, 1, 1, 1 / 2, 1 / 2, 1 / 4],
        ),
        (
            {"class": "StepLR", "step_size": 3},
            {"starting_epoch": 0, "ending_epoch": 9},
            [1, 1, 1, 0.1, 0.1, 0.1],
        ),
        (
            {"class": "MultiStepLR", "milestones": [1, 2], "gamma": 0.5},
            {"epochs": [1, 4]},
            [1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4],
        ),
    ],
)
def test_scheduler_steps_at_the_end_of_its_epochs(scheduler, epochs, expected):
    """And of no others: the learning rate of six epochs, by hand."""
    assert rates(scheduled(scheduler, **epochs), 6) == pytest.approx(expected)


def test_plateau_looks_at_the_metric_of_its_epochs():
    """Higher is better, with mode max: without patience, each epoch that does not exceed the best halves."""
    plateau = {"class": "ReduceLROnPlateau", "mode": "max", "factor": 0.5, "patience": 0, "threshold": 0.0}
    metrics = [0.1, 0.2, 0.2, 0.3, 0.25, 0.4, 0.1]
    every = scheduled(plateau, starting_epoch=0, ending_epoch=7)
    assert rates(every, 7, metrics=metrics) == [1, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]
    # Of epochs 0, 2, 4 and 6, with 0.1, 0.2, 0.25 and 0.1, only the last is no better.
    even = scheduled(plateau, starting_epoch=0, ending_epoch=7, frequency=2)
    assert rates(even, 8, metrics=[*metrics, 0.0]) == [1, 1, 1, 1, 1, 1, 1, 1 / 2]


def test_two_schedulers_act_each_in_their_epochs():
    """And one of them by two policies."""
    value = {
        "lr_schedulers": {"half": HALF, "tenth": {"class": "ExponentialLR", "gamma": 0.1}},
        "policies": [
            {"lr_scheduler": {"instance_name": "half"}, "epochs": [0]},
            {"lr_scheduler": {"instance_name": "tenth"}, "epochs": [1]},
            {"lr_scheduler": {"instance_name": "half"}, "starting_epoch": 3, "ending_epoch": 4},
        ],
    }
    assert rates(loaded(value), 6) == pytest.approx([1, 0.5, 0.05, 0.05, 0.025, 0.025])


@pytest.mark.parametrize(
    ("epochs", "first"),
    [
        ({"starting_epoch": 2, "ending_epoch": 5}, 2),
        ({"ending_epoch": 5}, 0),
        ({"epochs": [4, 3]}, 3),
        ({"starting_epoch": 1, "ending_epoch": 9, "frequency": 3}, 1),
    ],
)
def test_quantizer_acts_from_its_first_epoch_on(epochs, first):
    """Once: the same layers go on."""
    schedule = loaded(when(**epochs))
    model = small_model(2)
    for epoch in range(first):
        schedule.epoch_begin(epoch, model)
        assert not is_quantization_aware(model)
    schedule.epoch_begin(first, model)
    modules = list(model.modules())
    assert is_quantization_aware(model)
    for epoch in range(first + 1, 11):
        schedule.epoch_begin(epoch, model)
        assert list(model.modules()) == modules


def test_quantizer_gets_its_arguments():
    """Two bits leave few values."""
    model = small_model(2)
    loaded(content({"bits_activations": 0, "bits_weights": 2, "mode": "asym_u"})).epoch_begin(0, model)
    assert len(model.mf_user_embed(torch.arange(9)).unique()) <= 4


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"factor": 0.5, "total_iters": 2},
    "LinearLR": {"start_factor": 0.2, "total_iters": 4},
    "ExponentialLR": {"gamma": 0.7},
    "PolynomialLR": {"total_iters": 6, "power": 2},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10, "cycle_momentum": False},
    "ReduceLROnPlateau": {"mode": "max", "patience": 1},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_state_goes_through_a_checkpoint(kind):
    """Of any scheduler: what goes on from it has the same learning rates as what never stopped."""
    scheduler = {"class": kind, **SCHEDULERS[kind]}
    metrics = [0.1, 0.3, 0.2, 0.2, 0.1, 0.1, 0.4, 0.1]
    whole = rates(scheduled(scheduler, starting_epoch=0, ending_epoch=8), 8, metrics=metrics)
    assert len(set(whole)) > 1
    for stop in (1, 4):
        first = scheduled(scheduler, starting_epoch=0, ending_epoch=8)
        optimizer = optimizer_of(1.0)
        first.bind(optimizer)
        for epoch in range(stop):
            optimizer.step()
            first.epoch_end(epoch, metrics[epoch])
        state = {"state_dict": {}, "schedule": first.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint("half.pth.tar", state)
        state = load_checkpoint("half.pth.tar")

        second = scheduled(scheduler, starting_epoch=0, ending_epoch=8)
        optimizer = optimizer_of(1.0)
        second.bind(optimizer)
        optimizer.load_state_dict(state["optimizer"])
        second.load_state_dict(state["schedule"])
        found = []
        for epoch in range(stop, 8):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            second.epoch_end(epoch, metrics[epoch])
        assert found == whole[stop:]
        assert same(second.state_dict().keys(), {"decay"})


def test_scheduler_that_a_state_lacks_starts_anew():
    """And what the state has beside it is left aside."""
    schedule = scheduled(HALF, ending_epoch=8)
    schedule.bind(optimizer_of(1.0))
    before = copy.deepcopy(schedule.state_dict())
    schedule.load_state_dict({"other": {"last_epoch": 7}})
    assert schedule.state_dict() == before


# --- command lines ---


@pytest.fixture
def train(ncf, split_dir):
    """Trains on the tiny split, which must go well; returns what was printed."""

    def run(*arguments: object) -> str:
        outcome = ncf(split_dir, *TRAIN, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


@pytest.fixture
def resume(ncf, split_dir):
    """Goes on with a run, with its own settings where none are given; returns what was printed."""

    def run(*arguments: object) -> str:
        outcome = ncf(split_dir, "--resume", *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


def metrics_of_last_line(out: str) -> str:
    """The metrics of the last line that has them all: a run's last line names its best epoch."""
    return METRICS.findall(out)[-1]


def last(directory: str) -> Path:
    return Path(directory) / "checkpoint.pth.tar"


def whole_checkpoint(directory: str) -> dict:
    return load_checkpoint(last(directory))


def says(checkpoint: dict, arguments: dict) -> bool:
    """Whether a checkpoint says that it is quantization-aware, by these arguments."""
    said = checkpoint["quantization_aware"]
    return said is not None and all(said[key] == value for key, value in arguments.items())


ARGUMENTS = {
    "defaults": {},
    "3 bits": {"bits_activations": 3, "bits_weights": 3, "mode": "asym_u", "ema_decay": 0.9},
    "per channel": {
        "bits_weights": 4,
        "per_channel_wts": True,
        "mode": {"activations": "asym_s", "weights": "sym"},
    },
    "overrides": {"bits_activations": 2, "overrides": {"final.*": {"bits_activations": 0}}, "ema_decay": 0.5},
    "weights alone": {"bits_activations": 0, "bits_weights": 2},
}


@pytest.mark.parametrize("flags", [[], ["--split-final"]])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_checkpoint_is_evaluated_as_it_was_trained(ncf, split_dir, train, kind, flags):
    """The same metrics as the last epoch's line."""
    path = written(content(ARGUMENTS[kind]))
    out = train(*flags, "-e", 2, "--compress", path, "-o", "aware")
    assert says(whole_checkpoint("aware"), ARGUMENTS[kind])
    outcome = ncf(split_dir, *flags, "--load", last("aware"), "--evaluate", "-o", "evaluation")
    assert outcome.code == 0, outcome.err
    assert metrics_of_last_line(outcome.out) == metrics_of_last_line(out)


def test_evaluation_differs_from_that_of_the_float_weights(ncf, split_dir, train):
    """With few bits: the test above has something to see."""
    path = written(content(ARGUMENTS["3 bits"]))
    out = train("-e", 2, "--compress", path, "-o", "aware")
    checkpoint = whole_checkpoint("aware")
    plain = checkpoint | {"state_dict": without_ranges(checkpoint["state_dict"]), "quantization_aware": None}
    save_checkpoint("plain.pth.tar", plain)
    outcome = ncf(split_dir, "--load", "plain.pth.tar", "--evaluate", "-o", "evaluation")
    assert outcome.code == 0, outcome.err
    assert metrics_of_last_line(outcome.out) != metrics_of_last_line(out)


def test_checkpoint_says_from_when_on_it_is_quantization_aware(train):
    """Not before the quantizer's first epoch; until then training is what it is without."""
    path = written(content({"bits_weights": 4}, start=1))
    train("-e", 1, "--compress", path, "-o", "early")
    train("-e", 1, "--precision", "fp32", "-o", "plain")
    early, plain = whole_checkpoint("early"), whole_checkpoint("plain")
    assert early["quantization_aware"] is None
    assert same(early["state_dict"], plain["state_dict"])
    train("-e", 2, "--compress", path, "-o", "late")
    late = whole_checkpoint("late")
    assert says(late, {"bits_weights": 4})
    weights = without_ranges(late["state_dict"])
    assert weights.keys() == plain["state_dict"].keys() < late["state_dict"].keys()
    assert all(torch.isfinite(tensor).all() for tensor in late["state_dict"].values())


def test_learning_rate_follows_the_schedule(train):
    """As the optimizer's state has it after the last epoch."""
    path = written({**content(schedulers={"decay": HALF})})
    train("-e", 3, "--compress", path, "-o", "run")
    (group,) = whole_checkpoint("run")["optimizer_state_dict"]["param_groups"]
    assert group["lr"] == pytest.approx(0.01 / 8)
    assert whole_checkpoint("run")["quantization_aware"] is None


def test_plateau_sees_the_hit_rate(train):
    """With a threshold that no hit rate gets over, every epoch but the first lowers the learning rate."""
    plateau = {"class": "ReduceLROnPlateau", "mode": "max", "factor": 0.5, "patience": 0}
    path = written(content(schedulers={"decay": plateau | {"threshold": 2.0, "threshold_mode": "abs"}}))
    train("-e", 3, "--compress", path, "-o", "run")
    checkpoint = whole_checkpoint("run")
    assert checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(0.01 / 4)
    state = checkpoint["schedule_state_dict"]["decay"]
    with open("run/valid_results.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert state["best"] == pytest.approx(float(first["hr@10"]))


PARTS = {
    "before it starts": [["-e", 1]],
    "when it starts": [["-e", 2]],
    "after its first epoch": [["-e", 3]],
    "within an epoch before": [["-e", 4, "--max-steps", STEPS + 10]],
    "within its first epoch": [["-e", 4, "--max-steps", 2 * STEPS + 10]],
    "again and again": [["-e", 4, "--max-steps", 2 * STEPS + 1], ["--max-steps", 3], ["--max-steps", STEPS]],
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, split_dir) -> Path:
    """Four epochs, from the third on with quantization; the learning rate falls throughout."""
    directory = tmp_path_factory.mktemp("unbroken")
    value = content({"bits_weights": 4, "ema_decay": 0.9}, {"decay": HALF | {"gamma": 0.8}}, start=2)
    (directory / "schedule.yaml").write_text(yaml.safe_dump(value))
    flags = ["-e", 4, "--compress", directory / "schedule.yaml", "-o", directory / "run"]
    outcome = run_ncf(split_dir, *TRAIN, *flags)
    assert outcome.code == 0, outcome.err
    return directory


RESUMED = ("state_dict", "optimizer_state_dict", "schedule_state_dict", "quantization_aware")


@pytest.mark.parametrize("parts", PARTS)
def test_resumed_run_is_that_which_never_stopped(train, resume, unbroken, parts):
    """Weights, ranges, optimizer and schedule, bit for bit, wherever it was stopped."""
    begin, *others = PARTS[parts]
    train(*begin, "--compress", unbroken / "schedule.yaml", "-o", "broken")
    for flags in others:
        resume("-e", 4, *flags, "-o", "broken")
    out = resume("-e", 4, "-o", "broken")
    first, second = load_checkpoint(last(unbroken / "run")), whole_checkpoint("broken")
    for key in RESUMED:
        assert same(first[key], second[key]), key
    assert first["quantization_aware"]
    assert f"{first['hr']:.4f}" in lines(out)[-1]


def test_resume_with_the_whole_command_line_again(train, unbroken):
    """The same flags, typed once more, change nothing."""
    flags = ["--compress", unbroken / "schedule.yaml", "-o", "broken"]
    train("-e", 3, *flags)
    train("-e", 4, *flags, "--resume")
    first, second = load_checkpoint(last(unbroken / "run")), whole_checkpoint("broken")
    for key in RESUMED:
        assert same(first[key], second[key]), key


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_resumed_run_has_its_learning_rate(train, resume, kind):
    """Of any scheduler, also of those that set it as soon as they are made."""
    path = written(content(schedulers={"decay": {"class": kind, **SCHEDULERS[kind]}}))
    fast = ["-b", 4096, "--compress", path]
    train(*fast, "-e", 3, "-o", "unbroken")
    train(*fast, "-e", 1, "-o", "broken")
    resume("-e", 3, "-o", "broken")
    first, second = whole_checkpoint("unbroken"), whole_checkpoint("broken")
    for key in RESUMED:
        assert same(first[key], second[key]), key


@pytest.mark.parametrize("flags", [[], ["--split-final"]])
def test_calibration_and_int8_work_on_the_float_weights(ncf, split_dir, unbroken, flags):
    """The same statistics and metrics as of a checkpoint of those weights alone."""
    checkpoint = load_checkpoint(last(unbroken / "run"))
    plain = checkpoint | {"state_dict": without_ranges(checkpoint["state_dict"]), "quantization_aware": None}
    save_checkpoint("plain.pth.tar", plain)
    results = []
    for name, path in (("aware", last(unbroken / "run")), ("plain", "plain.pth.tar")):
        stats = f"{name}.yaml"
        calibration = ["--qe-calibration", 0.5, "--qe-stats-out", stats, "-o", f"{name}-calibration"]
        outcome = ncf(split_dir, *flags, "--load", path, *calibration)
        assert outcome.code == 0, outcome.err
        int8 = ["--quantize-eval", "--qem", "asym_u", "--qepc", "--qe-stats-file", stats]
        outcome = ncf(split_dir, *flags, "--load", path, *int8, "-o", f"{name}-int8")
        assert outcome.code == 0, outcome.err
        assert outcome.err.count("warning") == 0
        results.append((metrics_of_last_line(outcome.out), yaml.safe_load(Path(stats).read_text())))
    assert results[0] == results[1]


def test_half_precision_evaluation_of_a_quantization_aware_checkpoint_is_refused(ncf, split_dir, train):
    """It was trained to round in float32: one line that names the flag, and no run directory."""
    for number, arguments in enumerate(({"bits_weights": 8}, {"bits_weights": 0, "bits_bias": 0})):
        path = written(content(arguments))
        train("-e", 1, "-b", 2048, "--compress", path, "-o", f"run{number}")
        outcome = ncf(split_dir, "--load", last(f"run{number}"), "--eval-fp16", "-o", "evaluation")
        check_refused(outcome, "--eval-fp16")
        assert not Path("evaluation").exists()


def test_training_goes_on_from_a_quantization_aware_checkpoint(ncf, split_dir, unbroken):
    """With its schedule, with another, with none: --load takes its weights."""
    other = written(content({"bits_weights": 6}))
    for name, flags in {
        "same": ["--compress", unbroken / "schedule.yaml"],
        "other": ["--compress", other],
        "none": [],
    }.items():
        source = ["--load", last(unbroken / "run"), "--reset-optimizer", "-e", 1, "-b", 2048, "-s", 1]
        outcome = ncf(split_dir, *source, *flags, "-o", name)
        assert outcome.code == 0, outcome.err
    assert whole_checkpoint("none")["quantization_aware"] is None
    assert says(whole_checkpoint("other"), {"bits_weights": 6})
    assert says(whole_checkpoint("same"), {"bits_weights": 4, "ema_decay": 0.9})


# --- refusals ---


def check_refused(outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome
    assert len(lines(outcome.err)) == 1, outcome.err
    assert outcome.err.startswith("ncf.py: error: ")
    assert outcome.out == ""
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize("split_final", [False, True])
def test_other_final_layer_than_in_training_is_refused(ncf, split_dir, train, split_final):
    """The ranges are those of one kind: a line that names the flag, and no run directory."""
    path = written(content({"bits_weights": 8}))
    train(*(["--split-final"] if split_final else []), "-e", 1, "-b", 2048, "--compress", path, "-o", "aware")
    other = [] if split_final else ["--split-final"]
    check_refused(
        ncf(split_dir, "--load", last("aware"), "--evaluate", *other, "-o", "evaluation"), "--split-final"
    )
    assert not Path("evaluation").exists()


BAD_FILES = {
    "not YAML": MALFORMED["not YAML"],
    "unknown class": MALFORMED["unknown quantizer"],
    "no end": MALFORMED["no end"],
    "scheduler's argument": content(schedulers={"decay": BAD_SCHEDULERS["factor too large"]}),
    "quantizer's argument": content(BAD_QUANTIZERS["unknown argument"]),
    "quantizer's bits": content(BAD_QUANTIZERS["bits out of range"]),
    "override of no layer": content(BAD_QUANTIZERS["override of no layer"]),
    "quantizer's argument, of a later epoch": content(BAD_QUANTIZERS["unknown argument"], start=1),
    "quantizer's bits, of a later epoch": content(BAD_QUANTIZERS["bits out of range"], start=1),
    "override of no layer, of a later epoch": content(BAD_QUANTIZERS["override of no layer"], start=1),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_leaves_no_run_directory(ncf, split_dir, kind):
    """Neither the one asked for nor a fresh one; one line that names the flag."""
    path = written(BAD_FILES[kind])
    flags = [*TRAIN, "-e", 2, "-b", 4096, "--compress", path]
    check_refused(ncf(split_dir, *flags, "-o", "asked"), "--compress")
    check_refused(ncf(split_dir, *flags), "--compress")
    assert [entry.name for entry in Path().iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_file_that_cannot_be_read_is_named(ncf, split_dir, kind):
    """And leaves no run directory."""
    path = Path("nowhere.yaml")
    if kind == "directory":
        path.mkdir()
    check_refused(ncf(split_dir, *TRAIN, "-e", 1, "--compress", path, "-o", "asked"), "nowhere.yaml")
    assert not Path("asked").exists()


def test_training_that_diverges_says_so(ncf, split_dir):
    """In one line, as without quantization."""
    path = written(content({}))
    for flags in ([], ["--compress", path]):
        outcome = ncf(split_dir, *TRAIN, "-l", 1e30, "-e", 1, *flags, "-o", f"run{len(flags)}")
        assert outcome.code == 2
        assert "the loss is" in lines(outcome.err)[-1]


def test_ranges_of_evaluation_do_not_depend_on_its_blocks(unbroken):
    """Evaluation moves no range: scores of pairs alone and of all at once agree."""
    checkpoint = load_checkpoint(last(unbroken / "run"))
    model = small_model(0, users=60, items=80, mf_dim=4, layers=(8, 6, 4))
    value = content({"bits_weights": 4, "ema_decay": 0.9})
    loaded(value).epoch_begin(0, model)
    model.load_state_dict(checkpoint["state_dict"])
    model.eval()
    users, items = (column[::97] for column in all_pairs(small_model(0, users=60, items=80)))
    with torch.no_grad():
        at_once = model(users, items, True)
        alone = torch.cat([model(users[i : i + 1], items[i : i + 1], True) for i in range(len(users))])
    torch.testing.assert_close(at_once, alone)
