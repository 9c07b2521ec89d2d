"""Scorers that run exported models: ONNX files with onnxruntime, files of ``torch.export`` with PyTorch.

Shapes: B users, C items of each, N pairs of user and item.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from distiller.system.cli import InputError
from neural_cf.ranking.blocks import PAIRS_AT_ONCE, InParts

INPUTS, OUTPUT = ("user", "item"), "score"


def require_onnx(flag: str) -> None:
    """Raise an ``InputError`` where a library is missing that ``flag``, as the message names it, needs."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{flag} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class ExportedScorer(ABC):
    """A scorer that runs an exported model on pairs of user and item, one user after the other."""

    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities (B, C) float32 of items (B, C) int64 for users (B,) int64."""
        return InParts(PAIRS_AT_ONCE)(self._scores, users, items)

    def _scores(self, users: Tensor, items: Tensor) -> Tensor:
        items = items.expand(len(users), -1)
        return self.run(users.repeat_interleave(items.shape[1]), items.flatten()).view(items.shape)

    @abstractmethod
    def run(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities (N, 1) of pairs of users and items, (N,) int64 each."""


class OnnxScorer(ExportedScorer):
    """A scorer that runs an ONNX model with onnxruntime, on the CPU, in as many threads as PyTorch has.

    Args:
        path: The ONNX file. Its inputs are ``user`` and ``item``, (N,) int64, its output is ``score``, (N, 1).

    Raises:
        InputError: onnxruntime cannot run the model, or it has other inputs or outputs.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        import onnxruntime as runtime  # an optional extra

        with open(path, "rb") as file:
            content = file.read()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        # onnxruntime's errors have no base class of their own but RuntimeError's.
        except Exception as error:
            raise InputError(f"{path}: onnxruntime cannot run it: {' '.join(str(error).split())}") from error
        inputs = [x.name for x in self._session.get_inputs()]
        outputs = [x.name for x in self._session.get_outputs()]
        if sorted(inputs) != sorted(INPUTS) or outputs != [OUTPUT]:
            raise InputError(f"{path}: its inputs and outputs are {inputs} and {outputs}, not a NeuMF's")

    def run(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities of pairs, as in the base class."""
        pairs = dict(zip(INPUTS, (users.numpy(), items.numpy()), strict=True))
        return torch.from_numpy(self._session.run([OUTPUT], pairs)[0])


class _Probabilities(nn.Module):
    """A model whose ``forward`` always returns probabilities, without a flag for it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.model(user, item, sigmoid=True)


def save_exported(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model with ``torch.export``.

    The written model's inputs are ``user`` and ``item``, (N,) int64 for any N, its output is probabilities (N, 1).
    """
    pairs = (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    rows = torch.export.Dim("N")
    program = torch.export.export(
        _Probabilities(model.eval()), pairs, dynamic_shapes={"user": {0: rows}, "item": {0: rows}}
    )
    with open(path, "wb") as file:
        torch.export.save(program, file)


class TorchScorer(ExportedScorer):
    """A scorer that runs a file of ``save_exported`` with PyTorch.

    Args:
        path: The file's path.
    """

    def __init__(self, path: str | os.PathLike):
        with open(path, "rb") as file:
            self._model = torch.export.load(file).module()

    @torch.no_grad()
    def run(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the probabilities of pairs, as in the base class."""
        return self._model(users, items)
