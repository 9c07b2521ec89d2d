"""The epoch loop: binary cross-entropy on positives and sampled negatives, checkpoints, resuming."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from dataset import Split
from distiller.checkpoint import save_checkpoint
from distiller.cli import InputError
from distiller.quantization.train_aware import is_quantization_aware
from distiller.schedule import CompressionSchedule
from evaluation import Metrics, evaluate
from optim import LazyAdam, Table
from recording import BEST, CHECKPOINT, Recorder
from sampling import TrainingBatches
from scoring import float_scorer
from step import Step

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
        step: Takes the optimizer's steps; its processes share each batch and each evaluation.
        batches: Training samples.
        split: Evaluated on.
        recorder: Where results and checkpoints go; None in a process that leaves them to the first one.
        config: The resolved configuration, stored in every checkpoint.
        k: Of HR@k and NDCG@k.
        schedule: What ``--compress`` does to model and learning rate, bound to the optimizer.
        log_freq: Steps between two updates of the progress bar and of TensorBoard.
        device: The model's.
        progress: Where to go on from.
    """

    # On a GPU an update waits for all steps that are under way, so that it may come a few times a second only.
    SECONDS_BETWEEN_UPDATES: ClassVar = {"cpu": 0.0, "cuda": 0.25}

    def __init__(
        self,
        step: Step,
        batches: TrainingBatches,
        split: Split,
        recorder: Recorder | None,
        config: Mapping[str, Any],
        k: int = 10,
        schedule: CompressionSchedule | None = None,
        log_freq: int = 100,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ):
        self.step = step
        self.model, self.optimizer = step.model, step.optimizer
        self.batches = batches
        self.split = split
        self.recorder = recorder
        self.config = config
        self.k = k
        self.schedule = schedule or CompressionSchedule()
        self.log_freq = log_freq
        self.device = torch.device(device)
        self.progress = progress or Progress()

    def run(self, stop: Stop) -> int:
        """Train until ``stop``; the steps taken.

        Raises:
            InputError: a loss is not finite.
        """
        limit = stop.max_steps if stop.max_steps is not None else math.inf
        taken = 0
        while self.progress.epoch < stop.epochs and taken < limit:
            epoch, first_step = self.progress.epoch, self.progress.step
            self.schedule.epoch_begin(epoch, self.model)
            start = time.perf_counter()
            average_loss = self._train_epoch(limit - taken)
            whole = self.progress.step == len(self.batches)
            # Within an epoch, what rows lag by is kept: a run that goes on has the bits of one that never stopped.
            lagging = None
            if isinstance(self.optimizer, LazyAdam):
                lagging = None if whole else self.optimizer.lagging()
                self.optimizer.flush()
            train_time_s = time.perf_counter() - start
            done = self.progress.step
            taken += done - first_step

            start = time.perf_counter()
            scorer = float_scorer(self.model)
            metrics = evaluate(scorer, self.split, self.k, self.device, self.step.processes)
            val_time_s = time.perf_counter() - start
            if whole:
                self.schedule.epoch_end(epoch, metrics.hr)
                self.progress.epoch, self.progress.step = epoch + 1, 0
            self._save(epoch, metrics, lagging)
            samples_per_s = self.batches.samples_in(first_step, done) / train_time_s
            times = {"train_time_s": train_time_s, "val_time_s": val_time_s}
            self._record({"epoch": epoch, "steps": done}, metrics, average_loss, samples_per_s, times)
            log.info(
                "Epoch %d: %s, AvgTrainLoss = %.4f, train_time = %.2f, val_time = %.2f",
                *(epoch, metrics, average_loss, train_time_s, val_time_s),
            )
            if stop.threshold is not None and metrics.hr >= stop.threshold:
                log.info("HR@%d reached the threshold of %g", self.k, stop.threshold)
                break
        return taken

    def _train_epoch(self, max_steps: float) -> float:
        """Take the epoch's remaining steps, ``max_steps`` at most; the mean loss of a sample."""
        progress, first = self.progress, self.progress.step
        last = min(len(self.batches), first + max_steps)
        losses: list[Tensor] = []
        loss_sum, updated = 0.0, time.perf_counter()
        with (
            closing(self.batches.epoch(progress.epoch, skip=first)) as batches,
            tqdm(
                total=len(self.batches),
                initial=first,
                desc=f"Epoch {progress.epoch}",
                disable=self.recorder is None,
            ) as bar,
        ):
            for batch in batches:
                losses.append(self.step(batch))
                progress.step += 1
                waited = time.perf_counter() - updated
                due = waited >= self.SECONDS_BETWEEN_UPDATES[self.device.type]
                if progress.step == last or (progress.step % self.log_freq == 0 and due):
                    loss_sum += self._sum_of(losses)
                    latest, losses = losses[-1].item(), []
                    average = loss_sum / self.batches.samples_in(first, progress.step)
                    self._show(bar, latest, average)
                    updated = time.perf_counter()
                if progress.step == last:
                    break
        return average

    def _sum_of(self, losses: list[Tensor]) -> float:
        """The summed loss of the samples in the latest steps, whose mean losses these are.

        Raises:
            InputError: one of them is not finite.
        """
        total, first = 0.0, self.progress.step - len(losses)
        for step, loss in enumerate(torch.stack(losses).tolist(), first):
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} in epoch {self.progress.epoch}, step {step + 1}{self._last_good()}"
                )
            total += loss * self.batches.samples_in(step, step + 1)
        return total

    def _last_good(self) -> str:
        if self.recorder is None:
            return ""
        kept = self.recorder.directory / CHECKPOINT
        return f"; the last good checkpoint is {kept if kept.exists() else 'none'}"

    def _show(self, bar: tqdm, loss: float, average: float) -> None:
        bar.set_description(f"Epoch {self.progress.epoch} Loss {loss:.4f} ({average:.4f})", refresh=False)
        bar.update(self.progress.step - bar.n)
        if self.recorder is not None:
            self.recorder.scalars(self._global_step(), loss=loss)

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
        if self.recorder is None:
            return
        results = {f"hr@{self.k}": metrics.hr, f"ndcg@{self.k}": metrics.ndcg, "avg_train_loss": loss}
        self.recorder.epoch(when | results | times)
        self.recorder.scalars(self._global_step(), **results, samples_per_s=samples_per_s)
        self.recorder.weights(self.model, when["epoch"])

    def _save(self, epoch: int, metrics: Metrics, lagging: list[Table] | None) -> None:
        best = metrics.hr > self.progress.best_hr
        self.progress.best_hr = max(self.progress.best_hr, metrics.hr)
        if self.recorder is None:
            return
        content = {
            "arch": "NeuMF",
            "state_dict": self.model.state_dict(),
            "optimizer_type": type(self.optimizer).__name__,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "lagging_rows": lagging and [tuple(table) for table in lagging],
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
    whole = batches.nb_samples // batches.batch_size
    with closing(batches.epoch(0)) as samples:
        for _ in trange(max(1, round(share * whole)), desc="Score training pairs", unit="batch"):
            batch = next(samples)
            model(batch.users, batch.items, sigmoid=True)
