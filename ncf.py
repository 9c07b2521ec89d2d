"""Train NeuMF on a MovieLens split, calibrate it, quantize it after training, evaluate it."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from contextlib import nullcontext

import torch

from distiller.system.cli import InputError, run
from neural_cf.commands.auto import choose_quantization
from neural_cf.commands.calibrate import calibrate, draw_activation_histograms
from neural_cf.commands.evaluate import evaluate_checkpoint
from neural_cf.commands.flags import PROG, asks_for_split, parse_args
from neural_cf.commands.train import train_whole
from neural_cf.ranking.candidates import nb_ranked
from neural_cf.runs.directory import run_directory
from neural_cf.runs.hardware import choose_device
from neural_cf.runs.log import show_messages
from neural_cf.runs.processes import Processes, join_processes, leave_processes
from neural_cf.split import load_split

LESS_MEMORY = "smaller -b/--batch-size, -f/--factors or --layers take less"


def main() -> None:
    args = parse_args()
    if args.qe_config_file:
        args.split_final |= asks_for_split(args.qe_config_file)
    device = choose_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes = join_processes(device.type)
    if processes.first:
        show_messages()
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
    own = run_directory(args.out_dir, args.name) if processes.first else nullcontext()
    with own as directory:
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
    sys.exit(run(PROG, main, LESS_MEMORY))
