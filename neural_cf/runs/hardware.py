"""What a figure was measured on."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import re
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

from distiller.schedule import CompressionSchedule
from distiller.system.cli import InputError
from distiller.system.cpu import cpu_has
from neural_cf.runs.processes import local_rank


def processor() -> str:
    """The processor's name, as Linux or Python knows it."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Processor or GPU, how much of it, PyTorch's version and the date."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{processor()}, {os.cpu_count()} processors, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}"
    )


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


PRECISIONS = ("fp32", "bf16")


def native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def why_not_compiled(device: torch.device) -> str | None:
    """Why ``torch.compile`` does not work here, in one line; None where it does."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:  # a compiler that is missing or broken
        return str(error).strip().splitlines()[0]
    return None
