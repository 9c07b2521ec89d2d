"""What flags and YAML files ask of the post-training quantizer: its constructor's arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from distiller.quantization.clipping import ClipMode
from distiller.quantization.flags import PostTrainFlags, changed_flags
from distiller.system.cli import InputError
from distiller.untrusted.yaml import read_yaml

FLAG = "--qe-config-file"
IN_FLOAT = {"bits_activations": None, "bits_weights": None}  # an override that leaves a layer alone
# Flags that go with a file: they say what is done with the quantizer, which the file does not.
BESIDE_FILE = {"--quantize-eval", "--qe-save-fp-weights", "--qe-engine", "--qe-convert-pytorch"}


def arguments_of_flags(flags: PostTrainFlags, layers: Collection[str]) -> dict[str, Any]:
    """Return the constructor's arguments that flags ask for.

    Args:
        flags: Their values; anything with these attributes will do.
        layers: The names of the model's layers.

    Raises:
        InputError: a flag names a layer that the model does not have.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for flag, named, changes in (
        ("--qe-no-quant-layers", flags.qe_no_quant_layers, IN_FLOAT),
        ("--qe-no-clip-layers", flags.qe_no_clip_layers, {"clip_acts": ClipMode.NONE}),
    ):
        for layer in named:
            if layer not in layers:
                raise InputError(f"{flag}: no layer {layer} among {', '.join(layers)}")
            overrides.setdefault(re.escape(layer), changes)
    return {
        "bits_activations": flags.qe_bits_acts,
        "bits_parameters": flags.qe_bits_wts,
        "bits_accum": flags.qe_bits_accum,
        "overrides": overrides,
        "mode": {
            "activations": flags.qe_mode_acts or flags.qe_mode,
            "weights": flags.qe_mode_wts or flags.qe_mode,
        },
        "clip_acts": flags.qe_clip_acts,
        "per_channel_wts": flags.qe_per_channel,
        "model_activation_stats": flags.qe_stats_file,
        "clip_n_stds": flags.qe_clip_n_stds,
        "scale_approx_mult_bits": flags.qe_scale_approx_bits,
        "save_fp_weights": flags.qe_save_fp_weights,
        "scaled_concat": flags.qe_scaled_concat,
        "per_channel_acts": flags.qe_per_channel_acts,
        "embedding_bits": flags.qe_embedding_bits,
    }


def arguments_of_file(flags: PostTrainFlags, expected_class: str) -> dict[str, Any]:
    """Return the constructor's arguments that a ``--qe-config-file`` asks for.

    Args:
        flags: Their values, of which ``qe_config_file`` is the file.
        expected_class: The name of the quantizer's class.

    Raises:
        InputError: the file is not YAML or not of one such quantizer, or flags beside it say what it says.
    """
    given = changed_flags(flags) - BESIDE_FILE
    if given:
        raise InputError(f"{FLAG} takes the place of {', '.join(sorted(given))}: give one or the other")
    arguments = read_config(flags.qe_config_file, expected_class)
    if "save_fp_weights" in arguments:
        raise InputError(f"{FLAG}: {flags.qe_config_file}: save_fp_weights is a flag, --qe-save-fp-weights")
    return arguments | {"save_fp_weights": flags.qe_save_fp_weights}


def read_config(path: str | os.PathLike, expected_class: str) -> dict[str, Any]:
    """Return what a ``--qe-config-file`` says of its one quantizer, without its class.

    Raises:
        InputError: not YAML, or not a map ``quantizers`` with one entry of the class.
    """
    content = read_yaml(path, FLAG)
    quantizers = content.get("quantizers") if isinstance(content, dict) else None
    if not isinstance(quantizers, dict) or len(quantizers) != 1:
        raise InputError(f"{FLAG}: {path}: not a map 'quantizers' of one entry")
    (entry,) = quantizers.values()
    if not isinstance(entry, dict) or entry.get("class") != expected_class:
        raise InputError(f"{FLAG}: {path}: its quantizer is not of class {expected_class}")
    return {key: value for key, value in entry.items() if key != "class"}
