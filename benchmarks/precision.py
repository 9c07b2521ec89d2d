"""Measure what each precision costs: FP32, INT8, 4 bits and quantization-aware training, over several seeds.

    python -m benchmarks.precision ratings.csv|DIRECTORY [--epochs 8] [--seeds 1 2 3 4 5] ...

Every step is a command line of ncf.py that a user could type, and is shown as it is run. A record beside each result
keeps a step from being repeated with the same command line and files, so that an interrupted table can be resumed.

Models are those of the last epoch, after so few epochs that they do not overfit. Choosing the epoch with the best hit
rate (HR) of the users that the table reports on would favour FP32 by some tenths of a point of luck, which every change
to the model would lose in addition to its real cost.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks import recipe
from distiller.system.cli import InputError, run
from distiller.system.files import atomic_write, file_digest
from distiller.system.tables import markdown_table
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.int8.search import nb_calibration_users
from neural_cf.ranking.metrics import gains_of_ranks, metrics_of_ranks
from neural_cf.ranking.significance import bootstrap_interval, mcnemar
from neural_cf.runs.directory import CHECKPOINT, QUANTIZED, RANKS
from neural_cf.split import Split, load_split

TOP = 10  # cut-off of HR and NDCG
EPOCHS = 8  # on ml-1m HR@10 rises until about this epoch and falls from the 12th on
FLOAT = f"{recipe.TRAINED}/{CHECKPOINT}"
VAL_TIME = re.compile(r"val_time = ([\d.]+)")
# The flags that name a file for a command to read.
READS = ("--load", "--qe-stats-file", "--qe-config-file", "--compress")
BOOTSTRAP_SEED = 0
HEADER = (
    "Precision",
    f"HR@{TOP}",
    f"NDCG@{TOP}",
    f"HR@{TOP} minus FP32's (p)",
    f"NDCG@{TOP} minus FP32's [95 %]",
    "model, MB",
    "evaluation, s",
)


@dataclass(frozen=True)
class Place:
    """The paths and the seed in a command line, or shell variables for them where it is only shown.

    Attributes:
        split: The directory of the split.
        out: The directory of the seed.
        seed: The seed.
        root: The directory of the project.
    """

    split: str
    out: str
    seed: str
    root: str


SHOWN = Place("$SPLIT", "$OUT/seed-$SEED", "$SEED", ".")


@dataclass(frozen=True)
class Step:
    """A command line of ncf.py that loads a model.

    Attributes:
        flags: The flags after ``--load``, in which ``{out}`` and ``{root}`` stand for paths of a ``Place``.
        leaves: The file that the command writes, in the seed's directory.
        model: The file that it loads, in the seed's directory.
    """

    flags: str
    leaves: str
    model: str = FLOAT

    def words(self, place: Place, args: argparse.Namespace) -> list[str]:
        """Return the arguments of ncf.py."""
        load = recipe.loading_words(place.split, place.out, place.seed, args, self.model)
        flags = [word.format(out=place.out, root=place.root) for word in self.flags.split()]
        return [*map(str, load), *flags]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: The name in the table.
        evaluation: The step that writes the row's ranks.
        before: The steps that must be done before the evaluation.
    """

    name: str
    evaluation: Step
    before: tuple[Step, ...] = ()


def row_of(name: str, slug: str, flags: str = "", *before: Step, model: str = FLOAT) -> Row:
    """Return a row whose evaluation writes to the directory ``slug``, with further ``flags``."""
    evaluation = Step(f"--evaluate -o {{out}}/{slug} {flags}", f"{slug}/{RANKS}", model)
    return Row(name, evaluation, before)


def calibration(split_final: bool) -> Step:
    """Return the step that writes statistics of activations."""
    words = recipe.calibration_words("{out}", split_final)
    return Step(" ".join(map(str, words)), recipe.STATISTICS[split_final])


def fine_tuning(slug: str, schedule: str, rate: str) -> Step:
    """Return the step that trains the float model for an epoch of quantization-aware training (QAT)."""
    flags = f"--reset-optimizer -l {rate} -e 1 --compress {{root}}/{schedule} --overwrite -o {{out}}/{slug}"
    return Step(flags, f"{slug}/{CHECKPOINT}")


