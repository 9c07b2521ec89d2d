"""NeuMF in integers. Its scores equal, bit for bit, those of the prepared model that simulates it in floats.

What depends on a user or an item alone is computed once and not for every pair. That includes the first MLP layer:
it acts on [user, item], so its accumulator is a sum of the user's plus a sum of the item's.

Shapes: B users, C items of each, N = B * C pairs, I items in all, F = mf_dim, L_0 .. L_n = mlp_layer_sizes.
"""

from __future__ import annotations

from types import UnionType

import torch
from torch import Tensor, nn

from distiller.quantization.integer import (
    IntegerLinear,
    NotIntegerError,
    Requantizer,
    require_finite,
    require_levels,
    rescalers_of,
)
from distiller.quantization.linear import dequantize
from distiller.quantization.wrappers import (
    FakeQuantized,
    QuantizedConcat,
    QuantizedLinear,
    QuantizedModule,
    QuantizedMult,
    QuantizedTable,
    ScaledConcat,
    carry,
)
from neural_cf.model import NeuMF
from neural_cf.ranking.blocks import COMPILED_PAIRS_AT_ONCE, PAIRS_AT_ONCE, InParts, for_one_shape
from neural_cf.ranking.scorers import sum_of_sides

TABLES = ("mf_user_embed", "mf_item_embed", "mlp_user_embed", "mlp_item_embed")


