"""Scores from exported models: of ONNX by onnxruntime, of ``torch.export`` by PyTorch."""

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
    """Raise an ``InputError`` where a library that ``flag`` needs is missing."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{flag} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class ExportedScorer(ABC):
    """Calls an exported model on pairs, of one user after the other."""

    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """The probabilities (B, C) float32 of items (B, C) int64 for users (B,) int64."""
        return InParts(PAIRS_AT_ONCE)(self._scores, users, items)

    def _scores(self, users: Tensor, items: Tensor) -> Tensor:
        items = items.expand(len(users), -1)
        return self.run(users.repeat_interleave(items.shape[1]), items.flatten()).view(items.shape)

    @abstractmethod
    def run(self, users: Tensor, items: Tensor) -> Tensor:
        """The probabilities (N, 1) of pairs, (N,) int64 each."""


class OnnxScorer(ExportedScorer):
    """Runs an ONNX model on pairs with onnxruntime, on the CPU, in as many threads as PyTorch has.

    Args:
        path: The model: ``user`` and ``item`` (N,) int64 to ``score`` (N, 1).

    Raises:
        InputError: onnxruntime cannot run it, or it has other inputs or outputs.
        OSError: it cannot be read.
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
        pairs = dict(zip(INPUTS, (users.numpy(), items.numpy()), strict=True))
        return torch.from_numpy(self._session.run([OUTPUT], pairs)[0])


class _Probabilities(nn.Module):
    """A model whose forward has no flag."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.model(user, item, sigmoid=True)


def save_exported(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model by ``torch.export``: ``user`` and ``item`` (N,) int64, for any N, to probabilities (N, 1)."""
    pairs = (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    rows = torch.export.Dim("N")
    program = torch.export.export(
        _Probabilities(model.eval()), pairs, dynamic_shapes={"user": {0: rows}, "item": {0: rows}}
    )
    with open(path, "wb") as file:
        torch.export.save(program, file)


class TorchScorer(ExportedScorer):
    """Runs what ``save_exported`` wrote.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike):
        with open(path, "rb") as file:
            self._model = torch.export.load(file).module()

    @torch.no_grad()
    def run(self, users: Tensor, items: Tensor) -> Tensor:
        return self._model(users, items)
