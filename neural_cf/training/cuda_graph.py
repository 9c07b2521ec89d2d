"""A training step that is captured once as a CUDA graph and then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neural_cf.data.batches import Batch, Distinct

# Steps before a capture, in which kernels are chosen and memory is allocated. Their number is from PyTorch's notes on
# CUDA graphs.
WARM_UP_STEPS = 3


class Capture:
    """A training step as a CUDA graph, which the host launches as a whole instead of kernel by kernel.

    Args:
        step: A function that takes a batch and returns a loss on the GPU. All batches must have the same shapes, and
            every call must change the same tensors. The host's own computations run only during the warm-up and the
            capture, and not in a replay.
    """

    def __init__(self, step: Callable[[Batch], Tensor]):
        self._step = step
        self._stream = torch.cuda.Stream()
        self._version: int | None = None

    def __call__(self, batch: Batch, version: int) -> Tensor:
        """Take a step and return its loss; capture the step anew if ``version`` has changed."""
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
        """Take a warm-up step on the stream that the capture will use."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        current.wait_stream(self._stream)
        return loss

    def _record(self, batch: Batch) -> None:
        """Capture the step on a copy of the batch, whose tensors later batches are copied to."""
        self._batch = Batch(
            *(part.clone() for part in batch[:4]),
            *(Distinct(*(part.clone() for part in ids)) for ids in batch[4:]),
        )
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._loss = self._step(self._batch)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return all tensors of a batch in a fixed order."""
    return [*batch[:4], *batch.distinct_users, *batch.distinct_items]
