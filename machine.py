"""What a figure was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch


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
