"""The epoch loop: binary cross-entropy on positives and sampled negatives, checkpoints, resuming."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from dataset import Split, TrainingBatches
from distiller.checkpoint import save_checkpoint
from distiller.cli import InputError
from distiller.quantization.train_aware import is_quantization_aware
from distiller.schedule import CompressionSchedule
from evaluation import Metrics, evaluate
from recording import BEST, CHECKPOINT, Recorder

log = logging.getLogger("ncf")


@dataclass
class Progress:
    """How far training has come.

    Attributes:
        epoch: The epoch under way, or the next one.
        step: Batches of it that are done; a run stopped within an epoch goes on from there.
        best_hr: The highest HR@k of any epoch so far.
    """

    epoch: int = 0
    step: int = 0
    best_hr: float = -1.0


@dataclass(frozen=True)
class Stop:
    """When training ends.

    Attributes:
        epochs: After this many epochs, counted from the first one ever.
        max_steps: After this many steps of this run; None for no such limit.
        threshold: Once HR@k reaches this; None likewise.
    """

    epochs: int
    max_steps: int | None = None
    threshold: float | None = None


class Trainer:
    """Trains a NeuMF, evaluates it after every epoch and keeps the last and the best checkpoint.

    Args:
        model: On ``device``.
        optimizer: Over all of the model's parameters.
        batches: Training samples.
        split: Evaluated on.
        recorder: Where results and checkpoints go.
        config: The resolved configuration, stored in every checkpoint.
        k: Of HR@k and NDCG@k.
        schedule: What ``--compress`` does to model and learning rate, bound to ``optimizer``.
        log_freq: Steps between two updates of the progress bar and of TensorBoard.
        device: The model's.
        progress: Where to go on from.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: TrainingBatches,
        split: Split,
        recorder: Recorder,
        config: Mapping[str, Any],
        k: int = 10,
        schedule: CompressionSchedule | None = None,
        log_freq: int = 100,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.split = split
        self.recorder = recorder
        self.config = config
        self.k = k
        self.schedule = schedule or CompressionSchedule()
        self.log_freq = log_freq
        self.device = device
        self.progress = progress or Progress()
        self.loss = nn.BCEWithLogitsLoss()

    def run(self, stop: Stop) -> None:
        """Train until ``stop``.

        Raises:
            InputError: the loss is no longer finite.
        """
        steps_left = stop.max_steps if stop.max_steps is not None else math.inf
        while self.progress.epoch < stop.epochs and steps_left > 0:
            epoch, first_step = self.progress.epoch, self.progress.step
            self.schedule.epoch_begin(epoch, self.model)
            start = time.perf_counter()
            average_loss = self._train_epoch(steps_left)
            train_time_s = time.perf_counter() - start
            done = self.progress.step
            steps_left -= done - first_step

            start = time.perf_counter()
            metrics = evaluate(self.model, self.split, self.k, device=self.device)
            val_time_s = time.perf_counter() - start
            if done == len(self.batches):
                self.schedule.epoch_end(epoch, metrics.hr)
                self.progress.epoch, self.progress.step = epoch + 1, 0
            self._save(epoch, metrics)
            samples_per_s = (done - first_step) * self.batches.batch_size / train_time_s
            times = {"train_time_s": train_time_s, "val_time_s": val_time_s}
            self._record({"epoch": epoch, "steps": done}, metrics, average_loss, samples_per_s, times)
            log.info(
                "Epoch %d: %s, AvgTrainLoss = %.4f, train_time = %.2f, val_time = %.2f",
                *(epoch, metrics, average_loss, train_time_s, val_time_s),
            )
            if stop.threshold is not None and metrics.hr >= stop.threshold:
                log.info("HR@%d reached the threshold of %g", self.k, stop.threshold)
                return

    def _train_epoch(self, max_steps: float) -> float:
        """Take the epoch's remaining steps, ``max_steps`` at most; the mean loss of a sample."""
        self.model.train()
        epoch = self.progress.epoch
        loss_sum, samples = torch.zeros((), dtype=torch.float64, device=self.device), 0
        batches = self.batches.epoch(epoch, skip=self.progress.step)
        with tqdm(total=len(self.batches), initial=self.progress.step, desc=f"Epoch {epoch}") as bar:
            for users, items, labels in batches:
                loss = self._step(users, items, labels)
                loss_sum += loss * len(labels)
                samples += len(labels)
                max_steps -= 1
                self.progress.step += 1
                last = max_steps == 0 or self.progress.step == len(self.batches)
                if last or self.progress.step % self.log_freq == 0:
                    average = (loss_sum / samples).item()
                    self._check_finite(average)
                    bar.set_description(
                        f"Epoch {epoch} Loss {loss.item():.4f} ({average:.4f})", refresh=False
                    )
                    bar.update(self.progress.step - bar.n)
                    self.recorder.scalars(self._global_step(), loss=loss.item())
                if last:
                    break
        return average

    def _step(self, users: Tensor, items: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step on a batch; its mean loss, detached."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(users, items).squeeze(1), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _check_finite(self, average_loss: float) -> None:
        if math.isfinite(average_loss):
            return
        kept = self.recorder.directory / CHECKPOINT
        raise InputError(
            f"the loss is {average_loss} in epoch {self.progress.epoch} by step {self.progress.step}; "
            f"the last good checkpoint is {kept if kept.exists() else 'none'}"
        )

    def _global_step(self) -> int:
        return self.progress.epoch * len(self.batches) + self.progress.step

    def _record(
        self,
        when: dict[str, int],
        metrics: Metrics,
        loss: float,
        samples_per_s: float,
        times: dict[str, float],
    ) -> None:
        results = {f"hr@{self.k}": metrics.hr, f"ndcg@{self.k}": metrics.ndcg, "avg_train_loss": loss}
        self.recorder.epoch(when | results | times)
        self.recorder.scalars(self._global_step(), **results, samples_per_s=samples_per_s)
        self.recorder.weights(self.model, when["epoch"])

    def _save(self, epoch: int, metrics: Metrics) -> None:
        best = metrics.hr > self.progress.best_hr
        self.progress.best_hr = max(self.progress.best_hr, metrics.hr)
        content = {
            "arch": "NeuMF",
            "state_dict": self.model.state_dict(),
            "optimizer_type": type(self.optimizer).__name__,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "schedule_state_dict": self.schedule.state_dict(),
            "quantization_aware": self.schedule.quantizer if is_quantization_aware(self.model) else None,
            "epoch": epoch,
            "progress": vars(self.progress),
            "k": self.k,
            "hr": metrics.hr,
            "ndcg": metrics.ndcg,
            "config": dict(self.config),
            "data_digest": self.split.digest,
        }
        # The best one first: after a kill between the two, the epoch is done again.
        if best:
            save_checkpoint(self.recorder.directory / BEST, content)
        save_checkpoint(self.recorder.directory / CHECKPOINT, content)


@torch.inference_mode()
def score_training_pairs(model: nn.Module, batches: TrainingBatches, share: float) -> None:
    """Score a share of an epoch's whole batches, at least one, for whoever watches the model at it."""
    samples = batches.epoch(0)
    whole = batches.nb_samples // batches.batch_size
    for _ in trange(max(1, round(share * whole)), desc="Score training pairs", unit="batch"):
        users, items, _ = next(samples)
        model(users, items, sigmoid=True)
