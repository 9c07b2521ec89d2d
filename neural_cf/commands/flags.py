"""The flags of ncf.py: what they are, what they are in a resumed run, and what does not go together."""

from __future__ import annotations

import json
import math
import reprlib
import secrets
from argparse import Action, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distiller.quantization import add_post_train_quant_args
from distiller.quantization.flags import portion
from distiller.system.cli import ArgumentParser, InputError
from distiller.untrusted.yaml import read_yaml
from neural_cf.model import check_sizes, has_both_branches
from neural_cf.ranking.places import RANKINGS
from neural_cf.runs.directory import CHECKPOINT, CONFIG, RUNS
from neural_cf.runs.hardware import PRECISIONS

PROG = "ncf.py"
AddArgument = Callable[..., Action]
# Of GMF and MLP, which is at its best long before: README, "Pre-training".
PRETRAIN_EPOCHS = [18, 8]
# Far beyond any use, and short of what takes all memory before anything can be said of it.
MAX_SIZE, MAX_WIDTH, MAX_NEGATIVE_SAMPLES = 1 << 31, 1 << 16, 1000
# What a resumed run does not take over from the settings it began with.
OF_EACH_START = {"data", "out_dir", "resume", "overwrite", "load", "reset_optimizer", "max_steps", "report"}


def build_parser() -> ArgumentParser:
    """The parser of ncf.py's command line."""
    parser = ArgumentParser(
        prog=PROG,
        description="Train NeuMF on a MovieLens split, calibrate it, quantize it after training, evaluate it.",
    )
    parser.add_argument("data", type=Path, help="directory of the split, written by convert.py")
    add_model_flags(parser.add_argument_group("Model").add_argument)
    add_training_flags(parser.add_argument_group("Training").add_argument)
    add_evaluation_flags(parser.add_argument_group("Evaluation and calibration").add_argument)
    add_run_flags(parser.add_argument_group("Run").add_argument)
    add_post_train_quant_args(parser)
    return parser


def add_model_flags(add: AddArgument) -> None:
    add(
        *("-f", "--factors"),
        type=int,
        default=8,
        metavar="N",
        help="factors of the matrix factorization; 0: an MLP alone (default: a checkpoint's own, else %(default)s)",
    )
    add(
        "--layers",
        type=int,
        nargs="+",
        default=[64, 32, 16, 8],
        metavar="N",
        help="MLP layer sizes, that of [user, item] first; 0: matrix factorization alone (default: a checkpoint's own, "
        "else 64 32 16 8)",
    )
    add("--split-final", "--sf", action="store_true", help="a final layer per branch, and their sum")
    add("--load", metavar="FILE", help="checkpoint to evaluate, to calibrate, or to go on training from")


def add_training_flags(add: AddArgument) -> None:
    number = {"type": int, "metavar": "N"}
    add("-e", "--epochs", **number, default=20, help="to train, from the first ever (default: %(default)s)")
    add(
        "-b",
        "--batch-size",
        **number,
        default=256,
        help="samples a step, in all of torchrun's processes together (default: %(default)s)",
    )
    add(
        *("-n", "--negative-samples"),
        **number,
        default=4,
        help="negatives drawn for each training positive (default: %(default)s)",
    )
    add(
        *("-l", "--learning-rate"),
        type=float,
        default=0.001,
        metavar="RATE",
        help="of Adam (default: that of a checkpoint's optimizer, else %(default)s)",
    )
    add(
        "--l2",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="add WEIGHT times the squares of its embeddings to each sample's loss, GMF's times the final layer's "
        "absolute weights (default: %(default)s)",
    )
    add(
        "--optimizer",
        choices=["lazy-adam", "adam"],
        default="lazy-adam",
        help="lazy-adam computes Adam's steps for the rows that a batch touches, and for the others when they are "
        "needed, to the same weights up to rounding; adam is PyTorch's, over everything (default: %(default)s)",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the matrix products; weights and Adam stay in fp32 (default: in training bf16 where the processor or "
        "GPU has it natively, else and in evaluation fp32)",
    )
    add("--no-compile", action="store_true", help="compute without torch.compile")
    add("-s", "--seed", type=int, help="of initial weights and of samples (default: drawn, and recorded)")
    add("-t", "--threshold", type=float, metavar="HR", help="stop training once HR@K reaches this")
    add("--max-steps", **number, help="stop training after N steps, evaluate and save")
    add(
        "--validate",
        action="store_true",
        help="hold out the item before the last too, choose the best epoch by it, and evaluate that one on the last",
    )
    add(
        "--save-every",
        **number,
        help="within an epoch too, save every N steps, so that a kill loses at most N (default: after each epoch)",
    )
    add(
        "--pretrain",
        type=int,
        nargs="*",
        metavar="EPOCHS",
        help="first train GMF and MLP alone for so many epochs, of both or of each "
        f"(default: {' '.join(map(str, PRETRAIN_EPOCHS))}), in gmf and mlp within the run's directory, and begin with "
        "both joined",
    )
    add(
        "--pretrain-rate",
        type=float,
        default=0.001,
        metavar="RATE",
        help="of Adam in --pretrain's epochs (default: %(default)s)",
    )
    add("--reset-optimizer", action="store_true", help="with --load: a fresh optimizer, and epochs from 0")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in -o, with its settings where none are given",
    )
    add("--overwrite", action="store_true", help="train in -o although it holds a run; that run is lost")
    add("--compress", metavar="FILE", help="YAML of quantization-aware training and learning-rate schedules")
    add(
        "--param-hist",
        action="store_true",
        help="every epoch, histograms of weights: TensorBoard and pictures",
    )


