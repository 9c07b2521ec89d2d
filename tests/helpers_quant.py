"""What the quantization tests share: golden figures, small models, a NumPy reference of the quantized NeuMF.

The reference knows nothing of the library. It is one forward written from the definition: whole numbers are
int64, everything else float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization import PostTrainLinearQuantizer, add_post_train_quant_args
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.model import NeuMF, split_final_layer

DATA = Path(__file__).resolve().parent / "data"
TAGS = ("no_split", "split")
GOLDEN = json.loads((DATA / "ptq_small.json").read_text())
CASES = GOLDEN["cases"]
MODES = ("sym", "sym_restr", "asym_u", "asym_s")
CLIPS = ("none", "avg", "n_std", "gauss", "laplace")

f32 = np.float32


# --- the golden model ---


@cache
def golden_arrays() -> dict[str, np.ndarray]:
    with np.load(DATA / "ptq_small.npz") as arrays:
        return dict(arrays)


def golden_stats_path(tag: str) -> Path:
    return DATA / f"ptq_small_stats_{tag}.yaml"


def golden_stats(tag: str) -> dict:
    return yaml.safe_load(golden_stats_path(tag).read_text())


def golden_model(tag: str) -> NeuMF:
    prefix = "state_dict/"
    weights = {
        key.removeprefix(prefix): torch.from_numpy(array)
        for key, array in golden_arrays().items()
        if key.startswith(prefix)
    }
    split = tag == "split"
    sizes = (GOLDEN["nb_users"], GOLDEN["nb_items"], GOLDEN["mf_dim"], GOLDEN["mlp_layer_sizes"])
    model = NeuMF(*sizes, split_final=split).eval()
    model.load_state_dict(split_final_layer(weights) if split else weights)
    return model


def golden_pairs() -> tuple[Tensor, Tensor]:
    arrays = golden_arrays()
    return torch.from_numpy(arrays["users"]), torch.from_numpy(arrays["items"])


# --- the library, driven as the command line drives it ---


def parse(flags: str | list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_post_train_quant_args(parser)
    return parser.parse_args(shlex.split(flags) if isinstance(flags, str) else flags)


def prepared(model: nn.Module, flags: str | list[str], pairs: tuple) -> PostTrainLinearQuantizer:
    """The quantizer after it has quantized ``model``, as ``--qe`` and ``flags`` ask."""
    quantizer = PostTrainLinearQuantizer.from_args(model, parse(flags))
    quantizer.prepare_model((*pairs, True))
    return quantizer


def scores(model: nn.Module, pairs: tuple, sigmoid: bool | Tensor = True) -> np.ndarray:
    with torch.no_grad():
        return model(*pairs, sigmoid).numpy()


def integer_scores(model: NeuMF, pairs: tuple) -> np.ndarray:
    """The scores (N, 1) of a prepared model in integers."""
    users, items = pairs
    return IntegerNeuMF(model)(users, items[:, None]).numpy()


# --- small models ---


def small_model(
    seed: int,
    split: bool = False,
    users: int = 9,
    items: int = 7,
    mf_dim: int = 3,
    layers: Iterable[int] = (6, 5, 4),
    gain: float = 1.0,
) -> NeuMF:
    """A NeuMF with seeded weights of about unit size, so that every layer matters."""
    model = NeuMF(users, items, mf_dim, list(layers), split_final=split).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(gain * torch.randn(parameter.shape, generator=generator))
    return model


def all_pairs(model: NeuMF) -> tuple[Tensor, Tensor]:
    """Every user with every item, user by user."""
    users, items = model.mf_user_embed.num_embeddings, model.mf_item_embed.num_embeddings
    return torch.arange(users).repeat_interleave(items), torch.arange(items).repeat(users)


def user_batches(users: int, items: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((items,), user), torch.arange(items)) for user in range(users)]


def numpy_weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}


# --- statistics, one batch at a time ---


def seven_numbers(batches: list[np.ndarray]) -> dict:
    """Statistics of one tensor from its batches, each (R, ...): by the definition, in float64."""
    flat = [np.asarray(batch, dtype=np.float64).reshape(len(batch), -1) for batch in batches]
    values = np.concatenate([batch.ravel() for batch in flat])
    if flat[0].shape[1] == 1:
        lows = np.concatenate([np.full(len(batch), batch.min()) for batch in flat])
        highs = np.concatenate([np.full(len(batch), batch.max()) for batch in flat])
    else:
        lows = np.concatenate([batch.min(axis=1) for batch in flat])
        highs = np.concatenate([batch.max(axis=1) for batch in flat])
    mean = values.mean()
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "avg_min": float(lows.mean()),
        "avg_max": float(highs.mean()),
        "mean": float(mean),
        "std": float(np.sqrt(((values - mean) ** 2).mean())),
        "b": float(np.abs(values - mean).mean()),
        "shape": f"({', '.join(map(str, batches[0].shape))})",
    }


def column_max(batches: list[np.ndarray]) -> str:
    """Every column's largest value, as a statistics file has it."""
    rows = np.concatenate([batch.reshape(len(batch), -1) for batch in batches])
    return " ".join(repr(float(value)) for value in rows.max(axis=0))


