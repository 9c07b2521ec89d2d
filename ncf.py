"""Train NeuMF on a MovieLens split, calibrate it, quantize it after training, evaluate it."""

from __future__ import annotations

import copy
import logging
import math
import os
import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import neumf
import pictures
import pretraining
import recording
import report
from automatic import choose_quantization
from dataset import Split, load_split
from distiller.calibration import STATS_FILE, TestFunction, collect_quant_stats
from distiller.checkpoint import load_checkpoint
from distiller.cli import InputError, run
from distiller.files import file_digest
from distiller.memory import out_of_memory_named
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.integer import NotIntegerError
from distiller.quantization.statistics import foreign_statistics, save_statistics
from distiller.quantization.train_aware import without_ranges
from distiller.quantization.wrappers import QuantizedLinear, RowQuantizedEmbedding, ScaledConcat
from distiller.schedule import CompressionSchedule, load_schedule
from evaluation import describe, first_users, metrics_of_ranks, nb_ranked, rank_test_items, score_all
from flags import PROG, asks_for_split, lacks_source, parse_args
from loading import dummy_input, load_model, load_quantized, quantizer_as_trained, restore_rounding
from neumf import NeuMF
from neumf_int8 import IntegerNeuMF
from optim import LazyAdam
from processes import Processes, join_processes, leave_processes, local_rank
from sampling import TrainingBatches
from scoring import PairScorer, Scorer, float_scorer
from step import Step, native_bf16, why_not_compiled
from testing import computation, evaluate_best, evaluate_scorer, training_of, warn_of_validation_items
from training import Progress, Stop, Trainer, score_training_pairs
from validation import validation_split

# Where compiling, 10 s at first and 3 s once cached, saves as much: 0.2 us a pair on two Xeon cores (2026-11-23).
PAIRS_WORTH_COMPILING = 40_000_000

# What runs have that were begun before there was a choice.
OF_THE_METRICS = {"ranking": "sampled", "validate": False}
# What becomes of a checkpoint that is whole and holds other values than it should.
WRONG_CONTENT = (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RuntimeError)

log = logging.getLogger("ncf")


def choose_device(args: Namespace) -> torch.device:
    """The GPU asked for, else the first one or this process's, else the CPU."""
    if args.gpus is None:
        on_gpu = torch.cuda.is_available() and not args.no_cuda
        return torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")
    if args.no_cuda:
        raise InputError("--gpus and --no-cuda exclude each other")
    if dist.is_torchelastic_launched():
        raise InputError("--gpus: torchrun gives each process a GPU of its own")
    if args.gpus not in range(torch.cuda.device_count()):
        raise InputError(f"--gpus: there is no GPU {args.gpus}: PyTorch finds {torch.cuda.device_count()}")
    return torch.device("cuda", args.gpus)


def choose_precision(args: Namespace, device: torch.device, schedule: CompressionSchedule) -> str:
    """The precision asked for, else bf16 where the device has it and nothing is rounded, else fp32."""
    if schedule.quantizer is None:
        return args.precision or ("bf16" if native_bf16(device) else "fp32")
    if args.precision == "bf16" and "precision" in args.given:
        raise InputError("--precision: quantization-aware training rounds in fp32")
    return "fp32"


def choose_compilation(args: Namespace, device: torch.device) -> bool:
    """Whether to compile: unless told not to, wherever it works."""
    if args.no_compile:
        return False
    why = why_not_compiled(device)
    if why:
        log.info("Without torch.compile, which does not work here: %s", why)
    return why is None


def build_optimizer(args: Namespace, model: NeuMF) -> torch.optim.Adam:
    """The optimizer asked for, over all of the model's parameters."""
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    return LazyAdam(model.parameters(), model.tables(), lr=args.learning_rate)


