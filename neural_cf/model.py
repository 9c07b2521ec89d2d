"""NeuMF, neural matrix factorization (He et al., Neural Collaborative Filtering, WWW 2017, section 3.4).

Shapes: N pairs, U users, I items, F = mf_dim, L_0 .. L_n = mlp_layer_sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.system.cli import InputError

StateDict = Mapping[str, Tensor]
EMBEDDING_STD = 0.01  # of the initial Gaussian, from He et al. 2017, section 4.1


class NeuMF(nn.Module):
    """A NeuMF: matrix factorization and a multi-layer perceptron on [user, item], joined by a final linear layer.

    Args:
        nb_users: U, the number of users.
        nb_items: I, the number of items.
        mf_dim: F, the number of factors of the matrix factorization branch; 0 leaves the branch out (the paper's MLP,
            section 3.3).
        mlp_layer_sizes: L_0 .. L_n, the layer widths of the perceptron branch. L_0 is the width of [user, item] and so
            must be even. [0] leaves the branch out (the paper's GMF, section 3.2).
        split_final: Score each branch with a final linear layer of its own and add the two scores, instead of one layer
            over the concatenation. Both are the same function in FP32; in INT8, split branches have separate ranges.

    Raises:
        InputError: no model has these sizes, or ``split_final`` is asked for with a single branch.
    """

    def __init__(
        self,
        nb_users: int,
        nb_items: int,
        mf_dim: int,
        mlp_layer_sizes: Sequence[int],
        split_final: bool = False,
    ):
        super().__init__()
        check_sizes(nb_users, nb_items, mf_dim, mlp_layer_sizes, split_final)
        self.split_final = split_final
        mlp_dim, last = mlp_layer_sizes[0] // 2, mlp_layer_sizes[-1]

        self.mf_user_embed = nn.Embedding(nb_users, mf_dim)
        self.mf_item_embed = nn.Embedding(nb_items, mf_dim)
        self.mlp_user_embed = nn.Embedding(nb_users, mlp_dim)
        self.mlp_item_embed = nn.Embedding(nb_items, mlp_dim)
        self.mf_mult = EltwiseMult()
        self.mlp_concat = Concat(dim=1)
        widths = list(pairwise(mlp_layer_sizes))
        self.mlp = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in widths)
        self.mlp_relu = nn.ModuleList(nn.ReLU() for _ in widths)
        if split_final:
            self.final_mlp = nn.Linear(last, 1)
            self.final_mf = nn.Linear(mf_dim, 1)
            self.final_add = EltwiseAdd()
        else:
            self.final_concat = Concat(dim=1)
            self.final = nn.Linear(mf_dim + last, 1)
        self.sigmoid = nn.Sigmoid()
        self._initialize(fan_in_final=mf_dim + last)

    def _initialize(self, fan_in_final: int) -> None:
        """Draw weights: embeddings normal, MLP Glorot uniform, final layer LeCun uniform; biases stay as they are."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif name.startswith("mlp."):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Linear):
                # The halves of a split layer have the fan-in of the whole one.
                bound = math.sqrt(3 / fan_in_final)
                nn.init.uniform_(module.weight, -bound, bound)

    def forward(self, user: Tensor, item: Tensor, sigmoid: bool = False) -> Tensor:
        """Return the scores of pairs of a user and an item.

        Args:
            user: (N,) integer row numbers of the users, in [0, U).
            item: (N,) integer row numbers of the items, in [0, I).
            sigmoid: Return probabilities instead of logits.

        Returns:
            (N, 1) scores in the weights' dtype.
        """
        mf_user, mf_item = self.mf_user_embed(user), self.mf_item_embed(item)
        logit = self.score(mf_user, mf_item, self.mlp_user_embed(user), self.mlp_item_embed(item))
        return self.sigmoid(logit) if sigmoid else logit

    def score(self, mf_user: Tensor, mf_item: Tensor, mlp_user: Tensor, mlp_item: Tensor) -> Tensor:
        """Return the (N, 1) logits of pairs from their embeddings, (N, F) for mf and (N, L_0 / 2) for mlp."""
        mf = self.mf_mult(mf_user, mf_item)  # (N, F)
        hidden = self.mlp_concat(mlp_user, mlp_item)  # (N, L_0)
        for linear, relu in zip(self.mlp, self.mlp_relu, strict=True):
            hidden = relu(linear(hidden))  # (N, L_i)
        if self.split_final:
            return self.final_add(self.final_mf(mf), self.final_mlp(hidden))
        return self.final(self.final_concat(mf, hidden))

    def squared_norms(self, mf_user: Tensor, mf_item: Tensor, mlp_user: Tensor, mlp_item: Tensor) -> Tensor:
        """Return the (N,) sums of squares of pairs' embeddings, (N, F) for mf and (N, L_0 / 2) for mlp.

        Squares in the matrix factorization branch count |h| times, where h is the final layer's weight of their factor.
        Scaling these embeddings by s and h by 1 / s^2, which changes no score, then changes no norm either. Without h,
        training would evade a penalty on the norm by letting h grow.
        """
        h = (self.final_mf if self.split_final else self.final).weight[0, : mf_user.shape[1]].abs()
        mlp = mlp_user.square().sum(dim=1) + mlp_item.square().sum(dim=1)
        return (mf_user.square() + mf_item.square()) @ h + mlp

    def tables(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the tables of users, (U, F) for mf and (U, L_0 / 2) for mlp, and the same of items, with I rows."""
        return (
            [self.mf_user_embed.weight, self.mlp_user_embed.weight],
            [self.mf_item_embed.weight, self.mlp_item_embed.weight],
        )


def check_sizes(
    nb_users: int, nb_items: int, mf_dim: int, mlp_layer_sizes: Sequence[int], split_final: bool = False
) -> None:
    """Raise an ``InputError`` that names the flag at fault unless a ``NeuMF`` can have these sizes."""
    if nb_users < 1 or nb_items < 1:
        raise InputError(f"a model needs users and items, not {nb_users} and {nb_items}")
    if mf_dim < 0:
        raise InputError(f"-f/--factors must be at least 0, not {mf_dim}")
    if split_final and not has_both_branches(mf_dim, mlp_layer_sizes):
        raise InputError("--split-final: a model of one branch has no final layer to split")
    if list(mlp_layer_sizes) == [0]:
        if not mf_dim:
            raise InputError("-f/--factors and --layers are both 0, which leaves no branch")
        return
    if len(mlp_layer_sizes) < 2:
        raise InputError("--layers needs at least two sizes, or 0 alone")
    if min(mlp_layer_sizes) < 1:
        raise InputError(f"--layers has a size below 1: {' '.join(map(str, mlp_layer_sizes))}")
    if mlp_layer_sizes[0] % 2:
        raise InputError(f"--layers starts with {mlp_layer_sizes[0]}: half is the user's, so it must be even")


def has_both_branches(mf_dim: int, mlp_layer_sizes: Sequence[int]) -> bool:
    """Return whether a model of these sizes has both matrix factorization and a perceptron."""
    return mf_dim > 0 and list(mlp_layer_sizes) != [0]


def sizes_from_state_dict(state_dict: StateDict) -> dict:
    """Return the arguments of the ``NeuMF`` constructor that give weights of these shapes.

    Raises:
        InputError: a weight is missing or superfluous, or its shape does not fit the others.
    """
    try:
        nb_users, mf_dim = state_dict["mf_user_embed.weight"].shape
        nb_items, mlp_dim = state_dict["mlp_item_embed.weight"].shape
        sizes = [2 * mlp_dim]
        while f"mlp.{len(sizes) - 1}.weight" in state_dict:
            sizes.append(state_dict[f"mlp.{len(sizes) - 1}.weight"].shape[0])
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"not the weights of a NeuMF: {error}") from error
    arguments = {
        "nb_users": nb_users,
        "nb_items": nb_items,
        "mf_dim": mf_dim,
        "mlp_layer_sizes": sizes,
        "split_final": is_split(state_dict),
    }
    check_sizes(**arguments)
    with torch.device("meta"):
        expected = {key: tensor.shape for key, tensor in NeuMF(**arguments).state_dict().items()}
    found = {key: tensor.shape for key, tensor in state_dict.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise InputError(
                f"not the weights of a NeuMF: {key} is {_text(found.get(key))}, not {_text(expected.get(key))}"
            )
    return arguments


def weights_of_quantized(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the tensors of a prepared model's weights and biases, integers or floats, by the float model's names.

    An embedding table whose integers are packed two to a byte is replaced by a tensor on the meta device, which has the
    table's real width, known from the layers that read the table, but no values.
    """
    names = {key: key.replace(".module.", ".") for key in state_dict if key.endswith((".weight", ".bias"))}
    weights = {name: state_dict[key] for key, name in names.items()}
    for branch, width in _table_widths(weights).items():
        for name in (f"{branch}_user_embed.weight", f"{branch}_item_embed.weight"):
            rows, columns = _matrix_shape(weights, name)
            if columns < width and columns == (width + 1) // 2:
                weights[name] = torch.empty(rows, width, device="meta")
    return weights


def _table_widths(weights: StateDict) -> dict[str, int]:
    """Return the width of each branch's embedding tables, from the shapes of the layers that read them."""
    last = sum(re.fullmatch(r"mlp\.\d+\.weight", key) is not None for key in weights) - 1
    final = _matrix_shape(weights, "final_mf.weight" if is_split(weights) else "final.weight")[1]
    hidden = 0 if is_split(weights) else _matrix_shape(weights, f"mlp.{last}.weight")[0]
    return {"mf": final - hidden, "mlp": _matrix_shape(weights, "mlp.0.weight")[1] // 2}


def _matrix_shape(weights: StateDict, name: str) -> tuple[int, ...]:
    """Return a weight's rows and columns; 0 and 0 if it is missing or not a matrix."""
    return tuple(weights[name].shape) if name in weights and weights[name].dim() == 2 else (0, 0)


def _text(shape: torch.Size | None) -> str:
    """Return a weight's shape as messages show it; None is a missing weight."""
    return "absent" if shape is None else str(tuple(shape))


def is_split(state_dict: StateDict) -> bool:
    """Return whether the weights have a final layer for each branch, as with ``split_final=True``."""
    return "final_mf.weight" in state_dict


def split_final_layer(state_dict: StateDict) -> dict[str, Tensor]:
    """Return weights for ``split_final=True`` made from weights for ``split_final=False``, which stay unchanged.

    ``final.weight`` is [MF, MLP]. Half of the bias goes to each branch: both halving and adding the halves are exact in
    floating point.
    """
    result = {key: tensor for key, tensor in state_dict.items() if not key.startswith("final.")}
    weight, bias = state_dict["final.weight"], state_dict["final.bias"]
    mf_dim = state_dict["mf_user_embed.weight"].shape[1]
    result["final_mlp.weight"], result["final_mlp.bias"] = weight[:, mf_dim:].clone(), bias / 2
    result["final_mf.weight"], result["final_mf.bias"] = weight[:, :mf_dim].clone(), bias / 2
    return result


def join_final_layer(state_dict: StateDict) -> dict[str, Tensor]:
    """Return weights for ``split_final=False`` made from weights for ``split_final=True``, which stay unchanged."""
    result = {key: t for key, t in state_dict.items() if not key.startswith(("final_mf.", "final_mlp."))}
    result["final.weight"] = torch.cat([state_dict["final_mf.weight"], state_dict["final_mlp.weight"]], dim=1)
    result["final.bias"] = state_dict["final_mf.bias"] + state_dict["final_mlp.bias"]
    return result


def with_final_layer(state_dict: StateDict, split_final: bool) -> dict[str, Tensor]:
    """Return the weights with the final layer split or joined, converted if they have it the other way."""
    if is_split(state_dict) == split_final:
        return dict(state_dict)
    return split_final_layer(state_dict) if split_final else join_final_layer(state_dict)