def add_evaluation_flags(add: AddArgument) -> None:
    add("--eval", "--evaluate", dest="evaluate", action="store_true", help="evaluate; no training")
    add("--eval-fp16", action="store_true", help="evaluate in half precision; no training")
    add(
        *("-k", "--topk"),
        type=int,
        nargs="+",
        default=[10],
        dest="cutoffs",
        metavar="K",
        help="of HR@K and NDCG@K; several for MRR@K too, of which the first decides which epoch is the best and all "
        "else that takes one (default: 10)",
    )
    add(
        "--ranking",
        choices=RANKINGS,
        default="sampled",
        help="rank test items against their negatives, or against every item that the user has not trained on "
        "(default: %(default)s)",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="with --evaluate or --validate: metrics, ties and intervals, and what they rest on, for compare.py",
    )
    add(
        *("--activation-histograms", "--act-hist"),
        type=portion,
        metavar="PORTION",
        help="histograms of activations on this share of the data: TensorBoard and pictures; no training",
    )
    add(
        "--qe-report",
        type=portion,
        nargs="?",
        const=0.1,
        metavar="PORTION",
        help="with --quantize-eval: what every tensor and every layer loses, on this share of the data (0.1 where none "
        "is given): a table, a CSV file and pictures",
    )
    add(
        "--qe-auto",
        action="store_true",
        help="choose the cheapest quantization within --qe-max-loss by a fifth of the users, report it on the others, "
        "and write it as a --qe-config-file",
    )
    add(
        "--qe-max-loss",
        type=float,
        default=0.05,
        metavar="POINTS",
        help="of HR@K and of NDCG@K that --qe-auto may lose, in hundredths (default: %(default)s)",
    )
    add("--qe-stats-out", metavar="PATH", help="where else --qe-calibration writes its statistics")
    add(
        "--calibrate-on",
        choices=["test", "train"],
        default="test",
        help="calibrate, or compare tensors, on the first test users' candidates, or on training pairs, so that "
        "nothing of the test set is used (default: %(default)s)",
    )


def add_run_flags(add: AddArgument) -> None:
    number = {"type": int, "metavar": "N"}
    add(
        "-o",
        "--out-dir",
        metavar="DIR",
        help=f"the run's directory (default: a fresh one in {RUNS})",
    )
    add("--name", help="stands before the date in the name of a fresh directory")
    add("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")
    add("--gpus", type=int, metavar="ID", help="number of the GPU to use (default: 0, where there is one)")
    add(
        *("-p", "--processes"),
        **number,
        help="processor threads, at most one per processor (default: PyTorch's choice). "
        "Scoring is vectorised over users: there are no processes to share it",
    )
    add(
        *("-w", "--workers"),
        **number,
        help="accepted, for old command lines. Batches are drawn as whole tensors: there are no loader workers",
    )
    add(
        *("--log-freq", "--lf"),
        **number,
        default=100,
        help="steps between updates of progress bar and TensorBoard (default: %(default)s)",
    )


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, and as ``given`` the names of those on the command line; on ``--resume`` the others are the run's."""
    parser = build_parser()
    args = parser.parse_args(argv)
    absent = object()
    marked = parser.parse_args(argv, Namespace(**dict.fromkeys(vars(args), absent)))
    args.given = {name for name, value in vars(marked).items() if value is not absent}
    if args.resume:
        take_settings(args, parser, read_config(args))
    args.topk = args.cutoffs[0]
    if args.pretrain is not None and len(args.pretrain) < 2:
        args.pretrain = 2 * args.pretrain or PRETRAIN_EPOCHS
    check_args(args)
    if args.seed is None:
        args.seed = secrets.randbelow(1 << 32)
    return args


def take_settings(args: Namespace, parser: ArgumentParser, config: dict[str, Any]) -> None:
    """Set what no flag has given as the run's configuration has it."""
    for action in parser._actions:
        name = action.dest
        if name in config and name not in args.given | OF_EACH_START:
            if not is_setting_of(action, config[name]):
                value = reprlib.repr(config[name])
                raise InputError(f"--resume: {Path(args.out_dir) / CONFIG}: {name} is {value}")
            setattr(args, name, config[name])


