"""The flags of ncf.py and of the commands that train, evaluate, calibrate and choose: what each of them means.

Defaults are those of ``Settings``. What excludes what is in conflicts.py.
"""

from __future__ import annotations

from argparse import Action, RawDescriptionHelpFormatter, _ArgumentGroup
from collections.abc import Callable
from pathlib import Path

from distiller.quantization import add_post_train_quant_args
from distiller.quantization.flags import portion
from distiller.system.cli import ArgumentParser
from neural_cf.ranking.places import RANKINGS
from neural_cf.runs.directory import RUNS
from neural_cf.runs.hardware import PRECISIONS
from neural_cf.runs.settings import Settings

AddArgument = Callable[..., Action]

PROG = "ncf.py"
# The epochs of GMF and of the MLP, which is at its best long before: docs/training.md, "Pre-training".
PRETRAIN_EPOCHS = (18, 8)
REPORT_SHARE = 0.1  # of the users, for --qe-report: a look at every layer in the time of an evaluation
NUMBER = {"type": int, "metavar": "N"}
# The shares of data that are calibrated on when the command's name asks for it.
CALIBRATION_SHARE = 0.1
EXAMPLES = f"""examples:
  {PROG} ml-1m --factors 64 --layers 256 256 128 64 --batch-size 2048 -o run/a       train, keep the best epoch
  {PROG} ml-1m --load run/a/best.pth.tar --evaluate -k 5 10                          hit rate and NDCG in FP32
  {PROG} ml-1m --load run/a/best.pth.tar --qe-calibration 0.1 --qe-stats-out s.yaml  ranges of activations
  {PROG} ml-1m --load run/a/best.pth.tar --quantize-eval --qe-stats-file s.yaml      the same in INT8
  {PROG} ml-1m --load run/a/best.pth.tar --qe-auto -o run/auto                       an INT8 that loses next to nothing
"""


def build_parser(prog: str = PROG) -> ArgumentParser:
    """Return the parser of ncf.py's command line, which has all flags."""
    parser = new_parser(
        prog, f"Train NeuMF on a split, calibrate it, quantize it after training, evaluate it.\n\n{EXAMPLES}"
    )
    model = parser.add_argument_group("Model").add_argument
    add_sizes(model)
    add_final_layer(model)
    add_load(model, "checkpoint to evaluate, to calibrate, or to go on training from")
    add_training_flags(parser.add_argument_group("Training").add_argument)
    evaluation = parser.add_argument_group("Evaluation")
    evaluation.add_argument(
        *("--eval", "--evaluate"), dest="evaluate", action="store_true", help="evaluate and do not train"
    )
    add_half_precision(evaluation)
    add_metrics(evaluation.add_argument)
    add_run_flags(parser.add_argument_group("Run").add_argument)
    calibration = parser.add_argument_group("Calibration and choice of a quantization")
    add_stats_out(calibration.add_argument)
    add_calibrate_on(calibration.add_argument)
    add_histograms(calibration.add_argument)
    add_loss_report(calibration.add_argument)
    calibration.add_argument(
        "--qe-auto",
        action="store_true",
        help="choose the cheapest quantization within --qe-max-loss by a fifth of the users, report it on the others, "
        "and write it as a --qe-config-file",
    )
    add_budget(calibration.add_argument)
    add_post_train_quant_args(parser)
    return parser


def new_parser(prog: str, description: str) -> ArgumentParser:
    """Return a parser of a command that works on a split, with the split as its argument."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} SPLIT [flags]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data", type=Path, metavar="SPLIT", help="directory of the split, written by convert.py"
    )
    return parser


def add_sizes(add: AddArgument) -> None:
    """Add the flags of a model's sizes."""
    add(
        *("-f", "--factors"),
        **NUMBER,
        default=Settings.factors,
        help="factors of the matrix factorization; 0 leaves the MLP alone (default: a checkpoint's own, else "
        "%(default)s)",
    )
    add(
        "--layers",
        **NUMBER,
        nargs="+",
        default=Settings.layers,
        help="sizes of the MLP's layers, that of [user, item] first, for example 256 256 128 64; 0 leaves the matrix "
        f"factorization alone (default: a checkpoint's own, else {' '.join(map(str, Settings.layers))})",
    )


