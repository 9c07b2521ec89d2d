"""Post-training quantization of a whole model: its modules replaced by their quantized forms."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from distiller.graph import ModuleCall, leaf_modules, module_graph, output_widths
from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.quantization.clipping import ClipMode, required_statistics
from distiller.quantization.configuration import IN_FLOAT, arguments_of_file, arguments_of_flags
from distiller.quantization.flags import EMBEDDING_BITS, PostTrainFlags
from distiller.quantization.linear import LinearQuantMode, QuantParams, params_of_range
from distiller.quantization.settings import Request, changes_of, choice, modes, requests_by_layer
from distiller.quantization.statistics import (
    Statistics,
    check_statistics,
    clip_to_consumers,
    columns_of_text,
    consumer_bounds,
    load_statistics,
    save_statistics,
    tensor_statistics,
)
from distiller.quantization.wrappers import (
    ActivationSettings,
    FakeQuantized,
    QuantizedAdd,
    QuantizedConcat,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    QuantizedMult,
    QuantizedTable,
    RowQuantizedEmbedding,
    ScaledConcat,
    WeightQuantizedLinear,
    WeightSettings,
    params_of_columns,
)
from distiller.system.cli import InputError
from distiller.system.files import atomic_write

log = logging.getLogger(__name__)

STATS_FILE, PARAMS_FILE = "quant_stats_after_prepare_model.yaml", "layer_quant_params.yaml"
# They hand on the tensor they get, and with it what it carries.
PASS_THROUGH = (nn.Identity, nn.Dropout)
ELEMENTWISE = (Concat, EltwiseAdd, EltwiseMult)


class PostTrainLinearQuantizer:
    """Quantizes a trained model.

    Args:
        model: In evaluation mode; changed in place by ``prepare_model``.
        bits_activations: 1 .. 16; 0 or None leaves activations in float.
        bits_parameters: Likewise for weights.
        bits_accum: Of Linear's accumulator, 1 .. 32.
        overrides: By a regular expression of whole layer names, changes to ``bits_activations``,
            ``bits_weights``, ``clip_acts``, ``clip_n_stds`` or ``mode``. The first that matches counts.
        mode: A ``LinearQuantMode``, its name, or a map of both ``activations`` and ``weights``.
        clip_acts: A ``ClipMode`` or its name.
        per_channel_wts: One scale per output feature of a Linear, in place of one per layer.
        model_activation_stats: Calibrated statistics or the path of their file. None: ranges are found on
            every forward (dynamic quantization).
        clip_n_stds: For ``ClipMode.N_STD``.
        scale_approx_mult_bits: Cut scales to multipliers of so many bits and a shift.
        save_fp_weights: Keep each Linear's float weight and bias beside the integers, as ``float_weight`` and
            ``float_bias``.
        scaled_concat: A concatenation of tensors with a scale each that feeds one Linear keeps these scales, which go
            into the Linear's weight.
        per_channel_acts: A scale per output feature of a Linear that applies a ReLU, in place of one per layer, where
            all that reads it can fold these scales: a Linear, or a concatenation that keeps scales.
        embedding_bits: 4 or 8: embedding tables of so many bits, with a scale for every row, in place of one of
            ``bits_parameters`` with one scale for all.
        fuse_relu: Let a layer whose output feeds one ReLU apply it to its accumulator, and cut outputs' ranges to what
            their one consumer keeps. False: every module has the range that the statistics give it.

    Raises:
        InputError: an argument out of its range.
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
        self._calibrated = self.statistics  # as they were before ``prepare_model`` cuts them
        self.save_fp_weights = save_fp_weights
        self.scaled_concat = scaled_concat
        self.per_channel_acts = per_channel_acts
        self.embedding_bits = embedding_bits
        self.fuse_relu = fuse_relu

    @classmethod
    def from_args(cls, model: nn.Module, args: PostTrainFlags) -> PostTrainLinearQuantizer:
        """Return the quantizer that the flags of ``add_post_train_quant_args`` ask for.

        Args:
            model: In evaluation mode.
            args: The flags' values: a ``PostTrainFlags``, or what argparse returns.

        Raises:
            InputError: naming the flag, or the file and what is wrong in it.
        """
        if not args.qe_config_file:
            return cls(model, **arguments_of_flags(args, leaf_modules(model)))
        arguments = arguments_of_file(args, cls.__name__)
        try:
            return cls(model, **arguments)
        except TypeError as error:  # an argument that the constructor does not have
            raise InputError(f"--qe-config-file: {args.qe_config_file}: {error}") from error

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, but for the model and the statistics."""
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
        """What quantizes one layer as this quantizer does, on its statistics, and leaves all others in float.

        Args:
            model: In float, of the same structure.
            layer: Its name.
        """
        overrides = {re.escape(layer): changes_of(layer, self.overrides), ".*": IN_FLOAT}
        arguments = self.arguments() | {"overrides": overrides}
        return type(self)(model, model_activation_stats=self._calibrated, **arguments)

    def prepare_model(self, dummy_input: Any) -> None:
        """Replace the model's modules by quantized ones. A forward changes nothing afterwards.

        Args:
            dummy_input: Arguments of the model's forward, for tracing it.

        Raises:
            InputError: a layer's settings are out of range, or statistics that they need are missing.
            ValueError: the forward cannot be traced, or calls a module more than once.
        """
        self.model.eval()
        device = next(self.model.parameters()).device
        self.model.cpu()  # where statistics are; and parameters then are the same wherever the model runs
        self.graph = module_graph(self.model, dummy_input)
        self.modules = {name: self.model.get_submodule(name) for name in self.graph}
        repeated = [name for name, call in self.graph.items() if call.calls > 1]
        if repeated:
            raise ValueError(f"{repeated[0]} is called more than once; each call needs a module of its own")
        requests = requests_by_layer(self.default, self.overrides, leaf_modules(self.model))
        self.activations = {name: requests[name].activations(name) for name in self.graph}
        self.weights = {name: requests[name].weights(name) for name in self.graph}
        self._check_ranges()
        self.widths = output_widths(self.graph, self.modules)
        self.by_row: set[str] = set()  # modules whose outputs carry parameters of their own for every row
        self.fused = self._fuse_and_clip() if self.fuse_relu else set()
        carried: dict[str | None, QuantParams | None] = {}
        for name, call in self.graph.items():
            replacement = self._quantized(name, call, carried)
            if replacement is not None:
                self._replace(name, replacement)
        self.model.to(device)

    @property
    def dynamic(self) -> bool:
        """Whether ranges are found on every forward, so that a row's result depends on its whole batch."""
        return self.statistics is None and any(self.activations.values())

    def _check_ranges(self) -> None:
        for name, activations in self.activations.items():
            if self.statistics is None and activations and activations.clip.of_histogram:
                raise InputError(
                    f"--qe-clip-acts {activations.clip.value} for layer {name} needs --qe-stats-file: "
                    "it looks at calibrated histograms"
                )

    def _fuse_and_clip(self) -> set[str]:
        """Cut statistics to what consumers keep; the names of the modules that take over their ReLU."""
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
        accumulates = not isinstance(self.modules[name], (nn.Embedding, *PASS_THROUGH))
        floats = self.statistics is None and isinstance(self.modules[name], ELEMENTWISE)
        return isinstance(self.modules[consumer], nn.ReLU) and accumulates and not floats

    def _replace(self, name: str, module: nn.Module) -> None:
        self.modules[name] = module
        self.model.set_submodule(name, module)

    def _quantized(
        self, name: str, call: ModuleCall, carried: dict[str | None, QuantParams | None]
    ) -> nn.Module | None:
        """A module's quantized form, None where it stays; ``carried`` learns what its output carries."""
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
            embedding = QuantizedEmbedding(module, self._table_params(name, module, weights))
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
        fused = name in self.fused
        inputs, output = None, None
        if self.statistics is not None:
            inputs = self._input_params(name, module, activations, carried)
            output = self._params(name, None, activations, fused, self._has_scale_per_channel(name))
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
        """Of every input: what it carries, None where that differs from row to row, or else from its statistics."""
        if isinstance(module, nn.Embedding):
            return []  # its input is an index
        return [
            None
            if source in self.by_row
            else carried.get(source) or self._params(name, position, activations, half_range=False)
            for position, source in enumerate(self.graph[name].inputs)
        ]

    def _keeps_scales(self, name: str) -> bool:
        """Whether a module is a concatenation whose inputs keep their scales: its one consumer can fold them."""
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
        """Whether a module is a Linear that applies its ReLU, and what reads that can fold its columns' scales."""
        if not (self.per_channel_acts and name in self.fused and _is_linear(self.modules[name])):
            return False
        reader = self._only_consumer(self._only_consumer(name))
        return reader is not None and (_is_linear(self.modules[reader]) or self._keeps_scales(reader))

    def _only_consumer(self, name: str) -> str | None:
        """The one module that reads a module's output; None where there are several, or other uses."""
        consumers = self.graph[name].consumers
        return consumers[0] if len(consumers) == 1 else None

    def _params(
        self,
        name: str,
        position: int | None,
        activations: ActivationSettings,
        half_range: bool,
        by_column: bool = False,
    ) -> QuantParams:
        keys = required_statistics(activations.clip, activations.mode.symmetric)
        statistics = tensor_statistics(
            self.statistics, name, position, (*keys, "column_max") if by_column else keys
        )
        with _statistics_of(name):
            column_max = columns_of_text(statistics["column_max"]) if by_column else None
            if by_column and len(column_max) != self.widths[name]:
                raise ValueError(f"column_max of {len(column_max)} columns, not {self.widths[name]}")
            return activations.params(statistics, half_range, column_max)

    def _table_params(self, name: str, embedding: nn.Embedding, weights: WeightSettings) -> QuantParams:
        """Of an embedding's table: over its calibrated outputs, or over all of it where there are none."""
        if self.statistics is None:
            low, high = embedding.weight.detach().aminmax()
        else:
            output = tensor_statistics(self.statistics, name, None, ("min", "max"))
            low, high = torch.tensor([output["min"]]), torch.tensor([output["max"]])
        with _statistics_of(name):
            return params_of_range(low.reshape(1), high.reshape(1), weights.bits, weights.mode)

    def save(self, directory: str | os.PathLike) -> None:
        """Leave in a directory what ``prepare_model`` made: ranges as used, and every layer's parameters."""
        (Path(directory) / STATS_FILE).unlink(missing_ok=True)  # of an evaluation before, with other settings
        if self.statistics is not None:
            save_statistics(self.statistics, Path(directory) / STATS_FILE)
        with atomic_write(Path(directory) / PARAMS_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(self.describe(), sort_keys=False))

    def describe(self) -> dict[str, dict[str, Any]]:
        """By quantized layer: type, bits, modes, clipping, and its scales and zero points where they are scalars."""
        result = {}
        for name, module in self.modules.items():
            if isinstance(module, QuantizedModule | QuantizedTable | WeightQuantizedLinear):
                result[name] = {"type": type(module).__name__} | self._describe(name, module)
        return result

    def _describe(self, name: str, module: nn.Module) -> dict[str, Any]:
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


@contextmanager
def _statistics_of(layer: str) -> Iterator[None]:
    """Turn a range that quantization cannot use into an error that names the layer it is of."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"--qe-stats-file: layer {layer}: {error}") from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _check_range(flag: str, value: object, least: int, greatest: int) -> None:
    if type(value) is not int or not least <= value <= greatest:
        raise InputError(f"{flag}: {value!r}; it takes {least} to {greatest}")
