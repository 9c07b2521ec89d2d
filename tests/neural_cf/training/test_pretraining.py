"""Pre-training: models of one branch, what joining them scores, the stages of a run and their resuming."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from conftest import call, run_ncf
from helpers_paths import SCHEDULE
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import pretraining as table
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import NeuMF, sizes_from_state_dict, with_final_layer
from neural_cf.ranking.places import evaluate
from neural_cf.ranking.scorers import PairScorer, float_scorer
from neural_cf.runs.directory import run_directory
from neural_cf.split import load_split
from neural_cf.training.pretraining import ALPHA, BRANCHES, joined_weights
from neural_cf.training.step import Step
from neural_cf.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("in_empty_directory")

SIZES = ["--layers", "8", "6", "4", "-f", "4"]
PRETRAIN = [*SIZES, "-s", "1", "--pretrain", "2", "--pretrain-rate", "0.01", "-l", "0.001", "-e", "2"]
STEPS = 38  # an epoch: 1940 pairs and 4 negatives each, in batches of 256
USERS, ITEMS = 7, 9
RUN = {"checkpoint.pth.tar", "best.pth.tar", "config.json", "valid_results.csv", "ncf.log"}


def random_model(factors: int, layers: list[int], seed: int, users: int = USERS, items: int = ITEMS) -> NeuMF:
    """A model whose weights are all far from 0, in float64."""
    torch.manual_seed(seed)
    model = NeuMF(users, items, factors, layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def all_pairs(users: int = USERS, items: int = ITEMS) -> tuple[torch.Tensor, torch.Tensor]:
    """Every user with every item."""
    return torch.arange(users).repeat_interleave(items), torch.arange(items).repeat(users)


def steps_of(directory: str | Path) -> int:
    """How many steps a run's optimizer has taken."""
    state = load_checkpoint(Path(directory) / "checkpoint.pth.tar")["optimizer_state_dict"]["state"]
    (steps,) = {int(values["step"]) for values in state.values()}
    return steps


