"""One optimizer step on a batch: forward, backward, exchange between processes, update.

The parts of a step can be compiled. On a GPU a whole step is captured once as a CUDA graph and then replayed.

Shapes: N samples in a batch, R rows that it can touch, W the width of a table or of tables side by side, F = mf_dim,
L_0 = mlp_layer_sizes[0].
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
    """The optimizer step of a training run: a call takes one step on one batch.

    Args:
        model: A NeuMF, in float or prepared for quantization-aware training.
        optimizer: An optimizer of the model's parameters. ``LazyAdam`` touches only the rows of a batch once its dense
            steps are over, unless the model is quantization-aware: such a model rounds by the range of the whole table.
        precision: The precision of matrix products, one of ``neural_cf.runs.hardware.PRECISIONS``. "fp32" leaves them
            in the weights' dtype. Weights, their gradients and the optimizer's state never change their dtype.
        compiled: Compute with ``torch.compile``.
        processes: The processes that share each batch; by default this one alone.
        l2: The weight of ``NeuMF.squared_norms`` in a sample's loss. It penalizes a row as often as a batch touches it.
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
        self._to_compile = compiled  # at the first call that computes with what is compiled
        self._capture = None
        # With several processes, the exchange between them keeps a step from being captured as a whole.
        if next(model.parameters()).is_cuda and self.processes.world_size == 1:
            self._capture = Capture(self._lazy_step)

    @property
    def about_to_compile(self) -> bool:
        """Whether the next call compiles, in which time no step is done."""
        if not self._to_compile:
            return False
        dense = isinstance(self.optimizer, LazyAdam) and self.optimizer.dense
        return not dense and not is_quantization_aware(self.model)

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step and return the loss () before it, the mean over the batch in all processes."""
        self.model.train()
        self._to_compile &= not self.about_to_compile
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
        """Take a step in which the optimizer updates whole tables."""
        model = self.model
        self.optimizer.zero_grad()
        embeddings = (
            model.mf_user_embed(batch.users),
            model.mf_item_embed(batch.items),
            model.mlp_user_embed(batch.users),
            model.mlp_item_embed(batch.items),
        )
        # A lazy optimizer takes too few dense steps to be worth compiling, and a quantization-aware model rounds by
        # ranges that change from batch to batch.
        plain = isinstance(self.optimizer, LazyAdam) or is_quantization_aware(model)
        loss = (self._mean_loss if plain else self._loss)(*embeddings, batch.labels, batch.weights)
        loss.backward()
        loss = loss.detach()
        if self.processes.world_size > 1:
            self._exchange_dense(loss, batch)
        self.optimizer.step()
        return loss

    def _exchange_dense(self, loss: Tensor, batch: Batch) -> None:
        """Sum loss and gradients over the processes; of tables, only the rows that the batch touches."""
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
        """Return the gradients of all parameters that are not embedding tables."""
        tables = {id(table) for tables in self.model.tables() for table in tables}
        return [parameter.grad for parameter in self.model.parameters() if id(parameter) not in tables]

    def _lazy_step(self, batch: Batch) -> Tensor:
        """Take a step in which the optimizer updates only the rows of tables that the batch touches."""
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
        """Return ``_mean_loss`` for embeddings (N, F + L_0 / 2) with both branches side by side."""
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
        """Return this process's part of the mean loss: cross-entropy of logits and penalty on embeddings.

        The embeddings are (N, F) and (N, L_0 / 2), labels and weights (N,).
        """
        bf16 = self.precision == "bf16"
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits = self.model.score(mf_user, mf_item, mlp_user, mlp_item)
        # The loss is computed in the embeddings' dtype, also where the logits are bfloat16.
        logits, labels = logits.squeeze(1).to(mf_user.dtype), labels.to(mf_user.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        if self.l2:
            loss = loss + self.l2 * self.model.squared_norms(mf_user, mf_item, mlp_user, mlp_item)
        return (loss * weights).sum()


def gradient_of_rows(gradients: Tensor, ids: Distinct) -> Tensor:
    """Return the sums (R, W) of samples' gradients (N, W) over each id, where ``rows`` has it first."""
    rows = gradients.new_zeros(len(ids.rows), gradients.shape[1])
    return rows.index_add_(0, ids.slots, gradients)