def is_setting_of(action: Action, value: object) -> bool:
    """Whether a value is such as a flag gives."""
    if action.nargs == 0:
        return type(value) is bool
    if value is None:
        return action.default is None
    types = {int: (int,), None: (str,)}.get(action.type, (int, float))
    values = value if action.nargs in ("+", "*") else [value]
    fit = isinstance(values, list) and all(type(each) in types for each in values)
    return fit and bool(values or not action.default) and (action.choices is None or value in action.choices)


def asks_for_split(path: str) -> bool:
    """Whether a ``--qe-config-file`` is for a split final layer: ``split_final``, beside its quantizer."""
    content = read_yaml(path, "--qe-config-file")
    value = content.get("split_final", False) if isinstance(content, dict) else False
    if not isinstance(value, bool):
        raise InputError(f"--qe-config-file: {path}: split_final: {value!r} is neither true nor false")
    return value


def read_config(args: Namespace) -> dict[str, Any]:
    """The settings of the run to go on with."""
    if args.out_dir is None:
        raise InputError("--resume needs -o/--out-dir: the run to go on with")
    directory = Path(args.out_dir)
    path = directory / CONFIG
    try:
        config = dict(json.loads(path.read_text())) if path.is_file() else {}
        if config:
            config.setdefault("cutoffs", [config["topk"]])  # of runs from before there were several
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"--resume: {path}: {error}") from error
    # A run that trains its branches first has no checkpoint of its own until they are joined.
    joined = (directory / CHECKPOINT).is_file()
    if not config or not (joined or config.get("pretrain")):
        raise InputError(f"--resume: {directory} holds no run with a checkpoint to go on from")
    if joined and "pretrain" in args.given:
        raise InputError(f"--pretrain: the branches of {directory} are joined already")
    return config


def check_args(args: Namespace) -> None:
    """Raise an ``InputError`` for flags out of range, or at odds with each other."""
    for flag, value, least, greatest in (
        ("-e/--epochs", args.epochs, 1, MAX_SIZE),
        ("-b/--batch-size", args.batch_size, 1, MAX_SIZE),
        ("-f/--factors", args.factors, 0, MAX_WIDTH),
        ("--layers", max(args.layers), 0, MAX_WIDTH),
        ("--pretrain", args.pretrain and min(args.pretrain), 1, MAX_SIZE),
        ("--pretrain", args.pretrain and max(args.pretrain), 1, MAX_SIZE),
        ("-n/--negative-samples", args.negative_samples, 1, MAX_NEGATIVE_SAMPLES),
        ("-k/--topk", min(args.cutoffs), 1, MAX_SIZE),
        ("-k/--topk", max(args.cutoffs), 1, MAX_SIZE),
        ("-p/--processes", args.processes, 1, MAX_SIZE),
        ("--max-steps", args.max_steps, 1, MAX_SIZE),
        ("--save-every", args.save_every, 1, MAX_SIZE),
        ("--log-freq", args.log_freq, 1, MAX_SIZE),
        ("-s/--seed", args.seed, 0, (1 << 63) - 1),
        ("--qe-max-loss", args.qe_max_loss, 0, 100),
    ):
        if value is not None and not least <= value <= greatest:
            raise InputError(f"{flag} must be from {least} to {greatest}, not {value}")
    for flag, rate in (("-l/--learning-rate", args.learning_rate), ("--pretrain-rate", args.pretrain_rate)):
        if not 0 < rate < math.inf:
            raise InputError(f"{flag} must be above 0, not {rate}")
    if not 0 <= args.l2 < math.inf:
        raise InputError(f"--l2 must be at least 0, not {args.l2}")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"-t/--threshold must be above 0 and at most 1, not {args.threshold}")
    if len(set(args.cutoffs)) < len(args.cutoffs):
        raise InputError(f"-k/--topk: {' '.join(map(str, args.cutoffs))} has a number twice")
    check_sizes(1, 1, args.factors, args.layers, args.split_final)
    check_combination(args)