@pytest.fixture
def train(ncf, split_dir):
    """Trains on the tiny split, which must go well; returns what was printed."""

    def run(*arguments: object) -> str:
        outcome = ncf(split_dir, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


@pytest.fixture(scope="module")
def pretrained(split_dir, tmp_path_factory) -> Path:
    """A pre-trained run. To be read only."""
    directory = tmp_path_factory.mktemp("pretrained") / "run"
    outcome = run_ncf(split_dir, *PRETRAIN, "-o", directory)
    assert outcome.code == 0, outcome.err
    return directory


# --- a branch alone ---


def test_gmf_is_the_weighted_product_of_embeddings():
    """Section 3.2 of the paper, by hand."""
    model = random_model(5, [0], seed=1)
    users, items = all_pairs()
    weight = model.state_dict()
    product = weight["mf_user_embed.weight"][users] * weight["mf_item_embed.weight"][items]
    expected = product @ weight["final.weight"][0] + weight["final.bias"]
    torch.testing.assert_close(model(users, items)[:, 0], expected)


def test_mlp_is_the_perceptron_of_embeddings():
    """Section 3.3 of the paper, by hand."""
    model = random_model(0, [6, 4, 3], seed=2)
    users, items = all_pairs()
    weight = model.state_dict()
    hidden = torch.cat(
        [weight["mlp_user_embed.weight"][users], weight["mlp_item_embed.weight"][items]], dim=1
    )
    for layer in range(2):
        hidden = (hidden @ weight[f"mlp.{layer}.weight"].T + weight[f"mlp.{layer}.bias"]).clamp(min=0)
    expected = hidden @ weight["final.weight"][0] + weight["final.bias"]
    torch.testing.assert_close(model(users, items)[:, 0], expected)


@pytest.mark.parametrize(("factors", "layers"), [(5, [0]), (0, [6, 4, 3])])
def test_one_branch_is_told_from_its_weights_and_scored(factors, layers):
    """Sizes are read off the weights; scoring users' candidates is scoring pairs."""
    model = random_model(factors, layers, seed=3).float()
    sizes = sizes_from_state_dict(model.state_dict())
    assert (sizes["mf_dim"], sizes["mlp_layer_sizes"]) == (factors, layers)
    users, items = torch.arange(USERS), torch.arange(ITEMS).repeat(USERS, 1)
    torch.testing.assert_close(float_scorer(model)(users, items), PairScorer(model)(users, items))


@pytest.mark.parametrize("optimizer", ["lazy-adam", "adam"])
@pytest.mark.parametrize(("flags", "absent"), [(["--layers", "0", "-f", "4"], "mlp"), (["-f", "0"], "mf")])
def test_branch_is_trained_alone_from_the_command_line(train, flags, absent, optimizer):
    """It learns, it is resumed to the same bits, it is evaluated, and nothing of the other branch is there."""
    settings_ = [*flags, "-s", 1, "-l", 0.01, "--optimizer", optimizer, "--param-hist"]
    out = train(*settings_, "-e", 3, "-o", "whole")
    losses = [float(loss) for loss in re.findall(r"AvgTrainLoss = ([\d.]+)", out)]
    assert losses == sorted(losses, reverse=True)
    train(*settings_, "-e", 3, "--max-steps", STEPS + 5, "-o", "parts")
    train("--resume", "-o", "parts")
    whole, parts = (load_checkpoint(f"{name}/checkpoint.pth.tar") for name in ("whole", "parts"))
    for key, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][key]), key
        assert not (key.startswith(absent + "_") and tensor.numel())
    evaluated = train("--load", "whole/best.pth.tar", "--evaluate", "-o", "evaluation")
    best = load_checkpoint("whole/best.pth.tar")
    assert evaluated.startswith(f"HR@10 = {best['hr']:.4f}, NDCG@10 = {best['ndcg']:.4f}")


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantize-eval", "--qe-dynamic"],
        ["--qe-calibration", "0.5"],
        ["--act-hist", "0.5"],
        ["--qe-auto"],
        ["--evaluate", "--split-final"],
    ],
)
@pytest.mark.parametrize("branch", ["gmf", "mlp"])
def test_what_takes_both_branches_is_refused_for_one(ncf, split_dir, pretrained, branch, flags):
    """In one line that names the flag and the file, with nothing written."""
    path = pretrained / branch / "best.pth.tar"
    outcome = ncf(split_dir, "--load", path, *flags, "-o", "out")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    flag = next(flag for flag in flags if flag != "--evaluate").replace(
        "--act-hist", "--activation-histograms"
    )
    assert flag in outcome.err and str(path) in outcome.err
    assert not Path("out").exists()


@pytest.mark.parametrize("flags", [["--layers", "0"], ["-f", "0"], ["--load", "gmf/best.pth.tar"]])
def test_one_branch_is_not_trained_to_be_quantized(ncf, split_dir, pretrained, monkeypatch, flags):
    """From the start or from a checkpoint."""
    monkeypatch.chdir(pretrained)
    schedule = SCHEDULE
    outcome = ncf(split_dir, *flags, "--compress", schedule, "-o", "out")
    assert outcome.code == 2
    assert outcome.err.startswith("ncf.py: error: --compress")
    assert not Path("out").exists()


# --- joined ---