def reference_statistics(model: nn.Module, batches: list[tuple]) -> dict:
    """Statistics of every leaf module, ``batches`` going through the model one after the other."""
    seen: dict[str, tuple[dict[int, list], list]] = {}
    names = [name for name, module in model.named_modules() if not list(module.children())]

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            of_inputs, of_output = seen.setdefault(name, ({}, []))
            for position, x in enumerate(inputs):
                of_inputs.setdefault(position, []).append(x.numpy().copy())
            of_output.append(output.numpy().copy())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    for handle in handles:
        handle.remove()
    return {
        name: {
            "inputs": {i: seven_numbers(arrays) for i, arrays in seen[name][0].items()},
            "output": seven_numbers(seen[name][1]) | {"column_max": column_max(seen[name][1])},
        }
        for name in names
        if name in seen
    }


def model_statistics(model: NeuMF) -> dict:
    users, items = model.mf_user_embed.num_embeddings, model.mf_item_embed.num_embeddings
    return reference_statistics(model, [(*pair, True) for pair in user_batches(users, items)])


# --- the reference ---


@dataclass(frozen=True)
class Settings:
    """One layer's settings; bits of 0 are float."""

    acts: int = 8
    wts: int = 8
    accum: int = 32
    mode_acts: str = "sym"
    mode_wts: str = "sym"
    clip: str = "none"
    n_stds: float | None = None
    per_channel: bool = False
    approx: int | None = None


@dataclass(frozen=True)
class Grid:
    """Scale (quanta per unit) and zero point, and the integers' range."""

    scale: np.ndarray
    zero: np.ndarray
    low: int
    high: int


@dataclass(frozen=True)
class Activation:
    x: np.ndarray
    grid: Grid | None = None


def over(n: float, width: np.ndarray) -> np.ndarray:
    """n / width the way the golden outputs have it: the reciprocal is rounded first, then the product."""
    return f32(n) * (f32(1) / width.astype(f32))


def grid_of(low: np.ndarray, high: np.ndarray, bits: int, mode: str) -> Grid:
    low, high = np.atleast_1d(low).astype(f32), np.atleast_1d(high).astype(f32)
    half = 2 ** (bits - 1)
    if mode in ("sym", "sym_restr"):
        n = (2**bits - 1) / 2 if mode == "sym" else half - 1
        reach = np.maximum(np.abs(low), np.abs(high))
        reach = np.where(reach == 0, f32(n), reach)
        return Grid(over(n, reach), np.zeros_like(reach), -half if mode == "sym" else 1 - half, half - 1)
    if (low > high).any():
        raise ValueError("upside down")
    n = 2**bits - 1
    low, high = np.minimum(low, f32(0)), np.maximum(high, f32(0))
    width = high - low
    scale = over(n, np.where(width == 0, f32(n), width))
    zero = np.rint(scale * low)
    if mode == "asym_u":
        return Grid(scale, zero, 0, n)
    return Grid(scale, zero + f32(half), -half, half - 1)


def quantized(x: np.ndarray, grid: Grid) -> np.ndarray:
    """float32 whole numbers."""
    return np.clip(np.rint(grid.scale * x - grid.zero), f32(grid.low), f32(grid.high))


def restored(q: np.ndarray, grid: Grid) -> np.ndarray:
    return (q + grid.zero) / grid.scale


def approximate(scale: np.ndarray, bits: int | None) -> np.ndarray:
    if bits is None:
        return scale
    power = np.exp2(np.floor(np.log2(over(2**bits - 1, scale)))).astype(f32)
    return np.floor(scale * power) / power


LAPLACE = (1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89)
LAPLACE_HALF = (1.86, 2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16)
GAUSS = (0, 1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92)
GAUSS_HALF = (0, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2)