INT8 = "--quantize-eval --qem asym_u --qepc"
# The settings of schedules/ncf_qat.yaml and, with 4-bit weights, of schedules/ncf_qat_4bit.yaml.
LIKE_QAT = "--quantize-eval --qeba 8 --qema asym_u --qemw sym --qepc --qenql final sigmoid"
WHOLE, SPLIT = calibration(split_final=False), calibration(split_final=True)
OF_WHOLE, OF_SPLIT = (f"--qe-stats-file {{out}}/{step.leaves}" for step in (WHOLE, SPLIT))
AUTO = Step("--qe-auto -o {out}/auto", "auto/quant_auto.yaml")
QAT_8, QAT_4 = (
    fine_tuning("qat8", "schedules/ncf_qat.yaml", "0.00001"),
    fine_tuning("qat4", "schedules/ncf_qat_4bit.yaml", "0.0001"),
)
# The other rows are compared with the first one.
ROWS = (
    row_of("FP32", "fp32"),
    row_of("INT8", "int8", f"{INT8} {OF_WHOLE}", WHOLE),
    row_of("INT8, split final layer", "int8_split", f"{INT8} --split-final {OF_SPLIT}", SPLIT),
    row_of("INT8, scaled concatenation", "int8_scaled", f"{INT8} --qe-scaled-concat {OF_WHOLE}", WHOLE),
    row_of(
        "INT8, split, last layer in float",
        "int8_split_float",
        f"{INT8} --split-final --qenql final_add sigmoid {OF_SPLIT}",
        SPLIT,
    ),
    row_of(
        "the same, activations per channel",
        "int8_split_float_channels",
        f"{INT8} --split-final --qenql final_add sigmoid --qe-per-channel-acts {OF_SPLIT}",
        SPLIT,
    ),
    row_of(
        "INT8, chosen by --qe-auto",
        "int8_auto",
        f"--quantize-eval --qe-config-file {{out}}/{AUTO.leaves}",
        AUTO,
    ),
    row_of(
        "4-bit tables, 8-bit layers",
        "tables4",
        f"{INT8} --qe-embedding-bits 4 --qe-scaled-concat --qenql final sigmoid {OF_WHOLE}",
        WHOLE,
    ),
    row_of("8 bits after training, like QAT", "bits8", f"{LIKE_QAT} {OF_WHOLE}", WHOLE),
    row_of("INT8 QAT", "int8_qat", "--quantize-eval", QAT_8, model=QAT_8.leaves),
    row_of("4 bits after training, like QAT", "bits4", f"{LIKE_QAT} --qebw 4 {OF_WHOLE}", WHOLE),
    row_of("4 bits QAT", "bits4_qat", "--quantize-eval", QAT_4, model=QAT_4.leaves),
)


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one seed's model of a row.

    Attributes:
        ranks: (V,) int64, the ranks of the test items of the users that the table reports on.
        megabytes: The size of the model, without its optimizer.
        seconds: The seconds that the evaluation of all users took.
    """

    ranks: torch.Tensor
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Difference:
    """The metrics of a row minus those of FP32, in points.

    Attributes:
        hr: The difference of HR, averaged over users and seeds.
        p: The p-value for hits being equally likely in both, over all pairs of a user and a seed.
        ndcg: The difference of NDCG, averaged over seeds and then over users.
        interval: The 95 % interval of ``ndcg``, over users.
    """

    hr: float
    p: float
    ndcg: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """The figures of a row.

    Attributes:
        name: The name of the row.
        hr: HR@k of each seed, in percent.
        ndcg: NDCG@k of each seed, in percent.
        difference: The difference from FP32; None for FP32 itself.
        megabytes: The size of the model, averaged over seeds.
        seconds: The seconds of evaluation, the median over seeds.
    """

    name: str
    hr: list[float]
    ndcg: list[float]
    difference: Difference | None
    megabytes: float
    seconds: float


def make(step: Step, place: Place, split: Split, args: argparse.Namespace) -> str:
    """Take a step, unless the same command line has done so before with the same files.

    A record beside the file that the step writes says what made it.

    Returns:
        What the command printed.

    Raises:
        InputError: the command failed, or the record cannot be read.
    """
    words = step.words(place, args)
    left = Path(place.out, step.leaves)
    record = left.with_name(f"{left.name}.json")
    reads = {flag: file_digest(words[words.index(flag) + 1]) for flag in READS if flag in words}
    made_by = {"command": words, "data": data_of(split), "reads": reads}
    if left.exists() and record.exists() and not args.overwrite:
        before = read_record(record)
        if before == made_by | {"leaves": file_digest(left), "output": before["output"]}:
            return before["output"]
    # An interrupted step leaves no record.
    record.unlink(missing_ok=True)
    output = recipe.execute("ncf.py", *words)
    made = made_by | {"leaves": file_digest(left), "output": output}
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(made, indent=2) + "\n")
    return output


def data_of(split: Split) -> dict[str, Any]:
    """Return what identifies a split: the ratings, and how negatives were drawn."""
    return {
        "digest": split.digest,
        "seed": split.seed,
        "negatives": split.nb_candidates - 1,
        "distinct": split.distinct_negatives,
    }


def read_record(path: Path) -> dict[str, Any]:
    """Return the record that ``make`` has written.

    Raises:
        InputError: the file is not such a record.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--out: {path}: {error}: --overwrite starts again") from error
    if not isinstance(record, dict) or not isinstance(record.get("output"), str):
        raise InputError(f"--out: {path} is no record of a command: --overwrite starts again")
    return record