def check_combination(args: Namespace) -> None:
    """Raise an ``InputError`` for a flag that another one, or its absence, leaves without effect."""
    evaluates = args.evaluate or args.quantize_eval or args.eval_fp16
    modes = {
        "--qe-calibration": args.qe_calibration,
        "--activation-histograms": args.activation_histograms,
        "--qe-auto": args.qe_auto,
        "--quantize-eval"
        if args.quantize_eval
        else "--eval-fp16"
        if args.eval_fp16
        else "--evaluate": evaluates,
    }
    asked = [flag for flag, given in modes.items() if given]
    if len(asked) > 1:
        raise InputError(f"{asked[0]} and {asked[1]} exclude each other")
    if args.eval_fp16 and args.quantize_eval:
        raise InputError("--eval-fp16 and --quantize-eval exclude each other")
    if asked:
        if not args.load:
            raise InputError(f"{asked[0]} needs --load: a checkpoint")
        for name in (
            "resume",
            "overwrite",
            "reset_optimizer",
            "max_steps",
            "save_every",
            "threshold",
            "compress",
            "param_hist",
            "validate",
            "pretrain",
            "l2",
        ):
            if name in args.given:
                raise InputError(f"--{name.replace('_', '-')} is for training, which {asked[0]} does not do")
    if args.resume and (args.load or args.overwrite):
        raise InputError(f"--resume and {'--load' if args.load else '--overwrite'} exclude each other")
    if args.reset_optimizer and not args.load:
        raise InputError("--reset-optimizer needs --load: a checkpoint")
    for flag, given in (
        ("--quantize-eval", args.quantize_eval),
        ("--eval-fp16", args.eval_fp16),
        ("--qe-calibration", args.qe_calibration),
        ("--activation-histograms", args.activation_histograms),
        ("--qe-auto", args.qe_auto),
    ):
        if given and "precision" in args.given:
            raise InputError(f"--precision and {flag} exclude each other")
    sampled = {"--qe-auto": args.qe_auto, "--qe-report": args.qe_report}
    sampled |= {"--qe-calibration": args.qe_calibration, "--act-hist": args.activation_histograms}
    for flag, given in sampled.items():
        if given and args.ranking != "sampled":
            raise InputError(f"--ranking {args.ranking}: {flag} looks at the sampled candidates")
    check_report(args, bool(evaluates or (args.validate and not asked)))
    check_branches(args)
    check_quantization(args)


def check_report(args: Namespace, evaluates: bool) -> None:
    """Raise an ``InputError`` for a ``--report`` that nothing is evaluated for, or that cannot be written."""
    if args.report is None:
        return
    if not evaluates:
        raise InputError("--report needs --evaluate, --quantize-eval, --eval-fp16 or --validate")
    if args.report.suffix != ".json":
        raise InputError(
            f"--report: {args.report} does not end in .json; the users' file beside it ends in .npz"
        )
    if not args.report.parent.is_dir() or args.report.is_dir():
        raise InputError(f"--report: {args.report} is not a file in a directory")


def check_branches(args: Namespace) -> None:
    """Raise an ``InputError`` for flags at odds with a model's branches."""
    if "pretrain_rate" in args.given and not args.pretrain:
        raise InputError("--pretrain-rate needs --pretrain")
    if args.pretrain and len(args.pretrain) > 2:
        raise InputError(f"--pretrain: {' '.join(map(str, args.pretrain))}: there are two branches")
    if args.pretrain and args.load:
        raise InputError("--pretrain and --load exclude each other")
    if args.pretrain and not has_both_branches(args.factors, args.layers):
        raise InputError("--pretrain needs both branches: -f/--factors and --layers above 0")


def lacks_source(args: Namespace) -> bool:
    """Whether no flag says where the ranges of activations are from, which are to be quantized."""
    return not (args.qe_stats_file or args.qe_config_file or args.qe_dynamic) and bool(args.qe_bits_acts)


def check_quantization(args: Namespace) -> None:
    """Raise an ``InputError`` for a quantization or calibration flag without effect."""
    if args.qe_convert_pytorch and "qe_engine" in args.given and args.qe_engine != "integer":
        raise InputError(f"--qe-convert-pytorch asks for integers, --qe-engine for {args.qe_engine}")
    engine = {"qe_engine", "qe_convert_pytorch"} if args.evaluate else set()  # of a quantized model
    beside = {"qe_stats_out", "qe_calibration", "qe_auto", "qe_max_loss"} | engine
    alone = sorted(name for name in args.given - beside if name.startswith("qe_"))
    if alone and not args.quantize_eval:
        raise InputError(f"--{alone[0].replace('_', '-')} needs --quantize-eval")
    if "qe_max_loss" in args.given and not args.qe_auto:
        raise InputError("--qe-max-loss needs --qe-auto")
    if args.qe_auto and "split_final" in args.given:
        raise InputError("--split-final: --qe-auto chooses whether to split the final layer")
    if args.qe_stats_out:
        if not args.qe_calibration:
            raise InputError("--qe-stats-out needs --qe-calibration")
        if not Path(args.qe_stats_out).parent.is_dir() or Path(args.qe_stats_out).is_dir():
            raise InputError(f"--qe-stats-out: {args.qe_stats_out} is not a file in a directory")
    if "calibrate_on" in args.given and not (
        args.qe_calibration or args.activation_histograms or args.qe_report
    ):
        raise InputError("--calibrate-on needs --qe-calibration, --activation-histograms or --qe-report")
