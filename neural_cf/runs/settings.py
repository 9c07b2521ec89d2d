"""What a user asks of a run, resolved once from flags and files and never changed afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from distiller.quantization.flags import PostTrainFlags


class Mode(Enum):
    """What a run does with a model."""

    TRAIN = "train"
    CALIBRATE = "calibrate"
    HISTOGRAM = "histogram"
    AUTO = "auto"
    EVALUATE = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Settings(PostTrainFlags):
    """Everything that a user can ask of a run, each setting under the name that ``config.json`` has for it.

    The defaults are those of the command line, whose help (neural_cf/commands/flags.py) says what each setting does.

    Attributes:
        given: The names of the settings that the user gave, by a flag or in a ``--config`` file. Some defaults give way
            to what a checkpoint has, and what was given does not.
    """

    data: Path
    # The model.
    factors: int = 8
    layers: tuple[int, ...] = (64, 32, 16, 8)
    split_final: bool = False
    load: Path | None = None
    # Training.
    epochs: int = 20
    batch_size: int = 256
    negative_samples: int = 4  # He et al. 2017, section 4.1: three to six are best
    learning_rate: float = 0.001
    l2: float = 0.0
    optimizer: str = "lazy-adam"
    precision: str | None = None
    no_compile: bool = False
    seed: int = 0
    threshold: float | None = None
    patience: int | None = None
    max_steps: int | None = None
    validate: bool = False
    save_every: int | None = None
    pretrain: tuple[int, ...] | None = None
    pretrain_rate: float = 0.001
    reset_optimizer: bool = False
    resume: bool = False
    overwrite: bool = False
    compress: str | None = None
    param_hist: bool = False
    # Evaluation.
    evaluate: bool = False
    eval_fp16: bool = False
    cutoffs: tuple[int, ...] = (10,)
    ranking: str = "sampled"
    report: Path | None = None
    # Calibration and the choice of a quantization.
    activation_histograms: float | None = None
    calibrate_on: str = "test"
    qe_stats_out: str | None = None
    qe_report: float | None = None
    qe_auto: bool = False
    qe_max_loss: float = 0.05
    # The run.
    out_dir: Path | None = None
    name: str | None = None
    no_cuda: bool = False
    gpus: int | None = None
    threads: int | None = None
    workers: int | None = None
    log_freq: int = 100

    given: frozenset[str] = frozenset()

    @property
    def mode(self) -> Mode:
        """What the run does."""
        if self.qe_calibration:
            return Mode.CALIBRATE
        if self.activation_histograms:
            return Mode.HISTOGRAM
        if self.qe_auto:
            return Mode.AUTO
        if self.evaluate or self.quantize_eval or self.eval_fp16:
            return Mode.EVALUATE
        return Mode.TRAIN

    @property
    def k(self) -> int:
        """The first cut-off, which decides which epoch is the best and all else that takes one."""
        return self.cutoffs[0]

    @property
    def names_ranges(self) -> bool:
        """Whether the settings say where the ranges of activations come from, or leave activations in float."""
        return bool(self.qe_stats_file or self.qe_config_file or self.qe_dynamic or not self.qe_bits_acts)

    def to_config(self) -> dict[str, Any]:
        """Return the settings as JSON and checkpoints can hold them, the first cut-off as ``topk`` too."""
        config = {name: _plain(value) for name, value in asdict(self).items()}
        return config | {"topk": self.k, "given": sorted(self.given)}


def setting_names() -> set[str]:
    """Return the names that a file of settings can have."""
    return {field.name for field in fields(Settings)} - {"given"}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