class IntegerNeuMF:
    """A scorer that computes NeuMF on 8-bit integers with 32-bit accumulators.

    Activations may have up to 16 bits. Where a linear layer that is computed for every pair reads more than 8 bits, it
    takes a second matrix product. Weights have up to 8 bits, except those of the first layer, which is not computed for
    every pair. The layers after the product of embeddings and the last ReLU may be left in float, or have any other
    settings, and then run as they are in the model.

    Args:
        model: A model prepared by ``PostTrainLinearQuantizer`` with ranges from calibration statistics.
        compiled: Compute with ``torch.compile``, for the numbers of users and items of the first call.

    Raises:
        NotIntegerError: a layer that must be in integers is left in float, finds its ranges on every batch or has too
            many bits; or sums may exceed 32 bits; or float32 cannot represent a range.
    """

    @torch.no_grad()
    def __init__(self, model: NeuMF, compiled: bool = False):
        check_layers(model)
        self._model = model
        users, items = model.mlp_user_embed.params, model.mlp_item_embed.params
        rescalers = rescalers_of("mlp_concat", model.mlp_concat, [users, items])
        item_integers = model.mlp_item_embed.integers().float()
        self._first = IntegerLinear(
            "mlp.0", model.mlp[0], [item_integers.shape[1]] * 2, rescalers, own_relu(model, 0), wide=True
        )
        self._item_sums = self._first.sums_of(1, item_integers, items)  # (I, L_1)
        self._later = [
            IntegerLinear(f"mlp.{i}", linear, [linear.weight.shape[1]], relu=own_relu(model, i))
            for i, linear in enumerate(model.mlp[1:], 1)
        ]
        self._prepare_product()
        self._prepare_final(self._item_integers.shape[1], model.mlp[-1].weight.shape[0])
        self.compiled = compiled
        self._in_integers = for_one_shape(self._integers) if compiled else self._integers
        self._parts = InParts(COMPILED_PAIRS_AT_ONCE if compiled else PAIRS_AT_ONCE)

    def _prepare_product(self) -> None:
        """Prepare the product of embeddings: its requantizer, and the items' (I, F) integers and scales."""
        model, items = self._model, self._model.mf_item_embed.params
        scales = [table.params.scale for table in (model.mf_user_embed, model.mf_item_embed)]
        for table in (model.mf_user_embed, model.mf_item_embed):
            require_levels("mf_mult", table.params)
        self._scale_by_row = any(scale.numel() > 1 for scale in scales)
        self._product = Requantizer(
            "mf_mult", model.mf_mult, None if self._scale_by_row else scales[0] * scales[1]
        )
        least, greatest = (
            torch.stack(bounds).prod() for bounds in zip(*(x.aminmax() for x in scales), strict=True)
        )
        require_finite("mf_mult", self._product.factor_of(torch.stack([least, greatest])))
        # They stay in 8 bits, so without their zero points: compiled code does not vectorize 16 bits to float32.
        self._item_integers = model.mf_item_embed.integers()
        rows = len(self._item_integers) if self._scale_by_row else 1
        self._item_scales, self._item_zero_points = (
            x.expand(rows, 1).contiguous() for x in (items.scale, items.zero_point)
        )

    def _prepare_final(self, mf_dim: int, mlp_dim: int) -> None:
        """Prepare the final linear layers and find the last layers that are computed in integers."""
        model = self._model
        self._joint: IntegerLinear | None = None
        self._branches: list[IntegerLinear | None] = [None, None]
        relu = own_relu(model, len(model.mlp) - 1)
        self._last: list[QuantizedModule] = [model.mf_mult, relu[1] if relu else model.mlp[-1]]
        if model.split_final:
            self._finals = [model.final_mf, model.final_mlp]
            for i, (name, width) in enumerate((("final_mf", mf_dim), ("final_mlp", mlp_dim))):
                if isinstance(self._finals[i], QuantizedLinear):
                    self._last[i] = self._finals[i]
                    self._branches[i] = IntegerLinear(name, self._finals[i], [width])
            return
        self._finals = [model.final]
        concat = model.final_concat
        if isinstance(model.final, QuantizedLinear) and isinstance(concat, QuantizedConcat | ScaledConcat):
            self._last = self._finals
            rescalers = rescalers_of("final_concat", concat, [concat.fixed_input(i) for i in range(2)])
            self._joint = IntegerLinear("final", model.final, [mf_dim, mlp_dim], rescalers)

    @torch.no_grad()
    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities (B, C) float32 of items (B, C) int64 for users (B,) int64."""
        outputs = self._parts(self._final_outputs, *self._user_sides(users), items).flatten(0, 1)
        logits = [
            carry(x, layer.fixed_output) if isinstance(layer, QuantizedModule) else x
            for x, layer in zip(outputs.split(1, dim=1), self._finals, strict=True)
        ]
        logit = self._model.final_add(*logits) if self._model.split_final else logits[0]
        return self._model.sigmoid(logit).view(items.shape)

    def _final_outputs(self, *sides: Tensor) -> Tensor:
        """Return the outputs of the final linear layers: (B, C, 1), or (B, C, 2) where they are split.

        ``sides`` are the tensors of ``_user_sides`` and the items (B, C).
        """
        return self._pair_outputs(*sides).view(len(sides[0]), sides[-1].shape[1], -1)

    def _pair_outputs(self, *sides: Tensor) -> Tensor:
        """Return what ``_final_outputs`` returns, as (N, 1) or (N, 2)."""
        values = [
            carry(x, layer.fixed_output)
            for x, layer in zip(self._in_integers(*sides), self._last, strict=True)
        ]
        if self._joint:
            return values[0]
        if not self._model.split_final:
            return self._model.final(self._model.final_concat(*values))
        finals = zip(values, self._branches, self._finals, strict=True)
        return torch.cat([x if branch else final(x) for x, branch, final in finals], dim=1)

    def _user_sides(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what depends on the users alone.

        Returns:
            (B, L_1), the users' sums in the first layer; (B, F), their integers in the product of embeddings; and
            (B, 1), the scales of these integers.
        """
        q, params = self._model.mf_user_embed.lookup(users)
        sums = self._first.sums_of(0, *self._model.mlp_user_embed.lookup(users))
        return sums, q + params.zero_point, params.scale.expand(len(users), 1)

    def _integers(
        self, user_sums: Tensor, user_factors: Tensor, user_scales: Tensor, items: Tensor
    ) -> list[Tensor]:
        """Return the dequantized outputs of the last integer layers, with N rows each."""
        mf, hidden = (
            self._embedding_products(user_factors, user_scales, items),
            self._hidden(user_sums, items),
        )
        if self._joint:
            integers = [self._joint(mf, hidden)]
        else:
            branches = zip(self._branches, (mf, hidden), strict=True)
            integers = [branch(q) if branch else q for branch, q in branches]
        return [dequantize(q, layer.fixed_output) for q, layer in zip(integers, self._last, strict=True)]

    def _embedding_products(self, user_factors: Tensor, user_scales: Tensor, items: Tensor) -> Tensor:
        """Return the product of user and item embeddings as integers, (N, F)."""
        flat = items.flatten()
        factors = self._item_integers.index_select(0, flat).float()
        if not self._scale_by_row:
            products = factors.add_(self._item_zero_points).view(*items.shape, -1) * user_factors[:, None]
            return self._product(products.flatten(0, 1))
        factors.add_(self._item_zero_points.index_select(0, flat))
        products = factors.view(*items.shape, -1) * user_factors[:, None]
        scales = self._item_scales.index_select(0, flat).view(*items.shape, 1) * user_scales[:, None]
        return self._product(products.flatten(0, 1), scales.view(-1, 1))

    def _hidden(self, user_sums: Tensor, items: Tensor) -> Tensor:
        """Return the output of the last ReLU as integers, (N, L_n)."""
        q = self._first.output(sum_of_sides(self._item_sums, items, user_sums))
        for linear in self._later:
            q = linear(q)
        return q


def own_relu(model: NeuMF, i: int) -> tuple[str, FakeQuantized] | None:
    """Return name and module of the ReLU after ``mlp.i``, or None if that linear layer applies it itself."""
    relu = model.mlp_relu[i]
    return (f"mlp_relu.{i}", relu) if isinstance(relu, FakeQuantized) else None


def check_layers(model: NeuMF) -> None:
    """Raise ``NotIntegerError`` unless all layers but the final ones are quantized, with fixed ranges."""
    linears = [f"mlp.{i}" for i in range(len(model.mlp))]
    kinds: dict[str, type[nn.Module] | UnionType] = dict.fromkeys(TABLES, QuantizedTable)
    kinds |= {"mf_mult": QuantizedMult, "mlp_concat": QuantizedConcat | ScaledConcat}
    kinds |= dict.fromkeys(linears, QuantizedLinear)
    for name, layer in model.named_modules():
        if getattr(layer, "dynamic", False):
            raise NotIntegerError(f"layer {name} finds its ranges on every batch")
    for name, kind in kinds.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, kind):
            raise NotIntegerError(f"layer {name} is left in float")
    for i, linear in enumerate(model.mlp):
        if not linear.fused_relu and not own_relu(model, i):
            raise NotIntegerError(f"layer mlp_relu.{i} is left in float")