def add_final_layer(add: AddArgument) -> None:
    """Add the flag that splits the final layer."""
    add(
        *("--split-final", "--sf"),
        action="store_true",
        help="give each branch a final layer and add their outputs, which loses less in INT8",
    )


def add_load(add: AddArgument, text: str) -> None:
    """Add the flag that names a checkpoint."""
    add("--load", type=Path, metavar="FILE", help=text)


def add_training_flags(add: AddArgument) -> None:
    """Add the flags of training."""
    add_recipe(add)
    add_ends(add)
    add_pretraining(add)
    add_continuation(add)
    add("--compress", metavar="FILE", help="YAML of quantization-aware training and learning-rate schedules")
    add(
        "--param-hist",
        action="store_true",
        help="write histograms of the weights after every epoch, to TensorBoard and as pictures",
    )


def add_recipe(add: AddArgument) -> None:
    """Add the flags of a training step."""
    add(
        *("-b", "--batch-size"),
        **NUMBER,
        default=Settings.batch_size,
        help="samples in a step, over all of torchrun's processes together (default: %(default)s)",
    )
    add_negative_samples(add)
    add(
        *("-l", "--learning-rate"),
        type=float,
        default=Settings.learning_rate,
        metavar="RATE",
        help="learning rate of Adam (default: that of a checkpoint's optimizer, else %(default)s)",
    )
    add(
        "--l2",
        type=float,
        default=Settings.l2,
        metavar="WEIGHT",
        help="add WEIGHT times the squares of its embeddings to each sample's loss, GMF's times the final layer's "
        "absolute weights (default: %(default)s)",
    )
    add(
        "--optimizer",
        choices=["lazy-adam", "adam"],
        default=Settings.optimizer,
        help="lazy-adam takes Adam's steps for the rows that a batch touches, and for the others when they are "
        "needed, to the same weights up to rounding; adam is PyTorch's, over everything (default: %(default)s)",
    )
    add_precision(add)
    add_seed(add)


def add_precision(add: AddArgument) -> None:
    """Add the flags of how floats are computed."""
    add(
        "--precision",
        choices=PRECISIONS,
        help="precision of the matrix products; weights and Adam stay in fp32 (default: bf16 for training where the "
        "processor or GPU has it natively, else and for evaluation fp32)",
    )
    add("--no-compile", action="store_true", help="compute without torch.compile")


def add_negative_samples(add: AddArgument) -> None:
    """Add the flag of negatives in training pairs."""
    add(
        *("-n", "--negative-samples"),
        **NUMBER,
        default=Settings.negative_samples,
        help="negatives drawn for each training positive (default: %(default)s)",
    )


def add_ends(add: AddArgument) -> None:
    """Add the flags that say when training ends."""
    add(
        *("-e", "--epochs"),
        **NUMBER,
        default=Settings.epochs,
        help="epochs to train, counted from the first one ever (default: %(default)s)",
    )
    add("-t", "--threshold", type=float, metavar="HR", help="stop training once HR@K reaches this")
    add("--patience", **NUMBER, help="stop training N epochs after the best one")
    add("--max-steps", **NUMBER, help="stop training after N steps, evaluate and save")
    add(
        "--validate",
        action="store_true",
        help="hold out the item before the last too, choose the best epoch by it, and evaluate that one on the last",
    )


def add_pretraining(add: AddArgument) -> None:
    """Add the flags that train the two branches first."""
    add(
        "--pretrain",
        type=int,
        nargs="*",
        metavar="EPOCHS",
        help="first train GMF and MLP alone for so many epochs, the same for both or one number each "
        f"(default: {' '.join(map(str, PRETRAIN_EPOCHS))}), in gmf and mlp within the run's directory, and begin with "
        "both joined",
    )
    add(
        "--pretrain-rate",
        type=float,
        default=Settings.pretrain_rate,
        metavar="RATE",
        help="learning rate of Adam in --pretrain's epochs (default: %(default)s)",
    )


def add_continuation(add: AddArgument) -> None:
    """Add the flags of saving and going on."""
    add(
        "--save-every",
        **NUMBER,
        help="save every N steps within an epoch too, so that a kill loses at most N (default: after each epoch)",
    )
    add(
        "--reset-optimizer",
        action="store_true",
        help="with --load: a fresh optimizer, and epochs counted from 0",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in -o, with its settings where no flag gives another one",
    )
    add("--overwrite", action="store_true", help="train in -o although it holds a run; that run is lost")