@settings(deadline=None, max_examples=40)
@given(
    users=st.integers(1, 6),
    items=st.integers(1, 6),
    factors=st.integers(1, 5),
    first=st.integers(1, 4),
    rest=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    split_final=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_joined_logit_is_the_weighted_sum_of_the_branches(
    users, items, factors, first, rest, split_final, seed
):
    """For any sizes and weights."""
    layers = [2 * first, *rest]
    gmf = random_model(factors, [0], seed, users, items)
    mlp = random_model(0, layers, seed + 1, users, items)
    weights = joined_weights(gmf.state_dict(), mlp.state_dict())
    joined = NeuMF(users, items, factors, layers, split_final).double()
    joined.load_state_dict(with_final_layer(weights, split_final))
    pairs = all_pairs(users, items)
    torch.testing.assert_close(joined(*pairs), 0.5 * gmf(*pairs) + 0.5 * mlp(*pairs))


def test_joined_weights_by_hand():
    """One factor, one hidden unit: 0.5 (2 * 3 * 4 + 1) + 0.5 (relu(5 - 2 + 6) * 8 + 3) = 50."""
    gmf, mlp = random_model(1, [0], 0, 1, 1), random_model(0, [2, 1], 0, 1, 1)
    for model, values in (
        (gmf, {"mf_user_embed.weight": 2, "mf_item_embed.weight": 3, "final.weight": 4, "final.bias": 1}),
        (mlp, {"mlp_user_embed.weight": 5, "mlp_item_embed.weight": -2, "mlp.0.weight": 1, "mlp.0.bias": 6}),
        (mlp, {"final.weight": 8, "final.bias": 3}),
    ):
        for key, value in values.items():
            model.state_dict()[key].fill_(value)
    weights = joined_weights(gmf.state_dict(), mlp.state_dict())
    assert ALPHA == 0.5
    assert weights["final.weight"].tolist() == [[2.0, 4.0]]
    assert weights["final.bias"].tolist() == [2.0]
    joined = NeuMF(1, 1, 1, [2, 1]).double()
    joined.load_state_dict(weights)
    assert joined(torch.tensor([0]), torch.tensor([0])).item() == 50.0


# --- the run ---


def test_every_stage_leaves_a_run(pretrained):
    """The branches' within the whole one's, each with its own settings and its own lines in its own log."""
    for directory, factors, layers, rate in (
        (pretrained / "gmf", 4, [0], 0.01),
        (pretrained / "mlp", 0, [8, 6, 4], 0.01),
        (pretrained, 4, [8, 6, 4], 0.001),
    ):
        assert {path.name for path in directory.iterdir()} >= RUN
        config = json.loads((directory / "config.json").read_text())
        assert (config["factors"], config["layers"], config["learning_rate"]) == (factors, layers, rate)
        assert steps_of(directory) == 2 * STEPS
        assert (directory / "ncf.log").read_text().count("AvgTrainLoss") == 2
        assert len((directory / "valid_results.csv").read_text().splitlines()) == 3


def test_joined_run_begins_with_both_branches(split_dir, pretrained, monkeypatch, train):
    """What is trained on is the sum of the two, and its metrics are printed first."""
    begun = []
    take = Trainer.train

    def remember(self):
        begun.append({key: tensor.clone() for key, tensor in self.model.state_dict().items()})
        return take(self)

    monkeypatch.setattr(Trainer, "train", remember)
    out = train(*PRETRAIN, "-o", "run")
    gmf, mlp = (
        load_checkpoint(f"run/{branch}/checkpoint.pth.tar")["state_dict"] for branch in ("gmf", "mlp")
    )
    expected = joined_weights(gmf, mlp)
    assert begun[2].keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in begun[2].items())
    model = NeuMF(**sizes_from_state_dict(expected))
    model.load_state_dict(expected)
    assert f"Joined: {evaluate(float_scorer(model), load_split(split_dir))}\n" in out


# Within GMF, between the branches, within the MLP twice, between it and the joined run, within that, many times.
@pytest.mark.parametrize(
    "parts", [[10], [2 * STEPS], [2 * STEPS + 10, 5], [4 * STEPS], [4 * STEPS + 10], [50, 50, 50, 50]]
)
def test_resumed_run_ends_in_the_weights_of_an_unbroken_one(train, pretrained, parts):
    """Stopped in any stage: settings, weights, metrics, and the steps of all stages in one count."""
    train(*PRETRAIN, "--max-steps", parts[0], "-o", "parts")
    for steps in parts[1:]:
        train("--resume", "--max-steps", steps, "-o", "parts")
    done = sum(steps_of(path.parent) for path in Path("parts").rglob("checkpoint.pth.tar"))
    assert done == sum(parts)
    train("--resume", "-o", "parts")
    for stage in ("gmf", "mlp", "."):
        whole, resumed = (
            load_checkpoint(directory / stage / "checkpoint.pth.tar")
            for directory in (pretrained, Path("parts"))
        )
        assert whole["hr"] == resumed["hr"]
        for key, tensor in whole["state_dict"].items():
            assert torch.equal(tensor, resumed["state_dict"][key]), (stage, key)


