"""The command-line flags of post-training quantization."""

from __future__ import annotations

from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable

from .clipping import ClipMode
from .linear import LinearQuantMode

ENGINES = ("auto", "integer", "simulate")
EMBEDDING_BITS = (4, 8)  # that fill bytes


def portion(text: str) -> float:
    """A share of the data from a flag's text: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def add_post_train_quant_args(parser: ArgumentParser) -> None:
    """Add the argument group "Post-Training Quantization Arguments"; names and defaults are Distiller's."""
    group = parser.add_argument_group("Post-Training Quantization Arguments")
    add = group.add_argument
    modes = [mode.value for mode in LinearQuantMode]
    add("--quantize-eval", "--qe", action="store_true", help="quantize the model, then evaluate it")
    add("--qe-mode", "--qem", choices=modes, default="sym", help="mode (default: %(default)s)")
    add("--qe-mode-acts", "--qema", choices=modes, help="of activations (default: --qe-mode)")
    add("--qe-mode-wts", "--qemw", choices=modes, help="of weights (default: --qe-mode)")
    add(
        "--qe-bits-acts",
        "--qeba",
        type=int,
        default=8,
        metavar="BITS",
        help="of activations, 1 to 16, 0 for float (default: %(default)s)",
    )
    add(
        "--qe-bits-wts",
        "--qebw",
        type=int,
        default=8,
        metavar="BITS",
        help="of weights, 1 to 16, 0 for float (default: %(default)s)",
    )
    add(
        "--qe-bits-accum",
        type=int,
        default=32,
        metavar="BITS",
        help="of a Linear's accumulator (default: %(default)s)",
    )
    add(
        "--qe-clip-acts",
        "--qeca",
        choices=[mode.value for mode in ClipMode],
        default="none",
        help="how the range of activations is found (default: %(default)s)",
    )
    add(
        "--qe-clip-n-stds",
        type=float,
        metavar="N",
        help="standard deviations that --qe-clip-acts n_std keeps",
    )
    add(
        "--qe-no-clip-layers",
        "--qencl",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers whose activations are not clipped",
    )
    add(
        "--qe-no-quant-layers",
        "--qenql",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers that stay in float",
    )
    add(
        "--qe-per-channel",
        "--qepc",
        action="store_true",
        help="a scale per output feature of a Linear's weight",
    )
    add(
        "--qe-scale-approx-bits",
        "--qesab",
        type=int,
        metavar="BITS",
        help="cut scales to a multiplier of so many bits and a shift",
    )
    add(
        "--qe-scaled-concat",
        action="store_true",
        help="the final layer's inputs keep a scale each, which go into its weights",
    )
    add(
        "--qe-per-channel-acts",
        action="store_true",
        help="a scale per output feature of a Linear's ReLU too, which goes into the next Linear's weights",
    )
    add(
        "--qe-embedding-bits",
        type=int,
        choices=EMBEDDING_BITS,
        help="embedding tables of so many bits, with a scale for every row (default: --qe-bits-wts, with one scale)",
    )
    add("--qe-save-fp-weights", action="store_true", help="keep the float weights beside the integers")
    add(
        "--qe-engine",
        choices=ENGINES,
        default="auto",
        help="compute in integers, or simulate that in floats: the same scores. auto is integer wherever it can be "
        "(default: %(default)s)",
    )
    add("--qe-convert-pytorch", "--qept", action="store_true", help="the same as --qe-engine integer")
    _add_sources(group.add_mutually_exclusive_group().add_argument)


def _add_sources(add: Callable[..., Action]) -> None:
    add("--qe-stats-file", metavar="PATH", help="calibrated statistics of activations")
    add("--qe-dynamic", action="store_true", help="find ranges on every batch, one user each")
    add(
        "--qe-calibration",
        type=portion,
        metavar="PORTION",
        help="collect statistics on this share of the data, 0 < PORTION <= 1, and stop",
    )
    add("--qe-config-file", metavar="PATH", help="YAML with a quantizer and its arguments, in place of flags")


def changed_flags(args: Namespace) -> set[str]:
    """The flags of this group whose values are not their defaults, except those that name a file of settings."""
    parser = ArgumentParser(add_help=False)
    add_post_train_quant_args(parser)
    sources = {"qe_stats_file", "qe_dynamic", "qe_calibration", "qe_config_file"}
    return {
        "--" + name.replace("_", "-")
        for name, default in vars(parser.parse_args([])).items()
        if name not in sources and getattr(args, name) != default
    }
