"""The epoch loop: training, evaluation, checkpoints, signals, and going on where a run was stopped."""

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
from neural_cf.runs.progress_bar import progress_bar
from neural_cf.runs.recorder import Recorder
from neural_cf.runs.run import Run
from neural_cf.training.lazy_adam import LazyAdam, Table
from neural_cf.training.step import Step

JOINED = -1  # the number that the joined branches have as an epoch: they come before the first one

log = logging.getLogger("ncf")


@dataclass
class Progress:
    """How far training has come.

    Attributes:
        epoch: The epoch under way, or the next one.
        step: Batches of that epoch that are done; a run stopped within an epoch goes on from there.
        best_hr: The highest HR@k of any epoch so far.
        loss_sum: The sum of the losses of the samples in the epoch's steps so far.
        best_epoch: The epoch that has the highest HR@k, ``JOINED`` for the joined branches; None before there is one,
            and for runs of earlier versions, which did not record it.

    Raises:
        ValueError: the values are none that training can have.
    """

    epoch: int = 0
    step: int = 0
    best_hr: float = -1.0
    loss_sum: float = 0.0
    best_epoch: int | None = None

    def __post_init__(self) -> None:
        for count in (self.epoch, self.step):
            if type(count) is not int or not 0 <= count < 1 << 31:
                raise ValueError("epoch and step are no counts")
        for number in (self.best_hr, self.loss_sum):
            if type(number) is not float or not math.isfinite(number):
                raise ValueError("progress that is no number")
        best = self.best_epoch
        if best is not None and not (type(best) is int and JOINED <= best <= self.epoch):
            raise ValueError("the best epoch is none that was")


@dataclass
class Pace:
    """How long the steps and the evaluations of this process have taken, for an estimate of what is left.

    Attributes:
        train_s: Seconds spent in whole epochs' steps.
        steps: The number of these steps.
        val_s: Seconds spent in evaluations.
        evaluations: The number of these.
    """

    train_s: float = 0.0
    steps: int = 0
    val_s: float = 0.0
    evaluations: int = 0

    def add(self, train_s: float, steps: int, val_s: float) -> None:
        """Count an epoch's steps and its evaluation."""
        self.train_s, self.steps = self.train_s + train_s, self.steps + steps
        self.val_s, self.evaluations = self.val_s + val_s, self.evaluations + 1

    def seconds(self, train_s: float, steps: int, steps_left: int, evaluations_left: int) -> float:
        """Return how long what is left will take; evaluations are counted once there has been one.

        Args:
            train_s: Seconds spent in steps that have not been added yet.
            steps: The number of these steps.
            steps_left: How many more steps there will be.
            evaluations_left: How many more evaluations.
        """
        a_step = (self.train_s + train_s) / max(1, self.steps + steps)
        return steps_left * a_step + evaluations_left * self.val_s / max(1, self.evaluations)