def clipped(stats: dict, settings: Settings, half: bool) -> tuple[np.ndarray, np.ndarray]:
    symmetric = settings.mode_acts in ("sym", "sym_restr")
    if settings.clip == "none":
        return f32(stats["min"]), f32(stats["max"])
    if settings.clip == "avg":
        return f32(stats["avg_min"]), f32(stats["avg_max"])
    mean = f32(stats["mean"])
    if settings.clip == "n_std":
        reach = f32(settings.n_stds) * f32(stats["std"])
        return np.maximum(f32(stats["min"]), mean - reach), np.minimum(f32(stats["max"]), mean + reach)
    second = half and not symmetric
    if settings.clip == "laplace":
        alpha = f32(stats["b"] * (LAPLACE_HALF if second else LAPLACE)[settings.acts])
    else:
        alpha = f32(stats["std"] * (GAUSS_HALF if second else GAUSS)[settings.acts])
    if symmetric:
        return -(np.abs(mean) + alpha), np.abs(mean) + alpha
    low = np.maximum(f32(stats["avg_min"]), mean - alpha)
    return low, low + (alpha if half else f32(2) * alpha)


def measured(x: np.ndarray) -> dict:
    """Statistics of the tensor at hand, for dynamic mode."""
    x = x.astype(np.float64)
    return {
        "min": x.min(),
        "max": x.max(),
        "avg_min": x.min(axis=1).mean(),
        "avg_max": x.max(axis=1).mean(),
        "mean": x.mean(),
        "std": x.std(ddof=1),
        "b": np.abs(x - x.mean()).mean(),
    }