def evaluations_of_seed(path: Path, split: Split, seed: int, args: argparse.Namespace) -> list[Evaluation]:
    """Train with a seed, take the steps that the rows need, and evaluate each row."""
    out = args.out / f"seed-{seed}"
    recipe.train(path, out, seed, args)
    place = Place(str(path), str(out), str(seed), str(recipe.ROOT))
    for step in dict.fromkeys(step for row in ROWS for step in row.before):
        make(step, place, split, args)
    return [evaluation_of(row, place, split, args) for row in ROWS]


def evaluation_of(row: Row, place: Place, split: Split, args: argparse.Namespace) -> Evaluation:
    """Evaluate a row, or read the results that its evaluation has written before."""
    output = make(row.evaluation, place, split, args)
    path = Path(place.out, row.evaluation.leaves)
    ranks = torch.from_numpy(np.load(path, allow_pickle=False)[nb_calibration_users(split) :])
    if "--quantize-eval" in row.evaluation.flags:
        nb_bytes = (path.parent / QUANTIZED).stat().st_size
    else:
        weights = load_checkpoint(Path(place.out, row.evaluation.model))["state_dict"]
        nb_bytes = sum(tensor.nbytes for tensor in weights.values())
    return Evaluation(ranks, nb_bytes / 1e6, float(VAL_TIME.search(output)[1]))


def figures_of(name: str, seeds: list[Evaluation], in_float: list[Evaluation] | None) -> Figures:
    """Return a row's figures from its evaluations and FP32's, by seed. For FP32, ``in_float`` is None."""
    metrics = [metrics_of_ranks(seed.ranks, TOP) for seed in seeds]
    return Figures(
        name,
        [100 * of_seed.hr for of_seed in metrics],
        [100 * of_seed.ndcg for of_seed in metrics],
        in_float and difference_of(*(torch.stack([seed.ranks for seed in x]) for x in (seeds, in_float))),
        mean(seed.megabytes for seed in seeds),
        median(seed.seconds for seed in seeds),
    )


def difference_of(ranks: torch.Tensor, in_float: torch.Tensor) -> Difference:
    """Return the difference of metrics between ranks (S, V) of S seeds and V users and FP32's ranks."""
    hits, float_hits = ((x < TOP).numpy() for x in (ranks, in_float))
    gains = (gains_of_ranks(ranks, TOP) - gains_of_ranks(in_float, TOP)).mean(0).numpy()
    low, high = bootstrap_interval(gains, BOOTSTRAP_SEED)
    return Difference(
        100 * float(hits.mean() - float_hits.mean()),
        mcnemar(hits.ravel(), float_hits.ravel()),
        100 * float(gains.mean()),
        (100 * low, 100 * high),
    )


def markdown(figures: list[Figures]) -> str:
    """Return the table in Markdown."""
    rows = []
    for row in figures:
        means = (recipe.over_seeds(row.hr), recipe.over_seeds(row.ndcg))
        rows.append((row.name, *means, *cells(row.difference), f"{row.megabytes:.2f}", f"{row.seconds:.1f}"))
    return markdown_table(HEADER, rows)


