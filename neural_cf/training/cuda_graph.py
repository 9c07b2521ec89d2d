"""A training step as a CUDA graph, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neural_cf.data.batches import Batch, Distinct

WARM_UP_STEPS = (
    3  # before a capture, as PyTorch's notes on CUDA graphs have it: kernels are chosen and memory taken
)


class Capture:
    """A step as a CUDA graph: launched as a whole, without the host's work for each kernel.

    Args:
        step: Takes a batch and returns a loss on the GPU; the shapes of batches are always the same, and so are
            the tensors that it changes. What the host computes in it is computed once.
    """

    def __init__(self, step: Callable[[Batch], Tensor]):
        self._step = step
        self._stream = torch.cuda.Stream()
        self._version: int | None = None

    def __call__(self, batch: Batch, version: int) -> Tensor:
        """Take a step; with another ``version`` of what the step does, capture it again."""
        if version != self._version:
            self._version, self._graph, self._warm_up = version, None, WARM_UP_STEPS
        if self._warm_up:
            self._warm_up -= 1
            return self._beside(batch)
        if self._graph is None:
            self._record(batch)
        for static, tensor in zip(tensors_of(self._batch), tensors_of(batch), strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._loss.clone()

    def _beside(self, batch: Batch) -> Tensor:
        """Take the step on another stream, as a capture will."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        current.wait_stream(self._stream)
        return loss

    def _record(self, batch: Batch) -> None:
        self._batch = Batch(
            *(part.clone() for part in batch[:4]),
            *(Distinct(*(part.clone() for part in ids)) for ids in batch[4:]),
        )
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._loss = self._step(self._batch)


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, in a fixed order."""
    return [*batch[:4], *batch.distinct_users, *batch.distinct_items]