class Trainer:
    """Trains a NeuMF, evaluates it after every epoch and keeps the last and the best checkpoint.

    Args:
        run: What is asked for; its split is what the model is evaluated on.
        step: Takes the optimizer's steps.
        batches: The training samples.
        recorder: Where results and checkpoints go; None in a process that leaves them to the first one.
        config: The resolved configuration, which every checkpoint stores.
        schedule: What ``--compress`` does to model and learning rate, bound to the optimizer.
        progress: Where to go on from.
    """

    # On a GPU an update waits for all steps that are under way, so that it may come a few times a second only.
    SECONDS_BETWEEN_UPDATES: ClassVar = {"cpu": 0.0, "cuda": 0.25}

    def __init__(
        self,
        run: Run,
        step: Step,
        batches: TrainingBatches,
        recorder: Recorder | None,
        config: Mapping[str, Any],
        schedule: CompressionSchedule | None = None,
        progress: Progress | None = None,
    ):
        self._run = run
        self._settings = run.settings
        self.step = step
        self.model, self.optimizer, self._processes = step.model, step.optimizer, step.processes
        self._batches = batches
        self._recorder = recorder
        self._config = config
        self._schedule = schedule or CompressionSchedule()
        self.progress = progress or Progress()
        self._pace = Pace()
        self._start = self.progress.epoch
        self._taken = 0  # steps of this process
        self._latest_hr = -math.inf
        self._losses: list[Tensor] = []  # of steps that are not in the sum yet

    def train(self) -> int:
        """Train until the settings' end, or until a signal: then the step is finished and the state is saved.

        Returns:
            The steps taken.

        Raises:
            InputError: a loss is not finite.
            KeyboardInterrupt: SIGINT or, as a ``Terminated``, SIGTERM came.
        """
        with DeferredSignals() as self._signals:
            fresh = self._recorder and not (self._recorder.directory / CHECKPOINT).exists()
            if self._settings.save_every and fresh:
                self._save_within()
            if self._out_of_patience:
                log.info("No epoch has been better for %d epochs", self._settings.patience)
            most = math.inf if self._settings.max_steps is None else self._settings.max_steps
            while self._taken < most and not self.finished:
                self._run_epoch(most - self._taken)
            return self._taken

    def keep_start(self) -> list[Metrics]:
        """Evaluate the model that training starts with, keep it as the best so far, and return all its metrics."""
        metrics = self._metrics()
        self._save(self.progress.epoch - 1, metrics[0], None)
        return metrics

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the threshold or the end of patience is reached."""
        return self.progress.epoch >= self._settings.epochs or self._reached or self._out_of_patience

    @property
    def _reached(self) -> bool:
        threshold = self._settings.threshold
        return threshold is not None and self._latest_hr >= threshold

    @property
    def _out_of_patience(self) -> bool:
        best = self._start - 1 if self.progress.best_epoch is None else self.progress.best_epoch
        patience = self._settings.patience
        return patience is not None and self.progress.epoch - 1 - best >= patience

    def describe_best(self) -> str:
        """Return the best epoch so far, its HR@k and its checkpoint, in a line."""
        epoch = self.progress.best_epoch
        when = "as joined, " if epoch == JOINED else "" if epoch is None else f"epoch {epoch}, "
        where = "" if self._recorder is None else f", in {self._recorder.directory / BEST}"
        return f"Best: {when}HR@{self._settings.k} = {self.progress.best_hr:.4f}{where}"

    def _run_epoch(self, max_steps: float) -> None:
        """Train an epoch's remaining steps, ``max_steps`` at most, evaluate, record and save."""
        epoch, first_step = self.progress.epoch, self.progress.step
        self._schedule.epoch_begin(epoch, self.model)
        start = time.perf_counter()
        self._train_epoch(max_steps)
        whole = self.progress.step == len(self._batches)
        lagging = self._flush(keep=not whole)
        train_time_s = time.perf_counter() - start
        done = self.progress.step
        average_loss = self.progress.loss_sum / self._batches.samples_in(0, done)

        start = time.perf_counter()
        metrics = self._evaluate(lagging)
        val_time_s = time.perf_counter() - start
        self._latest_hr = metrics[0].hr
        self._taken += done - first_step
        self._pace.add(train_time_s, done - first_step, val_time_s)
        if whole:
            self._schedule.epoch_end(epoch, metrics[0].hr)
            self.progress.epoch, self.progress.step, self.progress.loss_sum = epoch + 1, 0, 0.0
        when = {"epoch": epoch, "steps": done}
        self._record(when, metrics, average_loss, {"train_time_s": train_time_s, "val_time_s": val_time_s})
        self._save(epoch, metrics[0], lagging)
        samples_per_s = self._batches.samples_in(first_step, done) / train_time_s
        self._record_events(when, metrics, average_loss, samples_per_s)
        log.info(
            "Epoch %d: %s, AvgTrainLoss = %.4f, train_time = %.2f, val_time = %.2f",
            *(epoch, describe(metrics), average_loss, train_time_s, val_time_s),
        )
        if self._reached:
            log.info("HR@%d reached the threshold of %g", self._settings.k, self._settings.threshold)
        elif self._out_of_patience:
            log.info("No epoch has been better for %d epochs", self._settings.patience)
        elif self._asked_to_stop():
            self._stop()

    def _train_epoch(self, max_steps: float) -> None:
        """Take the epoch's remaining steps, ``max_steps`` at most."""
        progress, first, settings = self.progress, self.progress.step, self._settings
        last = min(len(self._batches), first + max_steps)
        start = updated = time.perf_counter()
        name = f"Epoch {progress.epoch}"
        with (
            closing(self._batches.epoch(progress.epoch, skip=first)) as batches,
            progress_bar(len(self._batches), name, "it", first, disable=self._recorder is None) as bar,
        ):
            for batch in islice(batches, last - first):
                if self.step.about_to_compile:
                    bar.set_description(f"{name}, compiling ...")
                self._losses.append(self.step(batch))
                progress.step += 1
                waited = time.perf_counter() - updated
                due = waited >= self.SECONDS_BETWEEN_UPDATES[self._run.device.type]
                if progress.step == last or (progress.step % settings.log_freq == 0 and due):
                    loss, updated = self._settle_losses(), time.perf_counter()
                    self._show(bar, loss, self._seconds_left(updated - start, progress.step - first))
                if self._asked_to_stop():
                    self._save_within()
                    self._stop()
                if settings.save_every and progress.step % settings.save_every == 0:
                    self._save_within()

    def _seconds_left(self, train_s: float, steps: int) -> float:
        """Return an estimate of how long the whole run still takes.

        Args:
            train_s: The seconds that this process has spent in the epoch under way.
            steps: The steps that it has taken in it.
        """
        progress, settings = self.progress, self._settings
        left = (settings.epochs - progress.epoch) * len(self._batches) - progress.step
        if settings.max_steps is not None:
            left = min(left, settings.max_steps - self._taken - steps)
        evaluations = 1 + (progress.step + left - 1) // len(self._batches)
        return self._pace.seconds(train_s, steps, left, evaluations)

    def _asked_to_stop(self) -> bool:
        """Return whether a signal has come to any of the processes; all of them get the same answer."""
        if self._signals.received is not None:
            self._processes.ask_to_stop()
        # Between GPUs to ask is to wait for the step.
        waits = self._run.device.type == "cuda" and self._processes.world_size > 1
        return not (waits and self.progress.step % self._settings.log_freq) and self._processes.asked_to_stop

    def _stop(self) -> NoReturn:
        """End all processes, once the first one has saved."""
        self._processes.agree(None)
        self._say_stopped()
        raise interruption(self._signals.received or signal.SIGTERM)

    def _say_stopped(self) -> None:
        log.info(
            "Stopped in epoch %d, after %d steps of it: --resume goes on from there",
            *(self.progress.epoch, self.progress.step),
        )

    def _flush(self, keep: bool) -> list[Table] | None:
        """Bring all rows of the tables up to date; with ``keep``, return the tables as they lagged.

        A run that goes on within an epoch from lagging rows has the bits of one that never stopped.
        """
        if not isinstance(self.optimizer, LazyAdam):
            return None
        lagging = self.optimizer.lagging() if keep else None
        self.optimizer.flush()
        return lagging

    def _evaluate(self, lagging: list[Table] | None) -> list[Metrics]:
        """Return the metrics at every cut-off.

        A signal cuts the evaluation short, where no other process waits for it; the trained epoch is saved then.
        """
        try:
            with self._signals.raised() if self._processes.world_size == 1 else nullcontext():
                return self._metrics()
        except KeyboardInterrupt:
            self._save(self.progress.epoch, None, lagging)
            self._say_stopped()
            raise

    def _metrics(self) -> list[Metrics]:
        settings, scorer = self._settings, float_scorer(self.model)
        ranks = rank_test_items(
            scorer,
            self._run.split,
            settings.k,
            self._run.device,
            self._processes,
            ranking=settings.ranking,
        )
        return [metrics_of_ranks(ranks, k) for k in settings.cutoffs]

    def _settle_losses(self) -> float:
        """Add the latest steps' losses to the epoch's sum and return the last step's mean loss.

        Raises:
            InputError: one of them is not finite.
        """
        first, latest = self.progress.step - len(self._losses), math.nan
        for step, latest in enumerate(torch.stack(self._losses).tolist() if self._losses else [], first):
            if not math.isfinite(latest):
                raise InputError(
                    f"the loss is {latest} in epoch {self.progress.epoch}, step {step + 1}{self._last_good()}"
                )
            self.progress.loss_sum += latest * self._batches.samples_in(step, step + 1)
        self._losses = []
        return latest

    def _last_good(self) -> str:
        if self._recorder is None:
            return ""
        kept = self._recorder.directory / CHECKPOINT
        return f"; the last good checkpoint is {kept if kept.exists() else 'none'}"

    def _show(self, bar: tqdm, loss: float, seconds_left: float) -> None:
        """Bring the progress bar up to date, and record the latest loss."""
        average = self.progress.loss_sum / self._batches.samples_in(0, self.progress.step)
        bar.set_description(f"Epoch {self.progress.epoch} Loss {loss:.4f} ({average:.4f})", refresh=False)
        bar.set_postfix_str(f"run {tqdm.format_interval(seconds_left)} left", refresh=False)
        bar.update(self.progress.step - bar.n)
        if self._recorder is not None:
            self._recorder.scalars(self._global_step(), loss=loss)

    def _global_step(self) -> int:
        return self.progress.epoch * len(self._batches) + self.progress.step

    def _record(
        self, when: dict[str, int], metrics: Sequence[Metrics], loss: float, times: dict[str, float]
    ) -> None:
        """Write a row of results; before the checkpoint, so that after a kill between the two both are done again."""
        if self._recorder is not None:
            self._recorder.epoch(when | results_of(metrics) | {"avg_train_loss": loss} | times)

    def _record_events(
        self, when: dict[str, int], metrics: Sequence[Metrics], loss: float, samples_per_s: float
    ) -> None:
        if self._recorder is not None:
            results = results_of(metrics) | {"avg_train_loss": loss}
            self._recorder.scalars(self._global_step(), **results, samples_per_s=samples_per_s)
            self._recorder.weights(self.model, when["epoch"])
            self._recorder.flush()

    def _save_within(self) -> None:
        """Save where training stands within an epoch, unless the losses so far say that it diverged."""
        self._settle_losses()
        if self._recorder is None:
            return
        lagging = self._flush(keep=True)
        self._save(self.progress.epoch, None, lagging)
        if lagging is not None:
            self.optimizer.restore_lagging(lagging)

    def _save(self, epoch: int, metrics: Metrics | None, lagging: list[Table] | None) -> None:
        """Save a checkpoint; with the best HR so far, at the first cut-off, it is kept as the best one too."""
        best = metrics is not None and metrics.hr > self.progress.best_hr
        if best:
            self.progress.best_hr, self.progress.best_epoch = metrics.hr, epoch
        if self._recorder is None:
            return
        content = {
            "arch": "NeuMF",
            "state_dict": self.model.state_dict(),
            "optimizer_type": type(self.optimizer).__name__,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "lagging_rows": lagging and [tuple(table) for table in lagging],
            "schedule_state_dict": self._schedule.state_dict(),
            "quantization_aware": self._schedule.quantizer if is_quantization_aware(self.model) else None,
            "epoch": epoch,
            "progress": asdict(self.progress),
            "k": self._settings.k,
            "hr": metrics and metrics.hr,
            "ndcg": metrics and metrics.ndcg,
            "config": dict(self._config),
            "data_digest": self._run.split.digest,
        }
        # The best one first: after a kill between the two, the epoch is done again.
        if best:
            save_checkpoint(self._recorder.directory / BEST, content)
        save_checkpoint(self._recorder.directory / CHECKPOINT, content)
