"""A step: lazy as dense, padded as not, in bfloat16 nearly as in float32, compiled and on a GPU as on the CPU."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from distiller.quantization.train_aware import NCFQuantAwareTrainQuantizer
from neural_cf.data.batches import Batch, Distinct, TrainingBatches, distinct
from neural_cf.model import NeuMF
from neural_cf.runs.hardware import native_bf16, why_not_compiled
from neural_cf.split import Split
from neural_cf.training.cuda_graph import tensors_of
from neural_cf.training.lazy_adam import LazyAdam
from neural_cf.training.step import Step, gradient_of_rows

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
USERS, ITEMS = 14, 20
RATE = 3e-3
START = 1600  # a step in which the expansion that a lazy optimizer makes of skipped steps is good


def tiny_split() -> Split:
    """Users rate 3 to 8 items each; 73 pairs, so that an epoch has 365 samples with 4 negatives."""
    random = np.random.default_rng(0)
    counts = [3 + user % 6 for user in range(USERS)]
    return Split(
        nb_users=USERS,
        nb_items=ITEMS,
        train_users=np.repeat(np.arange(USERS), counts).astype(np.uint8),
        train_items=np.concatenate([random.permutation(ITEMS)[:count] for count in counts]).astype(np.uint8),
        test_items=np.zeros(USERS, dtype=np.uint8),
        negatives=np.zeros((USERS, 1), dtype=np.uint8),
        distinct_negatives=False,
        seed=0,
        digest="",
        user_ids=None,
        item_ids=None,
    )


def new_model(split_final: bool = False, device: str = "cpu") -> NeuMF:
    """With embeddings large enough to matter from the first step on."""
    torch.manual_seed(0)
    model = NeuMF(USERS, ITEMS, 3, [8, 6, 4], split_final)
    with torch.no_grad():
        for tables in model.tables():
            for table in tables:
                table.mul_(50)
    return model.to(device)


def batches_of(batch_size: int, epochs: int = 1) -> list[Batch]:
    """Some epochs' batches, on the CPU."""
    batches = TrainingBatches(tiny_split(), batch_size, 4, seed=1)
    return [batch for epoch in range(epochs) for batch in batches.epoch(epoch)]


def on(device: str, batch: Batch) -> Batch:
    """The same batch on a device."""
    return Batch(
        *(part.to(device) for part in batch[:4]),
        *(Distinct(*(part.to(device) for part in ids)) for ids in batch[4:]),
    )


def new_step(
    lazy: bool, split_final: bool = False, device: str = "cpu", started: bool = True, **arguments
) -> Step:
    """A step on a new model; its optimizer has the state of ``START`` dense ones before it."""
    model = new_model(split_final, device)
    if lazy:
        optimizer = LazyAdam(model.parameters(), model.tables(), lr=RATE)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    if started:
        optimizer.load_state_dict(started_state(split_final))
    return Step(model, optimizer, **arguments)


def started_state(split_final: bool) -> dict:
    """Of gradients as these models have them, so that no weight moves in the direction of mere rounding."""
    optimizer = torch.optim.Adam(new_model(split_final).parameters(), lr=RATE, fused=True)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        first = 1e-2 * torch.randn(parameter.shape, generator=generator)
        second = 1e-4 * (1 + torch.rand(parameter.shape, generator=generator))
        state[i] = {"step": torch.tensor(float(START)), "exp_avg": first, "exp_avg_sq": second}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def weights(step: Step) -> dict[str, Tensor]:
    """Up to date, on the CPU."""
    if isinstance(step.optimizer, LazyAdam):
        step.optimizer.flush()
    return {name: part.detach().cpu().clone() for name, part in step.model.state_dict().items()}


# --- the penalty ---


@pytest.mark.parametrize("lazy", [False, True])
def test_penalty_is_each_samples_squared_norms(lazy):
    """Added to the mean loss; in a batch that is filled up, of its samples alone."""
    for batch in batches_of(100)[-2:]:
        plain, penalized = new_step(lazy), new_step(lazy, l2=0.3)
        (mf_users, mlp_users), (mf_items, mlp_items) = plain.model.tables()
        rows = mf_users[batch.users], mf_items[batch.items], mlp_users[batch.users], mlp_items[batch.items]
        expected = 0.3 * (plain.model.squared_norms(*rows).detach() * batch.weights).sum()
        torch.testing.assert_close(penalized(batch) - plain(batch), expected)