def add_cutoffs(add: AddArgument) -> None:
    """Add the flag of the metrics' cut-offs."""
    add(
        *("-k", "--topk"),
        **NUMBER | {"metavar": "K"},
        nargs="+",
        default=Settings.cutoffs,
        dest="cutoffs",
        help="cut-offs of HR@K and NDCG@K, for example -k 5 10 20; with several, MRR@K is shown too and the first one "
        "decides which epoch is the best (default: 10)",
    )


def add_seed(add: AddArgument) -> None:
    """Add the flag of the seed."""
    add(
        *("-s", "--seed"),
        type=int,
        help="seed of initial weights and of samples (default: a random one, which is recorded)",
    )


def add_metrics(add: AddArgument) -> None:
    """Add the flags of what is measured."""
    add_cutoffs(add)
    add(
        "--ranking",
        choices=RANKINGS,
        default=Settings.ranking,
        help="rank test items against their negatives, or against every item that the user has not trained on "
        "(default: %(default)s)",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="with --evaluate or --validate: write metrics, ties and intervals, and what they rest on, for "
        "neural-cf compare",
    )


def add_half_precision(group: _ArgumentGroup) -> None:
    """Add the flag that evaluates in half precision."""
    group.add_argument("--eval-fp16", action="store_true", help="evaluate in half precision and do not train")


def add_calibrate_on(add: AddArgument) -> None:
    """Add the flag of the data that is calibrated on."""
    add(
        "--calibrate-on",
        choices=["test", "train"],
        default=Settings.calibrate_on,
        help="calibrate, or compare tensors, on the first test users' candidates, or on training pairs, so that "
        "nothing of the test set is used (default: %(default)s)",
    )


def add_stats_out(add: AddArgument) -> None:
    """Add the flag of where statistics go."""
    add("--qe-stats-out", metavar="PATH", help="where else --qe-calibration writes its statistics")


def add_histograms(add: AddArgument) -> None:
    """Add the flag that draws histograms of activations."""
    add(
        *("--activation-histograms", "--act-hist"),
        type=portion,
        metavar="PORTION",
        help="write histograms of activations on this share of the data, to TensorBoard and as pictures, and do not "
        "train",
    )


def add_loss_report(add: AddArgument) -> None:
    """Add the flag that reports what quantization loses."""
    add(
        "--qe-report",
        type=portion,
        nargs="?",
        const=REPORT_SHARE,
        metavar="PORTION",
        help="with --quantize-eval: show what every tensor and every layer loses, on this share of the data (default: "
        f"{REPORT_SHARE}), as a table, a CSV file and pictures",
    )


def add_budget(add: AddArgument) -> None:
    """Add the flag of what may be lost."""
    add(
        "--qe-max-loss",
        type=float,
        default=Settings.qe_max_loss,
        metavar="POINTS",
        help="what --qe-auto may lose of HR@K and of NDCG@K, in hundredths (default: %(default)s)",
    )


def add_run_flags(add: AddArgument) -> None:
    """Add the flags of where and on what a run is made."""
    add(
        *("-o", "--out-dir"),
        type=Path,
        metavar="DIR",
        help=f"the run's directory (default: a fresh one in {RUNS})",
    )
    add("--name", help="text that stands before the date in the name of a fresh directory")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings in YAML or JSON, such as the config.json of a run; flags beside it win",
    )
    add("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")
    add("--gpus", type=int, metavar="ID", help="number of the GPU to use (default: 0, where there is one)")
    add(
        *("-p", "--threads", "--processes"),
        **NUMBER,
        dest="threads",
        help="processor threads, at most one per processor (default: PyTorch's choice). The original scored in so "
        "many processes, and --processes is its name for it",
    )
    add(
        *("-w", "--workers"),
        **NUMBER,
        help="accepted for old command lines, and without effect: batches are drawn as whole tensors",
    )
    add(
        *("--log-freq", "--lf"),
        **NUMBER,
        default=Settings.log_freq,
        help="steps between two updates of the progress bar and of TensorBoard (default: %(default)s)",
    )