def test_split_final_layer_is_the_joined_models(train):
    """The branches have one layer each; joined, each keeps its own, and the run is resumed as any."""
    train(*PRETRAIN, "--split-final", "--max-steps", 4 * STEPS + 10, "-o", "run")
    mlp, joined = (load_checkpoint(f"run/{stage}/checkpoint.pth.tar")["state_dict"] for stage in ("mlp", "."))
    assert "final.weight" in mlp
    assert joined["final_mf.weight"].shape == joined["final_mlp.weight"].shape == (1, 4)
    train("--resume", "-o", "run")
    assert steps_of("run") == 2 * STEPS


def test_branch_that_is_gone_is_trained_again(train, pretrained):
    """And no other one; to the same bits."""
    train(*PRETRAIN, "--max-steps", 4 * STEPS, "-o", "parts")
    shutil.rmtree("parts/mlp")
    out = train("--resume", "-o", "parts")
    assert "GMF alone" not in out
    assert "MLP alone" in out
    whole, resumed = (
        load_checkpoint(directory / "checkpoint.pth.tar")["state_dict"]
        for directory in (pretrained, Path("parts"))
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_resumed_joined_run_trains_no_branch_again(train, pretrained):
    """Once they are joined, their directories may go; the run goes on to more epochs."""
    shutil.copytree(pretrained, "run")
    shutil.rmtree("run/gmf")
    shutil.rmtree("run/mlp")
    out = train("--resume", "-e", 3, "-o", "run")
    assert re.findall(r"^Epoch (\d+):", out, re.MULTILINE) == ["2"]


def test_settings_of_one_resume_are_the_stage_s(train):
    """Another rate for the branches is that of the steps that they have yet to take."""
    train(*PRETRAIN, "--max-steps", 10, "-o", "run")
    train("--resume", "--pretrain-rate", 0.02, "--max-steps", 10, "-o", "run")
    assert json.loads(Path("run/gmf/config.json").read_text())["learning_rate"] == 0.02
    group = load_checkpoint("run/gmf/checkpoint.pth.tar")["optimizer_state_dict"]["param_groups"][0]
    assert group["lr"] == 0.02


def test_without_a_directory_all_stages_share_a_fresh_one(train):
    """As any run without -o."""
    train(*PRETRAIN, "--name", "named")
    (directory,) = Path("run/neumf").iterdir()
    assert directory.name.startswith("named-")
    assert {path.name for path in directory.iterdir() if path.is_dir()} == {"gmf", "mlp"}
    assert {path.name for path in directory.iterdir()} >= RUN


def test_overwriting_begins_with_the_branches(train, pretrained):
    """What an earlier run left in any stage is not taken for the new one's, even when the new one is stopped."""
    shutil.copytree(pretrained, "run")
    train(*PRETRAIN, "-s", 2, "--overwrite", "--max-steps", 5, "-o", "run")
    assert not [path for path in Path("run").rglob("*.pth.tar") if path.parent.name != "gmf"]
    train("--resume", "-o", "run")
    train(*PRETRAIN, "-s", 2, "-o", "fresh")
    first, second = (load_checkpoint(f"{name}/checkpoint.pth.tar")["state_dict"] for name in ("run", "fresh"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("at", [5, STEPS + 5, 2 * STEPS + 5, 4 * STEPS + 5])
def test_signal_in_any_stage_is_gone_on_from(ncf, split_dir, pretrained, monkeypatch, train, at):
    """In GMF's training, its second epoch, the MLP's training, the joined one: to the same last weights."""
    taken, take = [], Step.__call__

    def interrupted(self, batch):
        taken.append(None)
        if len(taken) == at:
            signal.raise_signal(signal.SIGTERM)
        return take(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        assert ncf(split_dir, *PRETRAIN, "-o", "run").code == 143
    train("--resume", "-o", "run")
    weights = [load_checkpoint(Path(run) / "checkpoint.pth.tar")["state_dict"] for run in ("run", pretrained)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_killed_before_its_first_checkpoint_begins_again(ncf, split_dir, pretrained, train, branch):
    """What was trained before it is kept, and the end is that of a run that nothing stopped."""
    shutil.copytree(pretrained, "run")
    for directory in [
        Path("run"),
        *(Path("run", name) for name in list(BRANCHES)[list(BRANCHES).index(branch) :]),
    ]:
        for name in ("checkpoint.pth.tar", "best.pth.tar", "valid_results.csv"):
            (directory / name).unlink()
    train("--resume", "-o", "run")
    weights = [load_checkpoint(Path(run) / "checkpoint.pth.tar")["state_dict"] for run in ("run", pretrained)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_branches_are_no_other_runs_while_either_is_trained(ncf, split_dir, monkeypatch, train):
    """A second run in a branch's directory is refused, also once that branch is trained."""
    refusals, take = [], Trainer.train

    def run(self):
        for branch in BRANCHES:
            with pytest.raises(InputError, match="is in use by"), run_directory(Path("run", branch)):
                pass
            refusals.append(branch)
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", run)
        assert ncf(split_dir, *PRETRAIN, "--max-steps", 2 * STEPS + 1, "-o", "run").code == 0
    assert refusals == [*BRANCHES] * 2
    with run_directory(Path("run/gmf")):
        pass


def test_joined_model_is_the_best_so_far(train):
    """Where training on makes it no better; its checkpoint is what a run that is stopped at once goes on from."""
    out = train(*PRETRAIN, "-l", 3, "-o", "run")
    best, last = (load_checkpoint(f"run/{name}.pth.tar") for name in ("best", "checkpoint"))
    assert (best["epoch"], last["epoch"]) == (-1, 1)
    assert f"Joined: HR@10 = {best['hr']:.4f}" in out
    joined = joined_weights(*(load_checkpoint(f"run/{b}/checkpoint.pth.tar")["state_dict"] for b in BRANCHES))
    assert all(torch.equal(best["state_dict"][key], joined[key]) for key in joined)


def test_validated_branches_never_see_the_test_items(train):
    """The branches hold the validation items out too; the joined run's best epoch alone is tested, once."""
    out = train(*PRETRAIN, "--validate", "--report", "report.json", "-o", "run")
    assert out.count("Test, ") == 1
    assert out.index("Joined: ") < out.index("Test, ")
    for stage in ("gmf", "mlp", "."):
        assert json.loads(Path("run", stage, "config.json").read_text())["validate"] is True
    assert not list(Path("run/gmf").glob("ranks*")) + list(Path("run/mlp").glob("ranks*"))
    assert json.loads(Path("report.json").read_text())["model"]["validate"] is True


def test_each_branch_has_its_own_epochs(train):
    """Also where the run is gone on with."""
    train(*SIZES, "-s", 1, "-e", 1, "--pretrain", 1, 2, "--max-steps", STEPS + 5, "-o", "run")
    train("--resume", "-o", "run")
    assert [steps_of(f"run/{stage}") for stage in ("gmf", "mlp", ".")] == [STEPS, 2 * STEPS, STEPS]


def test_threshold_and_schedule_are_the_joined_runs(train):
    """They end and change its training alone."""
    Path("schedule.yaml").write_text(
        "lr_schedulers:\n  decay: {class: ExponentialLR, gamma: 0.5}\n"
        "policies:\n  - {lr_scheduler: {instance_name: decay}, epochs: [0, 1]}\n"
    )
    train(*PRETRAIN, "-t", "0.0001", "--compress", "schedule.yaml", "-o", "run")
    assert [steps_of(f"run/{stage}") for stage in ("gmf", "mlp", ".")] == [2 * STEPS, 2 * STEPS, STEPS]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--load", "CHECKPOINT"], ["--pretrain", "--load"]),
        (["--load", "CHECKPOINT", "--evaluate"], ["--pretrain", "--evaluate"]),
        (["--compress", "missing.yaml", "-o", "out"], ["missing.yaml"]),
        (["-o", "PRETRAINED"], ["PRETRAINED", "--resume", "--overwrite"]),
        (["-o", "PRETRAINED/.."], []),
        (["-o", "PRETRAINED", "--resume"], ["--pretrain", "joined"]),
    ],
)
def test_bad_combination_is_one_line_and_leaves_no_file(
    ncf, split_dir, checkpoint, pretrained, contents, flags, parts
):
    """Flags that exclude each other, a file that is missing, a directory that holds a run."""
    places = {"CHECKPOINT": str(checkpoint), "PRETRAINED": str(pretrained)}
    if flags[-1] == "PRETRAINED/..":  # a directory of no run, in which a branch's place holds one
        shutil.copytree(pretrained, "other/mlp")
        flags, parts = ["-o", "other"], ["other/mlp", "--overwrite"]
    before = contents(Path()), contents(pretrained)
    outcome = ncf(split_dir, *SIZES, "--pretrain", 2, *(places.get(flag, flag) for flag in flags))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    for part in parts:
        assert places.get(part, part) in outcome.err
    assert (contents(Path()), contents(pretrained)) == before


def test_damaged_branch_is_named(ncf, split_dir, train):
    """A branch whose checkpoint was cut short; the run goes on once it is back."""
    train(*PRETRAIN, "--max-steps", 4 * STEPS, "-o", "run")
    last = Path("run/mlp/checkpoint.pth.tar")
    content = last.read_bytes()
    last.write_bytes(content[:100])
    outcome = ncf(split_dir, "--resume", "-o", "run")
    assert outcome.code == 2
    assert str(last) in outcome.err
    last.write_bytes(content)
    train("--resume", "-o", "run")


# --- the table ---

TABLE = ["--layers", 8, 6, 4, "--factors", 4, "--batch-size", 256, "--pretrain", 1, 1, "--epochs", 2]


def make_table(split_dir: Path, *flags: object) -> tuple[dict[str, list[str]], str]:
    """The table of two seeds, its cells by their row, and the line below it."""
    outcome = call("pretraining.py", table.main, (split_dir, *TABLE, "--seeds", 1, 2, *flags))
    assert outcome.code == 0, outcome.err
    *lines, _, protocol = outcome.out.strip().split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(cells[0]) == table.HEADER
    return {first: rest for first, *rest in cells[2:]}, protocol


def test_table_has_what_the_runs_left(scripts_here, split_dir):
    """Of both seeds: a branch's last epoch, the joined model, the best epoch after it."""
    rows, protocol = make_table(split_dir, "--out", "out")
    assert list(rows) == ["GMF", "MLP", "joined", "NeuMF"]
    assert [command[0] for command in scripts_here] == ["ncf.py", "ncf.py"]
    for model, directory, file in (("GMF", "gmf", "checkpoint"), ("NeuMF", ".", "best")):
        hrs = [100 * load_checkpoint(f"out/seed-{s}/{directory}/{file}.pth.tar")["hr"] for s in (1, 2)]
        # The table's figures are from files that round to four decimals.
        found = [float(figure) for figure in rows[model][0].split(" ± ")]
        assert found == pytest.approx([mean(hrs), stdev(hrs)], abs=0.02)
    assert [row[2] for row in rows.values()] == ["1", "1", "", "2"]
    assert "40 negatives per user" in protocol
    assert "seeds 1 2" in protocol


def test_table_goes_on_where_it_was(scripts_here, split_dir):
    """A run that is there is read, one that was stopped is resumed, one with other settings is refused."""
    rows, _ = make_table(split_dir, "--out", "out")
    scripts_here.clear()
    assert make_table(split_dir, "--out", "out")[0] == rows
    assert not scripts_here
    words = [split_dir, "-b", 256, *SIZES, "-n", 8, "--l2", 0.002, "--pretrain", 1]
    words += ["-l", 0.00001, "-e", 2, "-s", 1, "--overwrite"]
    assert run_ncf(*words, "--max-steps", STEPS + 5, "-o", "out/seed-1").code == 0
    again, _ = make_table(split_dir, "--out", "out")
    assert [command[2] for command in scripts_here] == ["--resume"]
    assert [row[:3] for row in again.values()] == [row[:3] for row in rows.values()]
    outcome = call("pretraining.py", table.main, (split_dir, *TABLE, "--epochs", 3, "--out", "out"))
    assert outcome.code == 2
    assert "out/seed-1 has epochs 2, not 3: --overwrite trains anew" in outcome.err
