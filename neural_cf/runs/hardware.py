"""What a run computes on and in: device, precision, compiled or not; and its description for reports."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import re
from pathlib import Path

import torch
import torch.distributed as dist

from distiller.schedule import CompressionSchedule
from distiller.system.cli import InputError
from distiller.system.cpu import cpu_has
from neural_cf.runs.processes import local_rank
from neural_cf.runs.settings import Settings

PRECISIONS = ("fp32", "bf16")  # of matrix products

log = logging.getLogger("ncf")


def choose_device(settings: Settings) -> torch.device:
    """Return the GPU asked for, else this process's GPU, else the first one, else the CPU.

    Raises:
        InputError: there is no such GPU, or flags exclude each other.
    """
    if settings.gpus is None:
        on_gpu = torch.cuda.is_available() and not settings.no_cuda
        return torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")
    if settings.no_cuda:
        raise InputError("--gpus and --no-cuda exclude each other")
    if dist.is_torchelastic_launched():
        raise InputError("--gpus: torchrun gives each process a GPU of its own")
    if settings.gpus not in range(torch.cuda.device_count()):
        raise InputError(
            f"--gpus: there is no GPU {settings.gpus}: PyTorch finds {torch.cuda.device_count()}"
        )
    return torch.device("cuda", settings.gpus)


def choose_precision(settings: Settings, device: torch.device, schedule: CompressionSchedule) -> str:
    """Return the precision of training's matrix products, one of ``PRECISIONS``.

    It is what was asked for, else bf16 where the device multiplies it in hardware and nothing is rounded, else fp32.

    Raises:
        InputError: bf16 is asked for beside quantization-aware training, which rounds in fp32.
    """
    if schedule.quantizer is None:
        return settings.precision or ("bf16" if native_bf16(device) else "fp32")
    if settings.precision == "bf16" and "precision" in settings.given:
        raise InputError("--precision: quantization-aware training rounds in fp32")
    return "fp32"


def choose_compilation(settings: Settings, device: torch.device) -> bool:
    """Return whether to compile: wherever ``torch.compile`` works, unless the user says no."""
    if settings.no_compile:
        return False
    why = why_not_compiled(device)
    if why:
        log.info("Without torch.compile, which does not work here: %s", why)
    return why is None


def why_not_compiled(device: torch.device) -> str | None:
    """Return why ``torch.compile`` does not work here, in one line; None where it does."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:  # a compiler that is missing or broken
        return str(error).strip().splitlines()[0]
    return None


def native_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def processor() -> str:
    """Return the processor's name, as Linux or Python knows it."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Return a line for reports: GPU, processor, how many of them, PyTorch's version and the date."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{processor()}, {os.cpu_count()} processors, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}"
    )
