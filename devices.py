"""What training and evaluation compute on, and in: device, precision, compiled or not."""

from __future__ import annotations

import logging
from argparse import Namespace

import torch
import torch.distributed as dist

from distiller.cli import InputError
from distiller.schedule import CompressionSchedule
from processes import local_rank
from step import native_bf16, why_not_compiled

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
