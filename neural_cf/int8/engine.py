"""NeuMF in integers: scores equal to those of the prepared model that simulates them in floats, bit for bit.

What belongs to a user or to an item alone is computed once and not once per pair. That holds for the first layer too,
which acts on [user, item]: its sum is one of the user plus one of the item.

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
    """Scores items for users on 8-bit integers with 32-bit sums.

    What is not multiplied for every pair may have up to 16 bits: the first layer's inputs, the product of embeddings
    and the last ReLU's output. The layers after these two may also be left in float, or have any other settings: then
    they run as they are in the model.

    Args:
        model: Prepared by ``PostTrainLinearQuantizer``, with ranges from statistics.
        compiled: Compute with ``torch.compile``, for as many users and items as the first call has.

    Raises:
        NotIntegerError: a layer up to there is left in float, finds its ranges on every batch or has more bits; or sums
            may pass 32 bits, or ranges what float32 holds.
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
        self._in_integers = for_one_shape(self._integers) if compiled else self._integers
        self._parts = InParts(COMPILED_PAIRS_AT_ONCE if compiled else PAIRS_AT_ONCE)

    def _prepare_product(self) -> None:
        """The items' side of the product of embeddings: (I, F) integers, and their parameters."""
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
        # Of 8 bits, and without their zero points: compiled, 16 bits to float32 are not vectorized.
        self._item_integers = model.mf_item_embed.integers()
        rows = len(self._item_integers) if self._scale_by_row else 1
        self._item_scales, self._item_zero_points = (
            x.expand(rows, 1).contiguous() for x in (items.scale, items.zero_point)
        )

    def _prepare_final(self, mf_dim: int, mlp_dim: int) -> None:
        """The final linear layers, those of them that are computed in integers, and the last layers that are."""
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
        """The probabilities (B, C) float32 of items (B, C) int64 for users (B,) int64."""
        outputs = self._parts(self._final_outputs, *self._of_users(users), items).flatten(0, 1)
        logits = [
            carry(x, layer.fixed_output) if isinstance(layer, QuantizedModule) else x
            for x, layer in zip(outputs.split(1, dim=1), self._finals, strict=True)
        ]
        logit = self._model.final_add(*logits) if self._model.split_final else logits[0]
        return self._model.sigmoid(logit).view(items.shape)

    def _final_outputs(self, *users: Tensor) -> Tensor:
        """What the final linear layers put out: (B, C, 1) or, split, (B, C, 2)."""
        return self._of_pairs(*users).view(len(users[0]), users[-1].shape[1], -1)

    def _of_pairs(self, *users: Tensor) -> Tensor:
        """The same: (N, 1) or (N, 2)."""
        values = [
            carry(x, layer.fixed_output)
            for x, layer in zip(self._in_integers(*users), self._last, strict=True)
        ]
        if self._joint:
            return values[0]
        if not self._model.split_final:
            return self._model.final(self._model.final_concat(*values))
        finals = zip(values, self._branches, self._finals, strict=True)
        return torch.cat([x if branch else final(x) for x, branch, final in finals], dim=1)

    def _of_users(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What users bring to the first layer's sums, (B, L_1), and to the product of embeddings.

        That is (B, F) integers in units of their scales, and these, (B, 1).
        """
        q, params = self._model.mf_user_embed.lookup(users)
        sums = self._first.sums_of(0, *self._model.mlp_user_embed.lookup(users))
        return sums, q + params.zero_point, params.scale.expand(len(users), 1)

    def _integers(
        self, user_sums: Tensor, user_factors: Tensor, user_scales: Tensor, items: Tensor
    ) -> list[Tensor]:
        """What the last layers that are computed in integers hand on: N rows each."""
        mf, hidden = self._multiplied(user_factors, user_scales, items), self._hidden(user_sums, items)
        if self._joint:
            integers = [self._joint(mf, hidden)]
        else:
            branches = zip(self._branches, (mf, hidden), strict=True)
            integers = [branch(q) if branch else q for branch, q in branches]
        return [dequantize(q, layer.fixed_output) for q, layer in zip(integers, self._last, strict=True)]

    def _multiplied(self, user_factors: Tensor, user_scales: Tensor, items: Tensor) -> Tensor:
        """Of the product of both embeddings: (N, F)."""
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
        """Of the last ReLU: (N, L_n)."""
        q = self._first.output(sum_of_sides(self._item_sums, items, user_sums))
        for linear in self._later:
            q = linear(q)
        return q


def own_relu(model: NeuMF, i: int) -> tuple[str, FakeQuantized] | None:
    """The name and the module of a ReLU that is quantized by itself; None where its linear layer applies it."""
    relu = model.mlp_relu[i]
    return (f"mlp_relu.{i}", relu) if isinstance(relu, FakeQuantized) else None


def check_layers(model: NeuMF) -> None:
    """Raise a ``NotIntegerError`` unless all layers but the final ones are quantized, with fixed ranges."""
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
