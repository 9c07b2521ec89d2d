"""The command-line flags of post-training quantization, with names and defaults as in Distiller."""

from __future__ import annotations

from argparse import Action, ArgumentParser, ArgumentTypeError, _ArgumentGroup
from collections.abc import Callable
from dataclasses import dataclass, fields

from distiller.quantization.clipping import ClipMode
from distiller.quantization.linear import LinearQuantMode

ENGINES = ("auto", "integer", "simulate")
EMBEDDING_BITS = (4, 8)  # the widths that fill bytes
AddArgument = Callable[..., Action]


@dataclass(frozen=True, kw_only=True)
class PostTrainFlags:
    """The values of the flags of post-training quantization, each under the name that argparse gives it.

    The defaults are those of the command line. ``add_post_train_quant_args`` says what each flag does.
    """

    quantize_eval: bool = False
    qe_mode: str = LinearQuantMode.SYMMETRIC.value
    qe_mode_acts: str | None = None
    qe_mode_wts: str | None = None
    qe_bits_acts: int = 8
    qe_bits_wts: int = 8
    qe_bits_accum: int = 32
    qe_clip_acts: str = ClipMode.NONE.value
    qe_clip_n_stds: float | None = None
    qe_no_clip_layers: tuple[str, ...] = ()
    qe_no_quant_layers: tuple[str, ...] = ()
    qe_per_channel: bool = False
    qe_scale_approx_bits: int | None = None
    qe_scaled_concat: bool = False
    qe_per_channel_acts: bool = False
    qe_embedding_bits: int | None = None
    qe_save_fp_weights: bool = False
    qe_engine: str = ENGINES[0]
    qe_convert_pytorch: bool = False
    qe_stats_file: str | None = None
    qe_dynamic: bool = False
    qe_calibration: float | None = None
    qe_config_file: str | None = None


# The flags that say where settings come from or what is done with them, and change no setting themselves.
SOURCES = {"qe_stats_file", "qe_dynamic", "qe_calibration", "qe_config_file"}


def portion(text: str) -> float:
    """Return the share of the data that a flag's text stands for: above 0 and at most 1.

    Raises:
        ArgumentTypeError: the text is no such number.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def add_post_train_quant_args(parser: ArgumentParser, calibration: bool = True) -> None:
    """Add the group "Post-Training Quantization Arguments" to a parser.

    Args:
        parser: The parser.
        calibration: Add ``--qe-calibration`` too, which does not evaluate.
    """
    group = parser.add_argument_group("Post-Training Quantization Arguments")
    add = group.add_argument
    add("--quantize-eval", "--qe", action="store_true", help="quantize the model, then evaluate it")
    _add_modes_and_bits(add)
    _add_clipping(add)
    _add_scales(add)
    add("--qe-save-fp-weights", action="store_true", help="keep the float weights beside the integers")
    add(
        "--qe-engine",
        choices=ENGINES,
        default=PostTrainFlags.qe_engine,
        help="compute in integers, or simulate that in floats, which gives the same scores. auto computes in integers "
        "wherever the settings allow it (default: %(default)s)",
    )
    add("--qe-convert-pytorch", "--qept", action="store_true", help="the same as --qe-engine integer")
    _add_sources(group, calibration)


def _add_modes_and_bits(add: AddArgument) -> None:
    modes = [mode.value for mode in LinearQuantMode]
    add(
        *("--qe-mode", "--qem"),
        choices=modes,
        default=PostTrainFlags.qe_mode,
        help="how a range becomes a scale and a zero point, for example --qem asym_u (default: %(default)s)",
    )
    add(
        "--qe-mode-acts", "--qema", choices=modes, help="the mode of activations (default: that of --qe-mode)"
    )
    add("--qe-mode-wts", "--qemw", choices=modes, help="the mode of weights (default: that of --qe-mode)")
    bits = {"type": int, "metavar": "BITS"}
    add(
        *("--qe-bits-acts", "--qeba"),
        **bits,
        default=PostTrainFlags.qe_bits_acts,
        help="bits of activations, 1 to 16; 0 leaves them in float (default: %(default)s)",
    )
    add(
        *("--qe-bits-wts", "--qebw"),
        **bits,
        default=PostTrainFlags.qe_bits_wts,
        help="bits of weights, 1 to 16; 0 leaves them in float (default: %(default)s)",
    )
    add(
        "--qe-bits-accum",
        **bits,
        default=PostTrainFlags.qe_bits_accum,
        help="bits of the sums that a linear layer adds up (default: %(default)s)",
    )
    add(
        *("--qe-no-quant-layers", "--qenql"),
        nargs="+",
        default=list(PostTrainFlags.qe_no_quant_layers),
        metavar="NAME",
        help="layers that stay in float, for example --qenql final sigmoid",
    )


def _add_clipping(add: AddArgument) -> None:
    add(
        *("--qe-clip-acts", "--qeca"),
        choices=[mode.value for mode in ClipMode],
        default=PostTrainFlags.qe_clip_acts,
        help="how the range of activations is found in the statistics; none takes all of it (default: %(default)s)",
    )
    add(
        "--qe-clip-n-stds",
        type=float,
        metavar="N",
        help="with --qe-clip-acts n_std, how many standard deviations the range keeps",
    )
    add(
        *("--qe-no-clip-layers", "--qencl"),
        nargs="+",
        default=list(PostTrainFlags.qe_no_clip_layers),
        metavar="NAME",
        help="layers whose activations are not clipped",
    )


def _add_scales(add: AddArgument) -> None:
    add(
        *("--qe-per-channel", "--qepc"),
        action="store_true",
        help="give every output feature of a linear layer's weight a scale of its own",
    )
    add(
        "--qe-per-channel-acts",
        action="store_true",
        help="give every output feature of a linear layer with a ReLU a scale of its own; the next layer's weights "
        "take these scales in",
    )
    add(
        "--qe-scaled-concat",
        action="store_true",
        help="let the final layer's two inputs keep a scale each, which its weights take in",
    )
    add(
        "--qe-embedding-bits",
        type=int,
        choices=EMBEDDING_BITS,
        help="bits of embedding tables, with a scale for every row (default: --qe-bits-wts, with one scale)",
    )
    add(
        *("--qe-scale-approx-bits", "--qesab"),
        type=int,
        metavar="BITS",
        help="cut scales to a multiplier of so many bits and a shift",
    )


def _add_sources(group: _ArgumentGroup, calibration: bool) -> None:
    add = group.add_mutually_exclusive_group().add_argument
    add("--qe-stats-file", metavar="PATH", help="the statistics of activations that --qe-calibration wrote")
    add(
        "--qe-dynamic", action="store_true", help="find ranges anew on every batch, which is one user's items"
    )
    if calibration:
        add(
            "--qe-calibration",
            type=portion,
            metavar="PORTION",
            help="collect statistics on this share of the data, for example 0.1, and stop",
        )
    add("--qe-config-file", metavar="PATH", help="a YAML file with a quantizer's settings, in place of flags")


def changed_flags(args: object) -> set[str]:
    """Return the flags whose values are not their defaults, without those of ``SOURCES``.

    Args:
        args: It has the attributes of ``PostTrainFlags``. Its lists count as tuples.
    """
    values = {field.name: getattr(args, field.name) for field in fields(PostTrainFlags)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {
        "--" + field.name.replace("_", "-")
        for field in fields(PostTrainFlags)
        if field.name not in SOURCES and values[field.name] != field.default
    }