def cells(difference: Difference | None) -> tuple[str, str]:
    """Return a difference as the table's two cells, which are empty for None."""
    if difference is None:
        return "", ""
    p = f"p = {difference.p:.2g}" if difference.p >= 1e-4 else "p < 0.0001"
    low, high = map(signed, difference.interval)
    return f"{signed(difference.hr)} ({p})", f"{signed(difference.ndcg)} [{low}, {high}]"


def signed(points: float) -> str:
    """Return points as text with a sign, which is plus for zero."""
    return f"{round(points, 2) + 0.0:+.2f}"


def protocol(split: Split, args: argparse.Namespace) -> str:
    """Return a text on what the figures mean and how they were made."""
    chosen_by = nb_calibration_users(split)
    return (
        f"{recipe.protocol(split, args, 'the last')} HR and NDCG in percent, of the last "
        f"{split.nb_users - chosen_by} users: --qe-auto chooses by the first {chosen_by}. Differences in points; p of "
        "McNemar's exact test over pairs of user and seed; intervals by bootstrap over users, of their means over "
        "seeds. QAT trains an epoch more than the others, at a lower learning rate. Evaluation: of all users, median "
        "over seeds."
    )


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command lines that make each row, in order and without those of the rows before.

    They contain the shell variables $SPLIT, $OUT and $SEED.
    """
    training = recipe.training_words(SHOWN.split, SHOWN.out, SHOWN.seed, args)
    result, seen = {row.name: [] for row in ROWS}, set()
    result[ROWS[0].name].append(shell_line(training))
    for row in ROWS:
        steps = [step for step in (*row.before, row.evaluation) if step not in seen]
        seen.update(steps)
        result[row.name] += [shell_line(step.words(SHOWN, args)) for step in steps]
    return result


def shell_line(words: list[object]) -> str:
    """Return a command line of ncf.py, quoted so that the shell replaces its variables."""
    quoted = (f'"{word}"' if "$" in str(word) else shlex.quote(str(word)) for word in words)
    return f"python ncf.py {' '.join(quoted)}"


def variables(path: Path, args: argparse.Namespace) -> str:
    """Return the shell line that sets the variables of ``commands``, to the first seed's values."""
    values = {"SPLIT": path, "OUT": args.out, "SEED": args.seeds[0]}
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def text_of(figures: list[Figures], path: Path, split: Split, args: argparse.Namespace) -> str:
    """Return the table, a text on what it means, and the commands as a block for a shell."""
    lines = [variables(path, args)]
    for name, of_row in commands(args).items():
        lines += [f"# {name}", *of_row]
    block = "\n".join(f"    {line}" for line in lines)
    return f"{markdown(figures)}\n\n{protocol(split, args)}\n\n{block}"


def json_of(figures: list[Figures], path: Path, split: Split, args: argparse.Namespace) -> str:
    """Return the figures, the text on what they mean and the commands as JSON."""
    of_rows = commands(args)
    content = {
        "rows": [asdict(row) | {"commands": of_rows[row.name]} for row in figures],
        "seeds": args.seeds,
        "protocol": protocol(split, args),
        "variables": variables(path, args),
    }
    return json.dumps(content, indent=2)


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: a seed is given twice.
    """
    description = __doc__.split("\n\n")[0]
    parser = recipe.build_parser("precision.py", description, "run/precision", [1, 2, 3, 4, 5], EPOCHS)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds: {' '.join(map(str, args.seeds))}: each counts once")
    return args


def main() -> None:
    """Run the script."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = recipe.converted(args.data, args.out)
    split = load_split(path)
    by_seed = [evaluations_of_seed(path, split, seed, args) for seed in args.seeds]
    in_float, *others = map(list, zip(*by_seed, strict=True))
    figures = [figures_of(ROWS[0].name, in_float, None)]
    figures += [figures_of(row.name, x, in_float) for row, x in zip(ROWS[1:], others, strict=True)]
    print((json_of if args.json else text_of)(figures, path, split, args))


if __name__ == "__main__":
    sys.exit(run("precision.py", main))