class Reference:
    """A quantized NeuMF.

    Args:
        weights: By ``state_dict`` key.
        stats: Calibrated statistics; None for dynamic mode.
        settings: Of a layer, by its name.
    """

    def __init__(
        self, weights: dict[str, np.ndarray], stats: dict | None, settings: Callable[[str], Settings]
    ):
        self.weights, self.settings = weights, settings
        self.split = "final_mf.weight" in weights
        self.depth = sum(key.startswith("mlp.") and key.endswith("weight") for key in weights)
        self.stats = copy.deepcopy(stats)
        self.fused = {f"mlp.{i}" for i in range(self.depth) if settings(f"mlp.{i}").acts}
        last = "final_add" if self.split else "final"
        if stats is not None:
            for name in self.fused:
                self._clip(name, name.replace("mlp.", "mlp_relu."), 0.0, np.inf)
            if settings(last).acts:
                self._clip(last, "sigmoid", -6.0, 6.0)

    def _clip(self, producer: str, consumer: str, low: float, high: float) -> None:
        output = self.stats[producer]["output"]
        for key in ("min", "max", "avg_min", "avg_max"):
            if key in output:
                output[key] = min(max(output[key], low), high)
        self.stats[consumer]["inputs"][0] = dict(output)

    def __call__(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        mf = self.mult("mf_mult", self.embed("mf_user_embed", users), self.embed("mf_item_embed", items))
        pair = self.embed("mlp_user_embed", users), self.embed("mlp_item_embed", items)
        hidden = self.concat("mlp_concat", *pair)
        for i in range(self.depth):
            hidden = self.linear(f"mlp.{i}", hidden)
            if f"mlp.{i}" not in self.fused:
                hidden = self.other(f"mlp_relu.{i}", lambda x: np.maximum(x, f32(0)), hidden)
        if self.split:
            halves = self.linear("final_mf", mf), self.linear("final_mlp", hidden)
            logit = self.add("final_add", *halves)
        else:
            logit = self.linear("final", self.concat("final_concat", mf, hidden))
        return self.other("sigmoid", lambda x: torch.from_numpy(x).sigmoid().numpy(), logit).x

    # -- parameters

    def grid(self, stats: dict, settings: Settings, half: bool = False) -> Grid:
        exact = grid_of(*clipped(stats, settings, half), settings.acts, settings.mode_acts)
        return Grid(approximate(exact.scale, settings.approx), exact.zero, exact.low, exact.high)

    def input_grid(self, name: str, position: int, a: Activation) -> Grid:
        if a.grid is not None:
            return a.grid
        stats = measured(a.x) if self.stats is None else self.stats[name]["inputs"][position]
        return self.grid(stats, self.settings(name))

    def output_grid(self, name: str, x: np.ndarray) -> Grid:
        stats = measured(x) if self.stats is None else self.stats[name]["output"]
        return self.grid(stats, self.settings(name), half=name in self.fused)

    def operands(self, name: str, inputs: tuple[Activation, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(q + zp) as int64, and the scale, of every input."""
        result = []
        for position, a in enumerate(inputs):
            grid = self.input_grid(name, position, a)
            result.append(((quantized(a.x, grid) + grid.zero).astype(np.int64), grid.scale))
        return result

    def requantized(self, accumulator: np.ndarray, factor: np.ndarray, out: Grid) -> Activation:
        q = np.rint(accumulator.astype(f32) * factor - out.zero)
        return Activation(restored(np.clip(q, f32(out.low), f32(out.high)), out), out)

    # -- modules

    def embed(self, name: str, index: np.ndarray) -> Activation:
        settings, table = self.settings(name), self.weights[f"{name}.weight"]
        if settings.wts:
            stats = {"min": table.min(), "max": table.max()}
            if self.stats is not None:
                stats = self.stats[name]["output"]
            grid = grid_of(f32(stats["min"]), f32(stats["max"]), settings.wts, settings.mode_wts)
            return Activation(restored(quantized(table, grid), grid)[index], grid)
        return self._fake(name, table[index]) if settings.acts else Activation(table[index])

    def _fake(self, name: str, x: np.ndarray) -> Activation:
        out = self.output_grid(name, x)
        return Activation(restored(quantized(x, out), out), out)

    def other(self, name: str, function: Callable, a: Activation) -> Activation:
        if not self.settings(name).acts:
            return Activation(function(a.x))
        grid = self.input_grid(name, 0, a)
        return self._fake(name, function(restored(quantized(a.x, grid), grid)))

    def mult(self, name: str, *inputs: Activation) -> Activation:
        settings = self.settings(name)
        if not settings.acts or self.stats is None:
            return Activation(inputs[0].x * inputs[1].x)
        (first, s_first), (second, s_second) = self.operands(name, inputs)
        out = self.output_grid(name, None)
        factor = approximate(out.scale / (s_first * s_second), settings.approx)
        return self.requantized(int_range(first * second, 32), factor, out)

    def _rescaled(self, name: str, inputs: tuple[Activation, ...]) -> tuple[list[np.ndarray], Grid]:
        out = self.output_grid(name, None)
        rescaled = [np.rint(q.astype(f32) * (out.scale / scale)) for q, scale in self.operands(name, inputs)]
        return [int_range(r.astype(np.int64), 32) for r in rescaled], out

    def concat(self, name: str, *inputs: Activation) -> Activation:
        if not self.settings(name).acts or self.stats is None:
            return Activation(np.concatenate([a.x for a in inputs], axis=1))
        parts, out = self._rescaled(name, inputs)
        return self.requantized(np.concatenate(parts, axis=1), f32(1), out)

    def add(self, name: str, *inputs: Activation) -> Activation:
        if not self.settings(name).acts or self.stats is None:
            return Activation(inputs[0].x + inputs[1].x)
        (first, second), out = self._rescaled(name, inputs)
        return self.requantized(first + second, f32(1), out)

    def weight_grid(self, name: str) -> Grid:
        settings, weight = self.settings(name), self.weights[f"{name}.weight"]
        rows = weight if settings.per_channel else weight.reshape(1, -1)
        return grid_of(rows.min(axis=1), rows.max(axis=1), settings.wts, settings.mode_wts)

    def linear(self, name: str, a: Activation) -> Activation:
        settings = self.settings(name)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if settings.wts:
            grid = self.weight_grid(name)
            column = Grid(grid.scale[:, None], grid.zero[:, None], grid.low, grid.high)
            q_weight = quantized(weight, column)
            bias_grid = grid_of(-np.abs(bias).max(), np.abs(bias).max(), 32, "sym")
            if not settings.acts:
                return Activation(
                    float_linear(
                        a.x, restored(q_weight, column), restored(quantized(bias, bias_grid), bias_grid)
                    )
                )
        elif not settings.acts:
            return Activation(float_linear(a.x, weight, bias))
        else:
            grid = self.input_grid(name, 0, a)
            x = float_linear(restored(quantized(a.x, grid), grid), weight, bias)
            return self._fake(name, np.maximum(x, f32(0)) if name in self.fused else x)

        ((integers, s_x),) = self.operands(name, (a,))
        s_acc = approximate(s_x * grid.scale, settings.approx)
        if self.stats is None:
            factor = approximate(s_acc / bias_grid.scale, settings.approx)
            q_bias = np.rint((quantized(bias, bias_grid) + bias_grid.zero) * factor)
        else:
            q_bias = np.rint(s_acc * bias)
        accumulator = integers @ (q_weight + column.zero).astype(np.int64).T
        accumulator = accumulator + int_range(q_bias.astype(np.int64), settings.accum)
        accumulator = int_range(accumulator, settings.accum)
        if name in self.fused:
            accumulator = np.maximum(accumulator, 0)
        out = self.output_grid(name, accumulator.astype(f32) / s_acc)
        return self.requantized(accumulator, approximate(out.scale / s_acc, settings.approx), out)


def int_range(integers: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(integers, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def float_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """In the float library that the model runs on, so that its rounding is no difference."""
    return F.linear(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (x, weight, bias))).numpy()
