"""One optimizer step on a batch: forward, backward, exchange between processes, update.

Where PyTorch can compile, the parts of a step are compiled; on a GPU the whole step is captured once, as a CUDA
graph, and replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller.quantization.train_aware import is_quantization_aware
from neural_cf.data.batches import Batch, Distinct
from neural_cf.model import NeuMF
from neural_cf.runs.processes import Processes
from neural_cf.training.cuda_graph import Capture
from neural_cf.training.lazy_adam import LazyAdam


class Step:
    """Takes optimizer steps.

    Args:
        model: A NeuMF, float or prepared for quantization-aware training.
        optimizer: Over its parameters. With ``LazyAdam``, steps after its dense ones touch a batch's rows alone,
            unless the model is quantization-aware: it rounds by the range of the whole table.
        precision: Of the matrix products, one of ``PRECISIONS``: "fp32" leaves them in the weights' own. Weights,
            their gradients and the optimizer's state stay as they are.
        compiled: Compute with ``torch.compile``.
        processes: That share each batch.
        l2: What a sample's ``NeuMF.squared_norms`` count in its loss: a penalty on the rows that a batch touches, as
            often as it does.
    """

    def __init__(
        self,
        model: NeuMF,
        optimizer: torch.optim.Optimizer,
        precision: str = "fp32",
        compiled: bool = False,
        processes: Processes | None = None,
        l2: float = 0.0,
    ):
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.processes = processes or Processes()
        self.l2 = l2
        self._loss = self._mean_loss if not isinstance(optimizer, LazyAdam) else self._mean_loss_of_rows
        if compiled:
            self._loss = torch.compile(self._loss, dynamic=False, fullgraph=True)
            if isinstance(optimizer, LazyAdam):
                optimizer.compile()
        self._capture = None
        # Between processes the exchange keeps a step from being captured whole.
        if next(model.parameters()).is_cuda and self.processes.world_size == 1:
            self._capture = Capture(self._lazy_step)

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step; the mean loss of its samples in all processes before it, ()."""
        self.model.train()
        if not isinstance(self.optimizer, LazyAdam):
            return self._dense_step(batch)
        if self.optimizer.dense or is_quantization_aware(self.model):
            self.optimizer.flush()
            return self._dense_step(batch)
        self.optimizer.begin()
        if self._capture is None:
            return self._lazy_step(batch)
        return self._capture(batch, self.optimizer.version)

    def _dense_step(self, batch: Batch) -> Tensor:
        model = self.model
        self.optimizer.zero_grad()
        embeddings = (
            model.mf_user_embed(batch.users),
            model.mf_item_embed(batch.items),
            model.mlp_user_embed(batch.users),
            model.mlp_item_embed(batch.items),
        )
        # Not worth compiling for a lazy optimizer's first steps; what rounds changes from batch to batch.
        plain = isinstance(self.optimizer, LazyAdam) or is_quantization_aware(model)
        loss = (self._mean_loss if plain else self._loss)(*embeddings, batch.labels, batch.weights)
        loss.backward()
        loss = loss.detach()
        if self.processes.world_size > 1:
            self._exchange_dense(loss, batch)
        self.optimizer.step()
        return loss

    def _exchange_dense(self, loss: Tensor, batch: Batch) -> None:
        """Sum loss and gradients over all processes; of the tables' gradients the rows that any of them touched."""
        touched = [
            (table.grad, ids.rows)
            for tables, ids in zip(
                self.model.tables(), (batch.distinct_users, batch.distinct_items), strict=True
            )
            for table in tables
        ]
        gradients = [gradient[rows] for gradient, rows in touched]
        self.processes.sum([loss, *gradients, *self._gradients_of_layers()])
        for (whole, rows), gradient in zip(touched, gradients, strict=True):
            whole[rows] = gradient

    def _gradients_of_layers(self) -> list[Tensor]:
        """Of all that is no embedding table."""
        tables = {id(table) for tables in self.model.tables() for table in tables}
        return [parameter.grad for parameter in self.model.parameters() if id(parameter) not in tables]

    def _lazy_step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        fetched = self.optimizer.fetch([batch.distinct_users, batch.distinct_items])
        users, items = (part.embeddings.requires_grad_() for part in fetched)
        loss = self._loss(users, items, batch.labels, batch.weights)
        loss.backward()
        loss = loss.detach()
        gradients = [
            gradient_of_rows(users.grad, batch.distinct_users),
            gradient_of_rows(items.grad, batch.distinct_items),
        ]
        self.processes.sum([loss, *gradients, *self._gradients_of_layers()])
        self.optimizer.step()
        self.optimizer.update(fetched, gradients)
        return loss

    def _mean_loss_of_rows(self, users: Tensor, items: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The same of embeddings (N, F + L_0 / 2) side by side."""
        mf_dim = self.model.mf_user_embed.weight.shape[1]
        (mf_user, mlp_user), (mf_item, mlp_item) = (
            rows.tensor_split([mf_dim], dim=1) for rows in (users, items)
        )
        return self._mean_loss(mf_user, mf_item, mlp_user, mlp_item, labels, weights)

    def _mean_loss(
        self,
        mf_user: Tensor,
        mf_item: Tensor,
        mlp_user: Tensor,
        mlp_item: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Binary cross-entropy on logits and the penalty on embeddings, this process's part of the mean."""
        bf16 = self.precision == "bf16"
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits = self.model.score(mf_user, mf_item, mlp_user, mlp_item)
        # bfloat16 logits back to what the loss is computed in, and labels to the same.
        logits, labels = logits.squeeze(1).to(mf_user.dtype), labels.to(mf_user.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        if self.l2:
            loss = loss + self.l2 * self.model.squared_norms(mf_user, mf_item, mlp_user, mlp_item)
        return (loss * weights).sum()


def gradient_of_rows(gradients: Tensor, ids: Distinct) -> Tensor:
    """Sum samples' gradients (N, D) over each distinct id: (R, D), where it stands first in ``rows``."""
    rows = gradients.new_zeros(len(ids.rows), gradients.shape[1])
    return rows.index_add_(0, ids.slots, gradients)