def test_penalty_is_the_same_lazy_and_dense():
    """Rows that a batch leaves alone move by their momentum only."""
    lazy, dense, plain = new_step(True, l2=0.3), new_step(False, l2=0.3), new_step(False)
    for batch in batches_of(20):
        for step in (lazy, dense, plain):
            step(batch)
    for name, value in weights(dense).items():
        torch.testing.assert_close(weights(lazy)[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(plain)["mf_user_embed.weight"], weights(dense)["mf_user_embed.weight"])


def moments(step: Step) -> dict[str, Tensor]:
    """Up to date, on the CPU."""
    states = step.optimizer.state_dict()["state"]
    return {f"{i} {name}": part.cpu() for i, parts in states.items() for name, part in parts.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Everywhere to within the tolerance."""
    assert actual.keys() == expected.keys()
    for name, part in expected.items():
        error = (actual[name].double() - part.double()).abs().max().item()
        assert error <= tolerance, f"{name}: {error}"


def mean_loss(model: NeuMF, batch: Batch) -> float:
    """The cross-entropy of a batch's real samples by definition, in float64."""
    real = batch.weights > 0
    with torch.no_grad():
        logits = copy.deepcopy(model).cpu().double()(batch.users[real], batch.items[real]).squeeze(1)
    chances, labels = torch.sigmoid(logits), batch.labels[real].double()
    return -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean().item()


# --- as Adam ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split_final", [False, True])
@pytest.mark.parametrize("batch_size", [5, 16, 100, 365, 1000])
def test_lazy_steps_are_adams(batch_size, split_final, device):
    """Weights and moments after three epochs: with rows left out of batches, and all in each; padded batches too."""
    lazy, dense = (new_step(lazy, split_final, device if lazy else "cpu") for lazy in (True, False))
    for batch in batches_of(batch_size, epochs=3):
        losses = lazy(on(device, batch)).item(), dense(batch).item()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not lazy.optimizer.dense
    assert lazy.optimizer.lagging() is not None
    before = weights(new_step(True, split_final))
    # A step moves by up to about 0.003; what follows is some ten times the rounding of a few hundred of them.
    assert (weights(dense)["mf_user_embed.weight"] - before["mf_user_embed.weight"]).abs().max() > 5e-3
    assert_close(weights(lazy), weights(dense), 5e-6)
    assert_close(moments(lazy), moments(dense), 2e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_evaluations_and_rates_in_between_change_nothing(device):
    """A flush after every epoch, another rate after every second one."""
    lazy, dense = (new_step(lazy, device=device if lazy else "cpu") for lazy in (True, False))
    for epoch, rate in enumerate([RATE, RATE, RATE / 10, RATE / 10, 2 * RATE, 2 * RATE]):
        for step in (lazy, dense):
            step.optimizer.param_groups[0]["lr"] = rate
        batches = TrainingBatches(tiny_split(), 32, 4, seed=1)
        for batch in batches.epoch(epoch):
            lazy(on(device, batch)), dense(batch)
        assert_close(weights(lazy), weights(dense), 5e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lazy", [True, False])
def test_models_in_float64_stay_in_float64(lazy, device):
    """Loss, weights, gradients and state; much nearer to each other than in float32, by rows or not."""
    step, reference = new_step(lazy, device=device), new_step(lazy=False)
    for each in (step, reference):
        each.model.double()
        each.optimizer.load_state_dict(started_state(split_final=False))
    for batch in batches_of(32, epochs=2):
        losses = step(on(device, batch)), reference(batch)
        assert losses[0].dtype == torch.float64
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-8)
    assert {part.dtype for part in step.model.state_dict().values()} == {torch.float64}
    assert {part.dtype for name, part in moments(step).items() if "exp_avg" in name} == {torch.float64}
    # The expansion of skipped steps is good to 4.5e-7 of what they move.
    assert_close(weights(step), weights(reference), 1e-8 if lazy else 1e-12)


def test_first_steps_are_dense():
    """Bit for bit Adam's, before any state is there; then lazy ones follow."""
    lazy, dense = (new_step(lazy, started=False) for lazy in (True, False))
    batches = batches_of(32, epochs=2)
    for batch in batches[:20]:
        assert lazy.optimizer.dense
        assert torch.equal(lazy(batch), dense(batch))
    assert lazy.optimizer.lagging() is None
    assert_close(weights(lazy), weights(dense), 0)
    lazy(batches[20])
    assert lazy.optimizer.lagging() is not None


def test_tables_have_no_gradient_in_lazy_steps():
    """Else a step would be dense again."""
    step = new_step(lazy=True)
    for batch in batches_of(16)[:3]:
        step(batch)
    tables = {id(table) for tables in step.model.tables() for table in tables}
    for parameter in step.model.parameters():
        assert (parameter.grad is None) == (id(parameter) in tables)


# --- loss and padding ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("batch_size", [50, 100, 1000])
def test_loss_is_the_mean_of_the_real_samples_before_the_step(batch_size, lazy, device):
    """A float32 number without gradient; in a padded batch too."""
    step = new_step(lazy, device=device)
    for batch in batches_of(batch_size):
        if lazy:
            step.optimizer.flush()
        expected = mean_loss(step.model, batch)
        loss = step(on(device, batch))
        assert (loss.shape, loss.dtype, loss.requires_grad) == ((), torch.float32, False)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (batch.weights == 0).any() == (batch_size != 1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lazy", [True, False])
def test_padding_contributes_nothing(lazy, device):
    """The step on the padded batch is the one on its real samples alone, whatever the padding is labelled."""
    batch = batches_of(100)[-1]
    real = int((batch.weights > 0).sum())
    assert real == 65
    users, items = batch.users[:real], batch.items[:real]
    alone = Batch(
        *(part[:real] for part in batch[:4]),
        *(Distinct(*(part[0] for part in distinct(ids[None], len(ids.unique())))) for ids in (users, items)),
    )
    labels = batch.labels.clone()
    labels[real:] = 1 - labels[real:]
    padded, relabelled, plain = (new_step(lazy, device=device) for _ in range(3))
    loss = padded(on(device, batch))
    assert relabelled(on(device, batch._replace(labels=labels))).item() == pytest.approx(
        loss.item(), rel=1e-6
    )
    assert plain(on(device, alone)).item() == pytest.approx(loss.item(), rel=1e-6)
    # On a GPU gradients are summed in any order.
    assert_close(weights(relabelled), weights(padded), 0 if device == "cpu" else 1e-6)
    assert_close(weights(plain), weights(padded), 1e-6)


# --- gradients of rows ---


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    spare=st.integers(0, 5),
    width=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_gradient_of_rows_is_that_of_brute_force(ids, spare, width, seed):
    """The sum over a row's samples where the row stands first, and zero in slots that fill up."""
    samples = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(seed))
    rows = distinct(torch.tensor([ids]), len(set(ids)) + spare)
    found = gradient_of_rows(samples, Distinct(*(part[0] for part in rows)))
    expected = torch.zeros(len(set(ids)) + spare, width)
    for slot, row in enumerate(sorted(set(ids))):
        for sample, own in zip(samples, ids, strict=True):
            if own == row:
                expected[slot] += sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [16, 100])
def test_gradients_of_rows_are_those_of_whole_tables(batch_size):
    """Of a model's loss on a padded batch, by autograd of embeddings and of tables."""
    batch = batches_of(batch_size)[-1]
    model = new_model()
    ids = {"user": (batch.users, batch.distinct_users), "item": (batch.items, batch.distinct_items)}
    embeddings = {}
    for branch in ("mf", "mlp"):
        for side, (own, _) in ids.items():
            table = getattr(model, f"{branch}_{side}_embed")
            embeddings[f"{branch}_{side}"] = table(own)
            embeddings[f"{branch}_{side}"].retain_grad()
    losses = functional.binary_cross_entropy_with_logits(
        model.score(**embeddings).squeeze(1), batch.labels, reduction="none"
    )
    (losses @ batch.weights).backward()
    for branch in ("mf", "mlp"):
        for side, (own, rows) in ids.items():
            found = gradient_of_rows(embeddings[f"{branch}_{side}"].grad, rows)
            touched = own.unique()
            whole = getattr(model, f"{branch}_{side}_embed").weight.grad
            torch.testing.assert_close(found[: len(touched)], whole[touched], rtol=1e-4, atol=1e-7)
            assert not found[len(touched) :].any()


# --- bfloat16 ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split_final", [False, True])
@pytest.mark.parametrize("lazy", [True, False])
def test_bf16_is_near_fp32_and_keeps_float32(lazy, split_final, device):
    """Losses to within a few roundings of 2^-8, but not the same; weights, gradients and state stay float32."""
    bf16, fp32 = (new_step(lazy, split_final, device, precision=precision) for precision in ("bf16", "fp32"))
    differ = 0
    for batch in batches_of(32, epochs=2):
        losses = [step(on(device, batch)) for step in (bf16, fp32)]
        assert losses[0].dtype == torch.float32
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2)
        differ += losses[0].item() != losses[1].item()
    assert differ > 15
    parameters = list(bf16.model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert gradients and {gradient.dtype for gradient in gradients} == {torch.float32}
    assert {part.dtype for part in moments(bf16).values()} == {torch.float32}
    assert_close(weights(bf16), weights(fp32), 2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lazy", [True, False])
def test_loss_of_bf16_logits_is_taken_in_float32(lazy, device):
    """The products are rounded, and nothing after them: the loss is that of the logits that autocast gives."""
    step = new_step(lazy, device=device, precision="bf16")
    for batch in batches_of(50):
        if lazy:
            step.optimizer.flush()
        batch = on(device, batch)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            logits = step.model(batch.users, batch.items).squeeze(1)
        assert logits.dtype == torch.bfloat16
        losses = functional.binary_cross_entropy_with_logits(
            logits.double(), batch.labels.double(), reduction="none"
        )
        assert step(batch).item() == pytest.approx((losses @ batch.weights.double()).item(), rel=1e-5)


# --- quantization-aware training ---


@pytest.mark.parametrize("device", DEVICES)
def test_quantization_aware_models_take_dense_steps(device):
    """Past the first ones too, bit for bit Adam's on a CPU: what a table rounds to depends on all of its rows."""
    lazy, dense = (new_step(lazy, device=device) for lazy in (True, False))
    for step in (lazy, dense):
        NCFQuantAwareTrainQuantizer(step.model).prepare_model()
    for batch in batches_of(32):
        losses = [step(on(device, batch)) for step in (lazy, dense)]
        if device == "cpu":
            assert torch.equal(*losses)
        assert lazy.optimizer.lagging() is None
    assert not lazy.optimizer.dense
    assert_close(weights(lazy), weights(dense), 0 if device == "cpu" else 1e-5)


def test_quantization_aware_steps_follow_lazy_ones():
    """Where a schedule prepares the model between two epochs, all rows being up to date."""
    lazy, dense = (new_step(lazy) for lazy in (True, False))
    for batch in batches_of(32):
        lazy(batch), dense(batch)
    lazy.optimizer.flush()
    for step in (lazy, dense):
        NCFQuantAwareTrainQuantizer(step.model, bits_activations=16, bits_weights=16).prepare_model()
    for batch in batches_of(32):
        losses = [step(batch).item() for step in (lazy, dense)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    trained = [{k: v for k, v in weights(step).items() if k.endswith("weight")} for step in (lazy, dense)]
    assert_close(*trained, 1e-3)


# --- compiled ---

# torch.compile is switched off in this process.
COMPILED = """
    import sys

    import torch

    from neural_cf.runs.hardware import why_not_compiled
    from test_step import batches_of, moments, new_step, weights

    if why := why_not_compiled(torch.device("cpu")):
        sys.exit(f"no compiler: {why}")
    eager, compiled = new_step(lazy=True), new_step(lazy=True, compiled=True)
    for epoch in range(3):
        for step in (eager, compiled):
            step.optimizer.param_groups[0]["lr"] *= 0.5
        for batch in batches_of(32, epochs=1):
            losses = [step(batch).item() for step in (eager, compiled)]
            print("loss", abs(losses[1] / losses[0] - 1))
        for name, part in weights(eager).items():
            print("weight", (part - weights(compiled)[name]).abs().max().item())
    for name, part in moments(eager).items():
        print("moment", (part - moments(compiled)[name]).abs().max().item())
"""
WHY = """
    import torch

    from neural_cf.runs.hardware import why_not_compiled

    print(why_not_compiled(torch.device("cpu")))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own in which PyTorch may compile."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent), inherited.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


def test_compiled_steps_are_nearly_the_eager_ones():
    """Losses, weights and moments of three epochs, with a padded batch and another rate in each."""
    done = run_python(COMPILED)
    if "no compiler: " in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, _ in found].count("loss") == 3 * 12
    tolerances = {"loss": 1e-5, "weight": 2e-6, "moment": 2e-7}
    assert [line for line in found if not float(line[1]) <= tolerances[line[0]]] == []


def test_a_broken_compiler_is_told_of_in_one_line(tmp_path):
    """Not raised."""
    settings = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run_python(WHY, CXX="/bin/false", **settings)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line != "None"
    assert len(line) > 10


def test_without_torch_compile_there_is_nothing_to_tell():
    """Switched off as it is in this process, it works on everything."""
    assert why_not_compiled(torch.device("cpu")) is None


# --- what a device can do ---


@pytest.mark.parametrize("device", DEVICES)
def test_native_bf16_is_a_bool(device):
    """Of whatever this is run on."""
    assert type(native_bf16(torch.device(device))) is bool


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, False), ({"avx2": True, "amx_bf16": False}, False), ({"amx_bf16": True}, True)],
)
def test_native_bf16_of_a_cpu_is_what_pytorch_knows_of_it(monkeypatch, capabilities, expected):
    """A release that cannot tell counts as one without."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert native_bf16(torch.device("cpu")) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert native_bf16(torch.device("cpu")) is False


def test_tensors_of_a_batch_are_all_of_them_in_order():
    """Four of the samples, three of each side's distinct ids."""
    batch = batches_of(16)[0]
    expected: Sequence[Tensor] = [*batch[:4], *batch.distinct_users, *batch.distinct_items]
    assert len(tensors_of(batch)) == 10
    assert all(one is other for one, other in zip(tensors_of(batch), expected, strict=True))
    assert math.isclose(batch.weights.sum().item(), 1, rel_tol=1e-6)
