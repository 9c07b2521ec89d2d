"""The epoch loop: binary cross-entropy on positives and sampled negatives, checkpoints, resuming."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from distiller.quantization.train_aware import is_quantization_aware
from distiller.schedule import CompressionSchedule
from distiller.system.cli import InputError
from distiller.system.signals import DeferredSignals, interruption
from distiller.untrusted.checkpoint import save_checkpoint
from neural_cf.data.batches import TrainingBatches
from neural_cf.ranking.metrics import Metrics, describe, metrics_of_ranks, results_of
from neural_cf.ranking.places import rank_test_items
from neural_cf.ranking.scorers import float_scorer
from neural_cf.runs.directory import BEST, CHECKPOINT
from neural_cf.runs.recorder import Recorder
from neural_cf.split import Split
from neural_cf.training.lazy_adam import LazyAdam, Table
from neural_cf.training.step import Step

log = logging.getLogger("ncf")


@dataclass
class Progress:
    """How far training has come.

    Attributes:
        epoch: The epoch under way, or the next one.
        step: Batches of it that are done; a run stopped within an epoch goes on from there.
        best_hr: The highest HR@k of any epoch so far.
        loss_sum: Over the samples of the epoch's steps.

    Raises:
        ValueError: that is nowhere.
    """

    epoch: int = 0
    step: int = 0
    best_hr: float = -1.0
    loss_sum: float = 0.0

    def __post_init__(self) -> None:
        for count in (self.epoch, self.step):
            if type(count) is not int or not 0 <= count < 1 << 31:
                raise ValueError("epoch and step are no counts")
        for number in (self.best_hr, self.loss_sum):
            if type(number) is not float or not math.isfinite(number):
                raise ValueError("progress that is no number")


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
        cutoffs: Every k of the metrics; the first one's HR@k decides which epoch is the best.
        ranking: What test items are ranked against, one of ``evaluation.RANKINGS``.
        schedule: What ``--compress`` does to model and learning rate, bound to the optimizer.
        log_freq: Steps between two updates of the progress bar and of TensorBoard.
        device: The model's.
        progress: Where to go on from.
        save_every: Steps between two checkpoints within an epoch; 0 for none.
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
        cutoffs: Sequence[int] = (10,),
        ranking: str = "sampled",
        schedule: CompressionSchedule | None = None,
        log_freq: int = 100,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        save_every: int = 0,
    ):
        self.step = step
        self.model, self.optimizer, self.processes = step.model, step.optimizer, step.processes
        self.batches = batches
        self.split = split
        self.recorder = recorder
        self.config = config
        self.cutoffs = cutoffs
        self.ranking = ranking
        self.schedule = schedule or CompressionSchedule()
        self.log_freq = log_freq
        self.device = torch.device(device)
        self.progress = progress or Progress()
        self.save_every = save_every
        self._losses: list[Tensor] = []  # of steps that are not in the sum yet

    def run(self, stop: Stop) -> int:
        """Train until ``stop``, or until a signal: then the step is finished, and where training stands is saved.

        Returns:
            The steps taken.

        Raises:
            InputError: a loss is not finite.
            KeyboardInterrupt: SIGINT or, as a ``Terminated``, SIGTERM came.
        """
        with DeferredSignals() as self._signals:
            if self.save_every and self.recorder and not (self.recorder.directory / CHECKPOINT).exists():
                self._save_within()
            return self._run(stop)

    def keep_start(self) -> list[Metrics]:
        """Evaluate the model that training starts with and keep it as the best so far; every cut-off's metrics."""
        metrics = self._metrics()
        self._save(self.progress.epoch - 1, metrics[0], None)
        return metrics

    def _run(self, stop: Stop) -> int:
        limit = stop.max_steps if stop.max_steps is not None else math.inf
        taken = 0
        while self.progress.epoch < stop.epochs and taken < limit:
            epoch, first_step = self.progress.epoch, self.progress.step
            self.schedule.epoch_begin(epoch, self.model)
            start = time.perf_counter()
            self._train_epoch(limit - taken)
            whole = self.progress.step == len(self.batches)
            lagging = self._flush(keep=not whole)
            train_time_s = time.perf_counter() - start
            done = self.progress.step
            average_loss = self.progress.loss_sum / self.batches.samples_in(0, done)
            taken += done - first_step

            start = time.perf_counter()
            metrics = self._evaluate(lagging)
            hr = metrics[0].hr
            val_time_s = time.perf_counter() - start
            if whole:
                self.schedule.epoch_end(epoch, hr)
                self.progress.epoch, self.progress.step, self.progress.loss_sum = epoch + 1, 0, 0.0
            times = {"train_time_s": train_time_s, "val_time_s": val_time_s}
            samples_per_s = self.batches.samples_in(first_step, done) / train_time_s
            self._record({"epoch": epoch, "steps": done}, metrics, average_loss, times)
            self._save(epoch, metrics[0], lagging)
            self._record_events({"epoch": epoch, "steps": done}, metrics, average_loss, samples_per_s)
            log.info(
                "Epoch %d: %s, AvgTrainLoss = %.4f, train_time = %.2f, val_time = %.2f",
                *(epoch, describe(metrics), average_loss, train_time_s, val_time_s),
            )
            if stop.threshold is not None and hr >= stop.threshold:
                log.info("HR@%d reached the threshold of %g", self.cutoffs[0], stop.threshold)
                break
            if self._asked_to_stop():
                self._stop()
        return taken

    def _train_epoch(self, max_steps: float) -> None:
        """Take the epoch's remaining steps, ``max_steps`` at most."""
        progress, first = self.progress, self.progress.step
        last = min(len(self.batches), first + max_steps)
        updated = time.perf_counter()
        with (
            closing(self.batches.epoch(progress.epoch, skip=first)) as batches,
            tqdm(
                total=len(self.batches),
                initial=first,
                desc=f"Epoch {progress.epoch}",
                disable=self.recorder is None,
            ) as bar,
        ):
            for batch in islice(batches, last - first):
                self._losses.append(self.step(batch))
                progress.step += 1
                waited = time.perf_counter() - updated
                due = waited >= self.SECONDS_BETWEEN_UPDATES[self.device.type]
                if progress.step == last or (progress.step % self.log_freq == 0 and due):
                    self._show(bar, self._settle_losses())
                    updated = time.perf_counter()
                if self._asked_to_stop():
                    self._save_within()
                    self._stop()
                if self.save_every and progress.step % self.save_every == 0:
                    self._save_within()

    def _asked_to_stop(self) -> bool:
        """Whether a signal has come, to any of the processes; the same in all of them."""
        if self._signals.received is not None:
            self.processes.ask_to_stop()
        # Between GPUs to ask is to wait for the step.
        waits = self.device.type == "cuda" and self.processes.world_size > 1
        return not (waits and self.progress.step % self.log_freq) and self.processes.asked_to_stop

    def _stop(self) -> NoReturn:
        """End all processes, once the first one has saved."""
        self.processes.agree(None)
        self._say_stopped()
        raise interruption(self._signals.received or signal.SIGTERM)

    def _say_stopped(self) -> None:
        log.info(
            "Stopped in epoch %d, after %d steps of it: --resume goes on from there",
            *(self.progress.epoch, self.progress.step),
        )

    def _flush(self, keep: bool) -> list[Table] | None:
        """Bring all rows up to date; with ``keep``, what they lagged by.

        A run that goes on within an epoch from there has the bits of one that never stopped.
        """
        if not isinstance(self.optimizer, LazyAdam):
            return None
        lagging = self.optimizer.lagging() if keep else None
        self.optimizer.flush()
        return lagging

    def _evaluate(self, lagging: list[Table] | None) -> list[Metrics]:
        """Every cut-off's. A signal cuts it short, where no other process waits for it, and the epoch is kept."""
        try:
            with self._signals.raised() if self.processes.world_size == 1 else nullcontext():
                return self._metrics()
        except KeyboardInterrupt:
            self._save(self.progress.epoch, None, lagging)
            self._say_stopped()
            raise

    def _metrics(self) -> list[Metrics]:
        k, scorer = self.cutoffs[0], float_scorer(self.model)
        ranks = rank_test_items(scorer, self.split, k, self.device, self.processes, ranking=self.ranking)
        return [metrics_of_ranks(ranks, k) for k in self.cutoffs]

    def _settle_losses(self) -> float:
        """Count the latest steps' mean losses in the epoch's sum; the last one of them.

        Raises:
            InputError: one of them is not finite.
        """
        first, latest = self.progress.step - len(self._losses), math.nan
        for step, latest in enumerate(torch.stack(self._losses).tolist() if self._losses else [], first):
            if not math.isfinite(latest):
                raise InputError(
                    f"the loss is {latest} in epoch {self.progress.epoch}, step {step + 1}{self._last_good()}"
                )
            self.progress.loss_sum += latest * self.batches.samples_in(step, step + 1)
        self._losses = []
        return latest

    def _last_good(self) -> str:
        if self.recorder is None:
            return ""
        kept = self.recorder.directory / CHECKPOINT
        return f"; the last good checkpoint is {kept if kept.exists() else 'none'}"

    def _show(self, bar: tqdm, loss: float) -> None:
        average = self.progress.loss_sum / self.batches.samples_in(0, self.progress.step)
        bar.set_description(f"Epoch {self.progress.epoch} Loss {loss:.4f} ({average:.4f})", refresh=False)
        bar.update(self.progress.step - bar.n)
        if self.recorder is not None:
            self.recorder.scalars(self._global_step(), loss=loss)

    def _global_step(self) -> int:
        return self.progress.epoch * len(self.batches) + self.progress.step

    def _record(
        self, when: dict[str, int], metrics: Sequence[Metrics], loss: float, times: dict[str, float]
    ) -> None:
        """Write a row of results. Before the checkpoint: after a kill between the two, both are done again."""
        if self.recorder is not None:
            self.recorder.epoch(when | results_of(metrics) | {"avg_train_loss": loss} | times)

    def _record_events(
        self, when: dict[str, int], metrics: Sequence[Metrics], loss: float, samples_per_s: float
    ) -> None:
        if self.recorder is not None:
            results = results_of(metrics) | {"avg_train_loss": loss}
            self.recorder.scalars(self._global_step(), **results, samples_per_s=samples_per_s)
            self.recorder.weights(self.model, when["epoch"])
            self.recorder.flush()

    def _save_within(self) -> None:
        """Save where training stands within an epoch, unless the losses so far say that it diverged."""
        self._settle_losses()
        if self.recorder is None:
            return
        lagging = self._flush(keep=True)
        self._save(self.progress.epoch, None, lagging)
        if lagging is not None:
            self.optimizer.restore_lagging(lagging)

    def _save(self, epoch: int, metrics: Metrics | None, lagging: list[Table] | None) -> None:
        """Save a checkpoint, and with the best HR so far, at the first cut-off, it is the best one."""
        best = metrics is not None and metrics.hr > self.progress.best_hr
        if best:
            self.progress.best_hr = metrics.hr
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
            "progress": asdict(self.progress),
            "k": self.cutoffs[0],
            "hr": metrics and metrics.hr,
            "ndcg": metrics and metrics.ndcg,
            "config": dict(self.config),
            "data_digest": self.split.digest,
        }
        # The best one first: after a kill between the two, the epoch is done again.
        if best:
            save_checkpoint(self.recorder.directory / BEST, content)
        save_checkpoint(self.recorder.directory / CHECKPOINT, content)
