"""``neural-cf calibrate``, ``ncf.py --qe-calibration`` and ``--activation-histograms``: statistics of activations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distiller.calibration import CALIBRATED_STATS_FILE, collect_quant_stats
from distiller.quantization.flags import portion
from distiller.quantization.statistics import Statistics, save_statistics
from distiller.system.files import file_digest
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.flags import (
    CALIBRATION_SHARE,
    add_calibrate_on,
    add_final_layer,
    add_load,
    add_negative_samples,
    add_run_flags,
    add_seed,
    add_stats_out,
    new_parser,
)
from neural_cf.commands.start import started
from neural_cf.int8.calibration import calibration_data
from neural_cf.runs.log import command_line, start_log
from neural_cf.runs.models import load_float
from neural_cf.runs.recorder import Recorder, require_matplotlib
from neural_cf.runs.run import Run

PROG = "neural-cf calibrate"

log = logging.getLogger("ncf")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    parser = new_parser(PROG, "Collect the statistics of activations that evaluate --quantize-eval needs.")
    add = parser.add_argument_group("Calibration").add_argument
    add_load(add, "float checkpoint, best.pth.tar")
    add_final_layer(add)
    add(
        *("--portion", "--qe-calibration"),
        dest="qe_calibration",
        type=portion,
        default=CALIBRATION_SHARE,
        metavar="PORTION",
        help="the share of the data, above 0 and at most 1 (default: %(default)s)",
    )
    add_stats_out(add)
    add_calibrate_on(add)
    add_negative_samples(add)
    add_seed(add)
    add_run_flags(parser.add_argument_group("Run").add_argument)
    settings = parse_settings(argv, parser)
    with started(settings, PROG) as run:
        calibrate(run)


def calibrate(run: Run) -> None:
    """Write statistics of activations for ``--qe-stats-file``."""
    statistics = _collect(run, run.settings.qe_calibration)
    comment = "\n".join(
        [
            "Statistics of activations, for --qe-stats-file. Made by",
            f"    {command_line()}",
            f"data: {run.split.digest}",
            f"checkpoint: {file_digest(run.settings.load)}",
        ]
    )
    for path in filter(None, [run.directory / CALIBRATED_STATS_FILE, run.settings.qe_stats_out]):
        save_statistics(statistics, path, comment)
        log.info("Statistics of %d layers written to %s", len(statistics), path)


def draw_activation_histograms(run: Run) -> None:
    """Write histograms of every layer's output, to TensorBoard and as pictures."""
    require_matplotlib("--activation-histograms")
    statistics = _collect(run, run.settings.activation_histograms)
    with Recorder(run.directory, pictures=True) as recorder:
        recorder.activations(statistics)
    log.info("Histograms of %d layers written to %s", len(statistics), run.directory)


def _collect(run: Run, share: float) -> Statistics:
    """Return the statistics of the checkpoint's model on a share of the data."""
    path = run.settings.load
    model = load_float(run.settings, path, load_checkpoint(path), run.split)
    data = calibration_data(run, share)
    start_log(run.directory, run.device)
    return collect_quant_stats(model.to(run.device), data, rows_per_batch=run.split.nb_candidates)
