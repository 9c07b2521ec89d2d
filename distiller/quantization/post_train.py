"""Post-training quantization of a whole model: its modules are replaced by their quantized forms."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from distiller.graph import ModuleCall, leaf_modules, module_graph, output_widths
from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.quantization.calibrated_params import params_of_activations, params_of_table
from distiller.quantization.clipping import ClipMode
from distiller.quantization.configuration import IN_FLOAT, arguments_of_file, arguments_of_flags
from distiller.quantization.flags import EMBEDDING_BITS, PostTrainFlags
from distiller.quantization.linear import LinearQuantMode, QuantParams
from distiller.quantization.quantized_module import QuantizedModule
from distiller.quantization.settings import (
    ActivationSettings,
    Request,
    WeightSettings,
    changes_of,
    choice,
    modes,
    requests_by_layer,
)
from distiller.quantization.statistics import (
    Statistics,
    check_statistics,
    clip_to_consumers,
    consumer_bounds,
    load_statistics,
    save_statistics,
)
from distiller.quantization.wrappers import (
    FakeQuantized,
    QuantizedAdd,
    QuantizedConcat,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMult,
    QuantizedTable,
    RowQuantizedEmbedding,
    ScaledConcat,
    WeightQuantizedLinear,
    params_of_columns,
)
from distiller.system.cli import InputError
from distiller.system.files import atomic_write

log = logging.getLogger(__name__)

PREPARED_STATS_FILE, PARAMS_FILE = "quant_stats_after_prepare_model.yaml", "layer_quant_params.yaml"
# Modules that return their very input, and with it the parameters that it carries.
PASS_THROUGH = (nn.Identity, nn.Dropout)
ELEMENTWISE = (Concat, EltwiseAdd, EltwiseMult)


class PostTrainLinearQuantizer:
    """A quantizer that replaces the modules of a trained model by their quantized forms.

    Args:
        model: The model, in evaluation mode, which ``prepare_model`` changes in place.
        bits_activations: Bits of activations, 1 .. 16; 0 or None leaves them in float.
        bits_parameters: Bits of weights, 1 .. 16; 0 or None leaves them in float.
        bits_accum: Bits of Linear's accumulator, 1 .. 32.
        overrides: By a regular expression that matches whole layer names, changes to ``bits_activations``,
            ``bits_weights``, ``clip_acts``, ``clip_n_stds`` or ``mode``. The first expression that matches counts.
        mode: A ``LinearQuantMode``, its name, or a map of both ``activations`` and ``weights``.
        clip_acts: A ``ClipMode`` or its name.
        per_channel_wts: Whether every output feature of a Linear has a scale of its own for its weights.
        model_activation_stats: Calibrated statistics or the path of their file. None is dynamic quantization: ranges
            are found on every forward.
        clip_n_stds: How many standard deviations ``ClipMode.N_STD`` keeps on each side of the mean.
        scale_approx_mult_bits: Bits of the multipliers that, with a shift, stand for scales; None for exact scales.
        save_fp_weights: Whether each Linear keeps its float weight and bias beside the integers, as ``float_weight``
            and ``float_bias``.
        scaled_concat: Whether the inputs of a concatenation that feeds one Linear keep a scale each. The Linear folds
            these scales into its weight.
        per_channel_acts: Whether every output feature of a Linear that applies a ReLU has a scale of its own, where
            its reader can fold these scales: a Linear, or a concatenation whose inputs keep their scales.
        embedding_bits: Bits of embedding tables with a scale for every row, 4 or 8. None: they have ``bits_parameters``
            and one scale.
        fuse_relu: Whether a layer that feeds one ReLU applies it to its accumulator, and outputs' ranges are clipped to
            what their only consumer keeps. Otherwise every module has the range that the statistics give it.

    Attributes:
        statistics: The calibrated statistics, once prepared with the clipped ranges; None for dynamic quantization.
        graph: The places of the model's modules in its graph, by name; this and all below once prepared.
        modules: The modules by name, as they are in the prepared model.
        activations: By name, how the activations of a module are quantized; None where they stay in float.
        weights: By name, how the weights of a module are quantized; None where they stay in float.
        fused: The names of the modules that apply the ReLU that they feed.

    Raises:
        InputError: an argument is out of its range.
        OSError: the statistics file cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        bits_activations: int | None = 8,
        bits_parameters: int | None = 8,
        bits_accum: int = 32,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        mode: LinearQuantMode | str | Mapping[str, Any] = LinearQuantMode.SYMMETRIC,
        clip_acts: ClipMode | str = ClipMode.NONE,
        per_channel_wts: bool = False,
        model_activation_stats: Statistics | str | os.PathLike | None = None,
        clip_n_stds: float | None = None,
        scale_approx_mult_bits: int | None = None,
        save_fp_weights: bool = False,
        scaled_concat: bool = False,
        per_channel_acts: bool = False,
        embedding_bits: int | None = None,
        fuse_relu: bool = True,
    ):
        _check_range("--qe-bits-accum (bits_accum)", bits_accum, 1, 32)
        if scale_approx_mult_bits is not None:
            _check_range("--qe-scale-approx-bits (scale_approx_mult_bits)", scale_approx_mult_bits, 2, 31)
        for flag, value in (
            ("--qe-per-channel (per_channel_wts)", per_channel_wts),
            ("--qe-scaled-concat (scaled_concat)", scaled_concat),
            ("--qe-per-channel-acts (per_channel_acts)", per_channel_acts),
            ("fuse_relu", fuse_relu),
        ):
            if not isinstance(value, bool):
                raise InputError(f"{flag}: {value!r} is neither true nor false")
        if embedding_bits not in (None, *EMBEDDING_BITS):
            raise InputError(f"--qe-embedding-bits (embedding_bits): {embedding_bits!r}; it takes 4 or 8")
        self.model = model
        self.default = Request(
            bits_activations,
            bits_parameters,
            bits_accum,
            *modes(mode),
            choice(ClipMode, clip_acts, "--qe-clip-acts (clip_acts)"),
            clip_n_stds,
            per_channel_wts,
            scale_approx_mult_bits,
        )
        self.overrides = overrides or {}
        if isinstance(model_activation_stats, str | os.PathLike):
            model_activation_stats = load_statistics(model_activation_stats)
        elif model_activation_stats is not None:
            check_statistics(model_activation_stats, "model_activation_stats")
        self.statistics: Statistics | None = model_activation_stats
        self._calibrated = self.statistics  # as they are before ``prepare_model`` clips them
        self.save_fp_weights = save_fp_weights
        self.scaled_concat = scaled_concat
        self.per_channel_acts = per_channel_acts
        self.embedding_bits = embedding_bits
        self.fuse_relu = fuse_relu

    @classmethod
    def from_args(cls, model: nn.Module, args: PostTrainFlags) -> PostTrainLinearQuantizer:
        """Return the quantizer that the flags of ``add_post_train_quant_args`` ask for.

        Args:
            model: The model, in evaluation mode.
            args: The flags' values: a ``PostTrainFlags``, or what argparse returns.

        Raises:
            InputError: a flag or the configuration file is wrong; the message names it.
        """
        if not args.qe_config_file:
            return cls(model, **arguments_of_flags(args, leaf_modules(model)))
        arguments = arguments_of_file(args, cls.__name__)
        try:
            return cls(model, **arguments)
        except TypeError as error:  # The file has an argument that the constructor does not have.
            raise InputError(f"--qe-config-file: {args.qe_config_file}: {error}") from error

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, without the model and the statistics."""
        request = self.default
        return {
            "bits_activations": request.bits_activations,
            "bits_parameters": request.bits_weights,
            "bits_accum": request.bits_accum,
            "overrides": self.overrides,
            "mode": {"activations": request.mode_activations, "weights": request.mode_weights},
            "clip_acts": request.clip_acts,
            "per_channel_wts": request.per_channel_wts,
            "clip_n_stds": request.clip_n_stds,
            "scale_approx_mult_bits": request.scale_approx_mult_bits,
            "save_fp_weights": self.save_fp_weights,
            "scaled_concat": self.scaled_concat,
            "per_channel_acts": self.per_channel_acts,
            "embedding_bits": self.embedding_bits,
            "fuse_relu": self.fuse_relu,
        }

    def of_one_layer(self, model: nn.Module, layer: str) -> PostTrainLinearQuantizer:
        """Return a quantizer that quantizes one layer as this one does and leaves all others in float.

        Args:
            model: A float model of the same structure.
            layer: The layer's name.
        """
        overrides = {re.escape(layer): changes_of(layer, self.overrides), ".*": IN_FLOAT}
        arguments = self.arguments() | {"overrides": overrides}
        return type(self)(model, model_activation_stats=self._calibrated, **arguments)

    def prepare_model(self, dummy_input: Any) -> None:
        """Replace the model's modules by their quantized forms, which no forward changes afterwards.

        Args:
            dummy_input: Arguments of the model's forward, for tracing it.

        Raises:
            InputError: a layer's settings are out of their range, or statistics that they need are missing.
            ValueError: the forward cannot be traced, or calls a module more than once.
        """
        self.model.eval()
        device = next(self.model.parameters()).device
        self.model.cpu()  # Statistics are there; and so the parameters are the same wherever the model runs later.
        self.graph = module_graph(self.model, dummy_input)
        self.modules = {name: self.model.get_submodule(name) for name in self.graph}
        repeated = [name for name, call in self.graph.items() if call.calls > 1]
        if repeated:
            raise ValueError(f"{repeated[0]} is called more than once; each call needs a module of its own")
        requests = requests_by_layer(self.default, self.overrides, leaf_modules(self.model))
        self.activations = {name: requests[name].activations(name) for name in self.graph}
        self.weights = {name: requests[name].weights(name) for name in self.graph}
        self._check_histograms()
        self.widths = output_widths(self.graph, self.modules)
        self.by_row: set[str] = set()  # The modules whose outputs have parameters of their own for every row.
        self.fused = self._fuse_and_clip() if self.fuse_relu else set()
        carried: dict[str | None, QuantParams | None] = {}  # By module, the fixed parameters of its output.
        for name, call in self.graph.items():
            replacement = self._quantized(name, call, carried)
            if replacement is not None:
                self._replace(name, replacement)
        self.model.to(device)

    @property
    def dynamic(self) -> bool:
        """Whether ranges are found on every forward, so that the result of a row depends on its whole batch."""
        return self.statistics is None and any(self.activations.values())

    def _check_histograms(self) -> None:
        """Raise an ``InputError`` where a clip mode needs histograms and there are no statistics."""
        for name, activations in self.activations.items():
            if self.statistics is None and activations and activations.clip.of_histogram:
                raise InputError(
                    f"--qe-clip-acts {activations.clip.value} for layer {name} needs --qe-stats-file: "
                    "it looks at calibrated histograms"
                )

    def _fuse_and_clip(self) -> set[str]:
        """Clip statistics to what consumers keep, and make fused ReLUs identities.

        Returns:
            The names of the modules that apply the ReLU that they feed.
        """
        bounds = {
            name: bound
            for name, bound in consumer_bounds(self.graph, self.modules).items()
            if self.activations[name]
        }
        if self.statistics is not None:
            self.statistics = clip_to_consumers(self.statistics, bounds)
        fused = {
            name: consumer for name, (consumer, *_) in bounds.items() if self._takes_relu(name, consumer)
        }
        for consumer in fused.values():
            self._replace(consumer, nn.Identity())
        return set(fused)

    def _takes_relu(self, name: str, consumer: str) -> bool:
        """Return whether a module applies its only consumer, which then must be a ReLU, to its accumulator."""
        accumulates = not isinstance(self.modules[name], (nn.Embedding, *PASS_THROUGH))
        floats = self.statistics is None and isinstance(self.modules[name], ELEMENTWISE)
        return isinstance(self.modules[consumer], nn.ReLU) and accumulates and not floats

    def _replace(self, name: str, module: nn.Module) -> None:
        self.modules[name] = module
        self.model.set_submodule(name, module)

    def _quantized(
        self, name: str, call: ModuleCall, carried: dict[str | None, QuantParams | None]
    ) -> nn.Module | None:
        """Return the quantized form of a module; None where the module stays.

        Args:
            name: The module's name.
            call: The module's place in the graph.
            carried: By module, the fixed parameters that its output carries. Those of this module are added.
        """
        module, activations, weights = self.modules[name], self.activations[name], self.weights[name]
        if isinstance(module, PASS_THROUGH):
            carried[name] = carried.get(call.inputs[0])
            if call.inputs[0] in self.by_row:
                self.by_row.add(name)
            return None
        if isinstance(module, nn.Embedding) and weights and self.embedding_bits:
            self.by_row.add(name)
            return RowQuantizedEmbedding(module, self.embedding_bits, weights.mode)
        if isinstance(module, nn.Embedding) and weights:
            embedding = QuantizedEmbedding(module, params_of_table(self.statistics, name, module, weights))
            carried[name] = embedding.params
            return embedding
        if activations is None:
            return WeightQuantizedLinear(module, weights) if _is_linear(module) and weights else None
        if self.statistics is None and isinstance(module, ELEMENTWISE):
            log.warning("dynamic quantization leaves %s (%s) in float", name, type(module).__name__)
            return None
        quantized = self._quantized_activations(name, module, activations, weights, carried)
        carried[name] = quantized.fixed_output
        return quantized

    def _quantized_activations(
        self,
        name: str,
        module: nn.Module,
        activations: ActivationSettings,
        weights: WeightSettings | None,
        carried: Mapping[str | None, QuantParams | None],
    ) -> QuantizedModule:
        """Return the form of a module whose activations are quantized; arguments as for ``_quantized``."""
        fused = name in self.fused
        inputs, output = None, None
        if self.statistics is not None:
            inputs = self._input_params(name, module, activations, carried)
            columns = self.widths[name] if self._has_scale_per_channel(name) else None
            output = params_of_activations(self.statistics, name, None, activations, fused, columns)
            if self._keeps_scales(name):
                widths = [self.widths[source] for source in self.graph[name].inputs]
                return ScaledConcat(activations, inputs, params_of_columns(inputs, widths))
        common = (activations, inputs, output, fused)
        if _is_linear(module) and weights:
            if self.by_row.intersection(self.graph[name].inputs):
                raise InputError(
                    f"--qe-embedding-bits: layer {name} reads rows with a scale each, which it cannot fold"
                )
            quantized = QuantizedLinear(module, weights, *common)
            if self.save_fp_weights:
                quantized.register_buffer("float_weight", module.weight.detach())
                quantized.register_buffer("float_bias", None if module.bias is None else module.bias.detach())
            return quantized
        if isinstance(module, EltwiseMult):
            return QuantizedMult(*common)
        if isinstance(module, EltwiseAdd):
            return QuantizedAdd(*common)
        if isinstance(module, Concat):
            return QuantizedConcat(module.dim, *common)
        return FakeQuantized(module, *common)

    def _input_params(
        self,
        name: str,
        module: nn.Module,
        activations: ActivationSettings,
        carried: Mapping[str | None, QuantParams | None],
    ) -> list[QuantParams | None]:
        """Return the parameters of every input of a module.

        They are those that the input carries, or else those by its statistics; None where every row has its own.
        """
        if isinstance(module, nn.Embedding):
            return []  # its input is an index
        return [
            None
            if source in self.by_row
            else carried.get(source) or params_of_activations(self.statistics, name, position, activations)
            for position, source in enumerate(self.graph[name].inputs)
        ]

    def _keeps_scales(self, name: str) -> bool:
        """Return whether a module is a concatenation whose inputs keep their scales: its only reader can fold them."""
        module, call = self.modules[name], self.graph[name]
        consumer = self._only_consumer(name)
        return (
            self.scaled_concat
            and isinstance(module, Concat)
            and module.dim == 1
            and consumer is not None
            and _is_linear(self.modules[consumer])
            and not self.by_row.intersection(call.inputs)
            and all(self.widths.get(source) for source in call.inputs)
        )

    def _has_scale_per_channel(self, name: str) -> bool:
        """Return whether a module has a scale for every column of its output.

        It must be a Linear that applies a ReLU, with one reader that can fold these scales.
        """
        if not (self.per_channel_acts and name in self.fused and _is_linear(self.modules[name])):
            return False
        reader = self._only_consumer(self._only_consumer(name))
        return reader is not None and (_is_linear(self.modules[reader]) or self._keeps_scales(reader))

    def _only_consumer(self, name: str) -> str | None:
        """Return the only reader of a module's output; None where there are several, or it is no module."""
        consumers = self.graph[name].consumers
        return consumers[0] if len(consumers) == 1 else None

    def save(self, directory: str | os.PathLike) -> None:
        """Write what ``prepare_model`` found into a directory: the clipped statistics and every layer's parameters."""
        # An earlier evaluation with other settings may have left one.
        (Path(directory) / PREPARED_STATS_FILE).unlink(missing_ok=True)
        if self.statistics is not None:
            save_statistics(self.statistics, Path(directory) / PREPARED_STATS_FILE)
        with atomic_write(Path(directory) / PARAMS_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(self.describe(), sort_keys=False))

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what every quantized layer is, by its name.

        An entry has the layer's type, bits, modes and clipping, and its scales and zero points where they are scalars.
        """
        result = {}
        for name, module in self.modules.items():
            if isinstance(module, QuantizedModule | QuantizedTable | WeightQuantizedLinear):
                result[name] = {"type": type(module).__name__} | self._describe(name, module)
        return result

    def _describe(self, name: str, module: nn.Module) -> dict[str, Any]:
        """Return the entry of a quantized layer in ``describe``, without its type."""
        entry: dict[str, Any] = {}
        activations, weights = self.activations[name], self.weights[name]
        if isinstance(module, QuantizedModule):
            entry |= {
                "bits_activations": activations.bits,
                "mode_activations": activations.mode.value,
                "clip_acts": activations.clip.value,
                "fused_relu": module.fused_relu,
            }
        if hasattr(module, "w_scale"):
            entry |= {
                "bits_weights": getattr(module, "bits", weights.bits),
                "mode_weights": weights.mode.value,
                "per_channel_wts": weights.per_channel and len(module.w_scale) > 1,
            }
        scalars = {
            key: value.item()
            for key, value in module.named_buffers(recurse=False)
            if key.endswith(("scale", "zero_point")) and value.numel() == 1
        }
        return entry | scalars


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _check_range(flag: str, value: object, least: int, greatest: int) -> None:
    """Raise an ``InputError`` unless a value is a whole number in [least, greatest]."""
    if type(value) is not int or not least <= value <= greatest:
        raise InputError(f"{flag}: {value!r}; it takes {least} to {greatest}")