def train_whole(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> None:
    """Train as the flags ask, the branches before the whole model; then evaluate what ``--validate`` chose."""
    if args.pretrain and not pretrain(args, split, device, processes, directory):
        return
    train(args, split, device, processes, directory)
    if args.validate:
        evaluate_best(args, split, device, processes, directory)


def pretrain(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> bool:
    """Train both branches alone, or what is left of it in a run to resume; whether they are done."""
    if not args.resume:
        begin_pretraining(args, split, processes, directory)
    if args.resume and (Path(args.out_dir) / recording.CHECKPOINT).exists():
        return True  # they have been joined
    train_branch = partial(train, split=split, device=device, processes=processes)
    if not pretraining.train_branches(args, train_branch, processes.first):
        return False
    processes.agree(None)  # the first one has written what all read
    args.resume, args.overwrite = False, True  # the directory holds nothing but the settings
    return True


def begin_pretraining(args: Namespace, split: Split, processes: Processes, directory: Path | None) -> None:
    """Write a run's settings, for ``--resume`` before there is a checkpoint of the whole."""
    branches = [pretraining.branch_args(args, branch) for branch in pretraining.BRANCHES if args.out_dir]
    for part in (args, *branches):
        check_start(part, processes)
    check_schedule(schedule_of(args, processes), meta_model(args, split))
    processes.agree(None)  # no file changes before all have looked
    if directory is not None:
        for part in (directory, *(directory / branch for branch in pretraining.BRANCHES)):
            recording.clear_run(part)
        recording.write_config(directory, settings(args))
        args.out_dir = str(directory)
    args.out_dir = processes.agree(args.out_dir)


def train(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> int:
    """Train, from new weights, from joined branches, from ``--load``, or from where the run to resume stands.

    Returns:
        The steps taken.
    """
    start = check_start(args, processes)
    schedule = schedule_of(args, processes)
    args.precision = choose_precision(args, device, schedule)
    model, checkpoint = initial_model(args, start, split, schedule)
    optimizer = build_optimizer(args, model.to(device))
    progress = Progress()
    if checkpoint and not args.reset_optimizer:
        progress = restore(optimizer, checkpoint, split, args, start)
    bind(schedule, optimizer, checkpoint, args)
    if checkpoint and not args.reset_optimizer:
        restore_lagging(optimizer, checkpoint, start)
    if progress.epoch >= args.epochs:
        raise InputError(f"-e/--epochs: {start} already has {progress.epoch} epochs, {args.epochs} asked for")

    seen = split
    if args.validate:
        seen = validation_split(split, args.data)
        warn_of_validation_items(checkpoint, start)
    batches = TrainingBatches(seen, args.batch_size, args.negative_samples, args.seed, device, processes)
    if not 0 <= progress.step <= len(batches):
        raise InputError(f"{start}: step {progress.step} of an epoch of {len(batches)}")
    processes.agree(None)  # no file changes before all have read
    with open_recorder(args, device, directory, progress, batches) as recorder:
        compiled = choose_compilation(args, device)
        log.info(
            "Training with %s, %s matrix products, %s, on %s",
            *(args.optimizer, args.precision, "compiled" if compiled else "not compiled", device),
        )
        config = resolved_config(args, split, device, model) | {"compiled": compiled}
        if recorder is not None:
            recording.write_config(recorder.directory, config)
        if args.pretrain and start is None:
            ranks = rank_test_items(
                float_scorer(model), seen, args.topk, device, processes, ranking=args.ranking
            )
            log.info("Joined: %s", describe([metrics_of_ranks(ranks, k) for k in args.cutoffs]))
        trainer = Trainer(
            Step(model, optimizer, args.precision, compiled, processes),
            batches,
            seen,
            recorder,
            config,
            cutoffs=args.cutoffs,
            ranking=args.ranking,
            schedule=schedule,
            log_freq=args.log_freq,
            device=device,
            progress=progress,
            save_every=args.save_every or 0,
        )
        return trainer.run(Stop(args.epochs, args.max_steps, args.threshold))


def schedule_of(args: Namespace, processes: Processes) -> CompressionSchedule:
    """What ``--compress`` asks for; an ``InputError`` for what these processes, or this machine, cannot do."""
    if args.param_hist:
        recording.require_matplotlib("--param-hist")
    schedule = load_schedule(args.compress) if args.compress else CompressionSchedule()
    if schedule.quantizer is not None and processes.world_size > 1:
        raise InputError(
            "--compress: quantization-aware training is for one process, which tracks the ranges"
        )
    return schedule


def open_recorder(
    args: Namespace,
    device: torch.device,
    directory: Path | None,
    progress: Progress,
    batches: TrainingBatches,
) -> AbstractContextManager[recording.Recorder | None]:
    """What records the run in its directory, in the first process; None in the others, which have none."""
    if directory is None:
        return nullcontext()
    if args.resume:
        recording.drop_results_after(directory, progress.epoch, progress.step)
    elif not args.pretrain:  # which has cleared it, and resumes by its settings
        recording.clear_run(directory)
    recording.start_log(directory, device)
    done = progress.epoch * len(batches) + progress.step
    return recording.Recorder(directory, pictures=args.param_hist, step=done if args.resume else 0)


def check_start(args: Namespace, processes: Processes) -> str | Path | None:
    """The checkpoint that training starts from; an ``InputError`` where it would overwrite a run unasked."""
    if args.out_dir is None:
        return args.load
    overwrites = recording.holds_run(Path(args.out_dir)) and not (args.resume or args.overwrite)
    if processes.first and overwrites:
        raise InputError(
            f"-o/--out-dir: {args.out_dir} holds a run: --resume goes on with it, --overwrite starts again"
        )
    return Path(args.out_dir) / recording.CHECKPOINT if args.resume else args.load


def initial_model(
    args: Namespace, start: str | Path | None, split: Split, schedule: CompressionSchedule
) -> tuple[NeuMF, dict[str, Any] | None]:
    """The model that training starts with, and the checkpoint that it is from, if any."""
    torch.manual_seed(args.seed)
    if start is None:
        check_schedule(schedule, meta_model(args, split))
        if args.pretrain:
            return pretraining.joined_model(args, split), None
        return NeuMF(split.nb_users, split.nb_items, args.factors, args.layers, args.split_final), None
    checkpoint = load_checkpoint(start)
    model = load_model(args, start, checkpoint, split)
    check_schedule(schedule, copy.deepcopy(model))
    before = checkpoint.get("quantization_aware")
    if args.resume and before is not None and before != schedule.quantizer:
        raise InputError(
            f"--compress: {start} was trained with another quantizer than {args.compress} has now"
        )
    if before is not None and before == schedule.quantizer:
        restore_rounding(model, checkpoint, args)
    return model, checkpoint


def check_schedule(schedule: CompressionSchedule, model: NeuMF) -> None:
    """Raise an ``InputError`` unless the schedule fits the model, which is changed."""
    sizes = neumf.sizes_from_state_dict(model.state_dict())
    if schedule.quantizer is not None and not neumf.has_both_branches(
        sizes["mf_dim"], sizes["mlp_layer_sizes"]
    ):
        raise InputError("--compress: quantization-aware training is for a model of both branches")
    schedule.check(model)


def meta_model(args: Namespace, split: Split) -> NeuMF:
    """A model of the sizes asked for, without weights."""
    with torch.device("meta"):
        return NeuMF(split.nb_users, split.nb_items, args.factors, args.layers, args.split_final)


def restore(
    optimizer: torch.optim.Optimizer,
    checkpoint: dict[str, Any],
    split: Split,
    args: Namespace,
    path: str | Path,
) -> Progress:
    """Put the optimizer where the checkpoint left it; where training goes on from."""
    if neumf.is_split(checkpoint["state_dict"]) != args.split_final:
        raise InputError(
            f"--split-final: {path} has its final layer the other way, which its optimizer state cannot follow; "
            "--reset-optimizer starts without that state"
        )
    try:
        # The original's checkpoints are of whole epochs.
        progress = Progress(
            **(checkpoint["progress"] if "progress" in checkpoint else {"epoch": checkpoint["epoch"] + 1})
        )
        load_optimizer(optimizer, checkpoint["optimizer_state_dict"])
        if (progress.epoch or progress.step) and not checkpoint["optimizer_state_dict"]["state"]:
            raise ValueError("no moments")
        settings = checkpoint["config"] if "progress" in checkpoint else {}
        before = {name: settings.get(name) for name in ("batch_size", "negative_samples", "seed")}
        before |= {name: settings.get(name, default) for name, default in OF_THE_METRICS.items()}
        before["cutoffs"] = settings.get("cutoffs", [settings.get("topk")])
        if args.resume:  # from which ``bind`` goes on
            float(settings["learning_rate"]), dict(checkpoint["schedule_state_dict"])
    except WRONG_CONTENT as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no state to go on from ({type(error).__name__}: {reason}); --reset-optimizer starts without one"
        ) from error
    check_going_on(progress, before, checkpoint, split, args, path)
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # of a schedule that has ended with its run
        if "learning_rate" in args.given:
            group["lr"] = args.learning_rate
    if not args.resume:
        args.learning_rate = optimizer.param_groups[0]["lr"]  # what the configuration then records
        progress.best_hr = Progress.best_hr  # the new run has no best.pth.tar yet
    return progress


def load_optimizer(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Take over an Adam's state from a checkpoint; an error of ``WRONG_CONTENT`` unless it is one."""
    groups = optimizer.param_groups
    own = {name: groups[0][name] for name in ("fused", "foreach", "capturable")}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(own)
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name} is {group[name]}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas are {group['betas']}")
        for name in ("amsgrad", "maximize", "differentiable"):
            if group[name] is not False:
                raise ValueError(f"Adam with {name}")
    # Before the first step there are none.
    for parameter in optimizer.param_groups[0]["params"] if state["state"] else ():
        moments = optimizer.state[parameter]
        if {moments["exp_avg"].shape, moments["exp_avg_sq"].shape} != {parameter.shape}:
            raise ValueError("moments of other shapes than the weights")
        if not 0 <= moments["step"].item() < math.inf:
            raise ValueError("a negative count of steps")


def bind(
    schedule: CompressionSchedule,
    optimizer: torch.optim.Optimizer,
    checkpoint: dict[str, Any] | None,
    args: Namespace,
) -> None:
    """Put the learning-rate schedulers in charge of the optimizer, on ``--resume`` where they stood."""
    schedule.bind(optimizer)
    if args.resume:
        schedule.load_state_dict(checkpoint["schedule_state_dict"])
        if args.learning_rate == checkpoint["config"]["learning_rate"]:
            # Binding has set the rate to the schedule's start; this is the one that it had reached.
            load_optimizer(optimizer, checkpoint["optimizer_state_dict"])


def restore_lagging(optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Take a lazy optimizer back to the rows that it had, where it goes on at the rate that they were moved with."""
    lagging = checkpoint.get("lagging_rows")
    if not isinstance(optimizer, LazyAdam) or lagging is None:
        return
    if optimizer.param_groups[0]["lr"] == checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"]:
        try:
            optimizer.restore_lagging(lagging)
        except WRONG_CONTENT as error:
            raise InputError(f"{path}: lagging_rows: {error}") from error


def check_going_on(
    progress: Progress,
    before: dict[str, Any],
    checkpoint: dict[str, Any],
    split: Split,
    args: Namespace,
    path: str | Path,
) -> None:
    """Raise an ``InputError`` unless the run can be gone on with: with these batches, data and metrics."""
    for flag, name in (
        ("-b/--batch-size", "batch_size"),
        ("-n/--negative-samples", "negative_samples"),
        ("-s/--seed", "seed"),
        ("--validate", "validate"),
    ):
        if progress.step and before[name] != getattr(args, name):
            raise InputError(
                f"{flag}: {path} stands within an epoch that began with {before[name]}, which cannot go on with "
                f"{getattr(args, name)}; --reset-optimizer starts from epoch 0"
            )
    if args.resume:
        check_same_metrics(before, args)
    if args.resume and checkpoint.get("data_digest") != split.digest:
        raise InputError(
            f"--resume: {path} was trained on other data than {args.data}, or on a copy as CSV files"
        )


def check_same_metrics(before: dict[str, Any], args: Namespace) -> None:
    """Raise an ``InputError`` where a resumed run's epochs would not compare with those before."""
    if before["cutoffs"] != args.cutoffs:
        ours, theirs = (" ".join(map(str, cutoffs)) for cutoffs in (args.cutoffs, before["cutoffs"]))
        raise InputError(f"-k/--topk: the run has {theirs}, not {ours}")
    for name in OF_THE_METRICS:
        if before[name] != getattr(args, name):
            raise InputError(f"--{name}: the run has {before[name]}, not {getattr(args, name)}")


def resolved_config(args: Namespace, split: Split, device: torch.device, model: NeuMF) -> dict[str, Any]:
    """Every setting as it was in the end: what ``config.json`` and checkpoints record."""
    sizes = neumf.sizes_from_state_dict(without_ranges(model.state_dict()))
    return settings(args) | {
        "factors": sizes["mf_dim"],
        "layers": sizes["mlp_layer_sizes"],
        "nb_users": split.nb_users,
        "nb_items": split.nb_items,
        "data_digest": split.digest,
        "device": str(device),
        "torch": str(torch.__version__),
        "command": recording.command_line(),
    }


def settings(args: Namespace) -> dict[str, Any]:
    """The flags, as JSON can hold them."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del config["given"]
    return config


def calibration_pass(args: Namespace, split: Split, device: torch.device, share: float) -> TestFunction:
    """What scores ``share`` of the data asked for, in batches of as many pairs as a user has candidates."""
    if args.calibrate_on == "train":
        batches = TrainingBatches(split, split.nb_candidates, args.negative_samples, args.seed, device)
        if batches.nb_samples < split.nb_candidates:
            raise InputError(
                f"--calibrate-on train: {batches.nb_samples} training pairs are fewer than one user's "
                f"{split.nb_candidates} candidates, which a batch is to be of"
            )
        return partial(score_training_pairs, batches=batches, share=share)
    return partial(score_all, split=split, nb_users=first_users(split, share), device=device)


def calibrate(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Collect statistics of activations for ``--qe-stats-file``."""
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    test_fn = calibration_pass(args, split, device, args.qe_calibration)
    recording.start_log(directory, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=split.nb_candidates)
    comment = "\n".join(
        [
            "Statistics of activations, for --qe-stats-file. Made by",
            f"    {recording.command_line()}",
            f"data: {split.digest}",
            f"checkpoint: {file_digest(args.load)}",
        ]
    )
    for path in filter(None, [directory / STATS_FILE, args.qe_stats_out]):
        save_statistics(statistics, path, comment)
        log.info("Statistics of %d layers written to %s", len(statistics), path)


def draw_activation_histograms(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Histograms of every layer's output, to TensorBoard and as pictures."""
    recording.require_matplotlib("--activation-histograms")
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    test_fn = calibration_pass(args, split, device, args.activation_histograms)
    recording.start_log(directory, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=split.nb_candidates)
    with recording.Recorder(directory, pictures=True) as recorder:
        recorder.activations(statistics)
    log.info("Histograms of %d layers written to %s", len(statistics), directory)


def quantize(
    args: Namespace, model: NeuMF, checkpoint: dict[str, Any], device: torch.device
) -> PostTrainLinearQuantizer:
    """Quantize a model as the flags ask, or as it was trained to be."""
    if not lacks_source(args):
        quantizer = PostTrainLinearQuantizer.from_args(model.to(device), args)
    elif checkpoint.get("quantization_aware") is not None:
        quantizer = quantizer_as_trained(model.to(device), checkpoint, args)
    else:
        raise InputError("--quantize-eval needs --qe-stats-file, --qe-dynamic or --qe-config-file")
    why = foreign_statistics(model, quantizer.statistics or {})
    if why:
        log.warning("--qe-stats-file seems to belong to another model: %s", why)
    quantizer.prepare_model(dummy_input(device))
    modules = list(model.modules())
    linears = [module for module in modules if isinstance(module, QuantizedLinear)]
    for flag, given, effects in (
        ("--qe-scaled-concat", args.qe_scaled_concat, (isinstance(x, ScaledConcat) for x in modules)),
        ("--qe-per-channel-acts", args.qe_per_channel_acts, (x.has_output_scales for x in linears)),
        (
            "--qe-embedding-bits",
            args.qe_embedding_bits,
            (isinstance(x, RowQuantizedEmbedding) for x in modules),
        ),
    ):
        if given and not any(effects):
            raise InputError(f"{flag} has no effect on any layer with these settings")
    return quantizer


def quantized_scorer(
    args: Namespace, quantizer: PostTrainLinearQuantizer, split: Split, device: torch.device
) -> Scorer:
    """What scores with a quantized model: in integers where it can and may, else simulated in floats."""
    if args.qe_convert_pytorch or args.qe_engine != "simulate":
        try:
            return IntegerNeuMF(quantizer.model, worth_compiling(args, split, device))
        except NotIntegerError as error:
            if args.qe_convert_pytorch or args.qe_engine == "integer":
                flag = "--qe-convert-pytorch" if args.qe_convert_pytorch else "--qe-engine integer"
                raise InputError(f"{flag}: {error}") from error
            log.warning("simulated in floats, which is slower: %s", error)
    return PairScorer(quantizer.model, one_user=quantizer.dynamic)


def unquantized_scorer(
    args: Namespace, model: NeuMF, checkpoint: dict[str, Any], split: Split, device: torch.device
) -> Scorer:
    """What scores with a float model: in float32, bfloat16 or half precision, or rounding as it was trained to."""
    if "qe_engine" in args.given or args.qe_convert_pytorch:
        raise InputError(f"--qe-engine: {args.load} is not quantized: --quantize-eval quantizes it")
    if checkpoint.get("quantization_aware") is not None:
        for flag, given in (("--eval-fp16", args.eval_fp16), ("--precision", args.precision == "bf16")):
            if given:
                raise InputError(f"{flag}: {args.load} was trained to round in float32")
        restore_rounding(model, checkpoint, args)
        log.info("Evaluated as trained: quantization-aware, with rounded weights and activations")
    model.to(device)
    if args.eval_fp16:
        return float_scorer(model.half())
    if args.precision == "bf16":
        return float_scorer(model, torch.bfloat16, worth_compiling(args, split, device))
    return float_scorer(model)


def worth_compiling(args: Namespace, split: Split, device: torch.device) -> bool:
    """Whether compiling an evaluation of integers or bfloat16 takes less time than it saves, and is wanted.

    On a GPU it would contract a product and a sum into one operation, and round otherwise than the simulation.
    """
    pairs = split.nb_users * nb_ranked(split, args.ranking)
    return device.type == "cpu" and pairs >= PAIRS_WORTH_COMPILING and choose_compilation(args, device)


def evaluate_checkpoint(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> None:
    """Evaluate in FP32, in half precision, or quantized; a model that is quantized here is kept."""
    checkpoint = load_checkpoint(args.load)
    quantizer = None
    if args.qe_report:
        report_on = calibration_pass(args, split, device, args.qe_report)
        if not recording.has_matplotlib():
            log.warning("--qe-report without pictures, which matplotlib draws: pip install matplotlib")
    if "quantizer" in checkpoint:
        quantizer = load_quantized(args, checkpoint, split, device)
    else:
        model = load_model(args, args.load, checkpoint, split)
        if args.quantize_eval:
            original = copy.deepcopy(model) if args.qe_report else None
            quantizer = quantize(args, model, checkpoint, device)
    if quantizer:
        scorer = quantized_scorer(args, quantizer, split, device)
    else:
        scorer = unquantized_scorer(args, model, checkpoint, split, device)
    if processes.first:
        recording.start_log(directory, device)
        if quantizer:
            quantizer.save(directory)
            if args.quantize_eval:
                recording.write_quantized(directory, quantizer, args.load, split)
                recording.clear_report(directory)
    model = {"checkpoint": str(args.load), "computed": computation(args, quantizer is not None, scorer)}
    evaluate_scorer(args, scorer, split, device, processes, directory, model | training_of(checkpoint))
    if args.qe_report:
        report_losses(args, report_on, original.to(device), quantizer, split, device, directory)


def report_losses(
    args: Namespace,
    test_fn: TestFunction,
    original: NeuMF,
    quantizer: PostTrainLinearQuantizer,
    split: Split,
    device: torch.device,
    directory: Path,
) -> None:
    """Say where quantization loses accuracy: on the screen, as a CSV file and, where matplotlib is, as pictures."""
    nb_users = first_users(split, args.qe_report)
    losses = report.measure_losses(original, quantizer, test_fn, split, nb_users, args.topk, device)
    log.info("%s", report.table(losses))
    report.write_csv(losses, directory / recording.REPORT)
    if recording.has_matplotlib():
        pictures.draw_ranges(losses, directory / recording.RANGES)
        pictures.draw_errors(losses, directory / recording.ERRORS)
    log.info("Report written to %s", directory)


def main() -> None:
    args = parse_args()
    if args.qe_config_file:
        args.split_final |= asks_for_split(args.qe_config_file)
    device = choose_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes = join_processes(device.type)
    if processes.first:
        recording.show_messages()
    else:
        logging.disable()  # the first process says it
    args.seed = processes.agree(args.seed)
    if args.processes:
        torch.set_num_threads(min(args.processes, os.cpu_count()))
    split = load_split(args.data)
    if max(args.cutoffs) > nb_ranked(split, args.ranking):
        raise InputError(
            f"-k/--topk: {max(args.cutoffs)} of a list of only {nb_ranked(split, args.ranking)} candidates"
        )
    check_processes(args, processes)
    split = load_split(args.data)
    if max(args.cutoffs) > nb_ranked(split, args.ranking):
        raise InputError(
            f"-k/--topk: {max(args.cutoffs)} of a list of only {nb_ranked(split, args.ranking)} candidates"
        )
    check_processes(args, processes)
    own = recording.run_directory(args.out_dir, args.name) if processes.first else nullcontext()
    with own as directory, out_of_memory_named():
        if args.qe_calibration:
            calibrate(args, split, device, directory)
        elif args.activation_histograms:
            draw_activation_histograms(args, split, device, directory)
        elif args.qe_auto:
            choose_quantization(args, split, device, directory)
        elif args.evaluate or args.quantize_eval or args.eval_fp16:
            evaluate_checkpoint(args, split, device, processes, directory)
        else:
            train_whole(args, split, device, processes, directory)
    leave_processes(processes)


def check_processes(args: Namespace, processes: Processes) -> None:
    """Raise an ``InputError`` for what several processes cannot share."""
    if processes.world_size == 1:
        return
    for flag, given in (
        ("--qe-calibration", args.qe_calibration),
        ("--act-hist", args.activation_histograms),
        ("--qe-auto", args.qe_auto),
        ("--qe-report", args.qe_report),
    ):
        if given:
            raise InputError(f"{flag}: torchrun's processes share training and evaluation, not this")
    if args.batch_size < processes.world_size:
        raise InputError(f"-b/--batch-size: {args.batch_size} samples for {processes.world_size} processes")


if __name__ == "__main__":
    sys.exit(run(PROG, main))
