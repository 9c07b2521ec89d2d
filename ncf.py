"""Train NeuMF on a split, calibrate it, quantize it after training, evaluate it.

    python ncf.py SPLIT --layers 256 256 128 64 -f 64 -o run/a
    python ncf.py SPLIT --load run/a/best.pth.tar --evaluate

These are the original's command lines. The flags are in neural_cf/commands/flags.py, and what each mode does is in the
module that MODES names.
"""

from __future__ import annotations

import sys

from distiller.system.cli import run
from neural_cf.__main__ import SMALLER_MODEL
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.auto import choose_quantization
from neural_cf.commands.calibrate import calibrate, draw_activation_histograms
from neural_cf.commands.evaluate import evaluate_checkpoint
from neural_cf.commands.start import started
from neural_cf.commands.train import train_and_test
from neural_cf.runs.settings import Mode

PROG = "ncf.py"
MODES = {
    Mode.TRAIN: train_and_test,
    Mode.CALIBRATE: calibrate,
    Mode.HISTOGRAM: draw_activation_histograms,
    Mode.AUTO: choose_quantization,
    Mode.EVALUATE: evaluate_checkpoint,
}


def main() -> None:
    """Run the process's command line."""
    settings = parse_settings()
    with started(settings, PROG) as this_run:
        MODES[settings.mode](this_run)


if __name__ == "__main__":
    sys.exit(run(PROG, main, SMALLER_MODEL))
