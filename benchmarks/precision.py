"""What each precision costs: FP32 beside INT8, 4 bits and quantization-aware training, over several seeds.

    python -m benchmarks.precision ratings.csv|DIRECTORY [--epochs 8] [--seeds 1 2 3 4 5] ...

Everything goes through ncf.py as a user would type it; each command is shown as it is run. What was made by the same
command line of the same files is there beside its result and not made again, so that a table that was interrupted goes
on where it was.

A model is that of the last epoch, after few enough of them that it does not overfit. The best epoch by the HR of the
users that the table reports on would be lucky with them by some tenths of a point, and whatever changes the model, an
epoch of quantization-aware training or tables of 4 bits, would lose this luck beside what it loses.
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

TOP = 10  # of HR and NDCG
EPOCHS = 8  # on ml-1m HR@10 rises until about then, and falls from the 12th on
FLOAT = f"{recipe.TRAINED}/{CHECKPOINT}"
VAL_TIME = re.compile(r"val_time = ([\d.]+)")
# The flags that name a file which a command reads.
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
    """Where commands are run, or what stands for that where they are only shown.

    Attributes:
        split: The split's directory.
        out: The seed's directory.
        seed: The seed.
        root: The directory of the project's own files.
    """

    split: str
    out: str
    seed: str
    root: str


SHOWN = Place("$SPLIT", "$OUT/seed-$SEED", "$SEED", ".")


@dataclass(frozen=True)
class Step:
    """A command line of ncf.py that goes on with a model.

    Attributes:
        flags: Those after ``--load``, with ``{out}`` and ``{root}`` for a place's.
        leaves: The file that it leaves, in the seed's directory.
        model: The file that it loads, likewise.
    """

    flags: str
    leaves: str
    model: str = FLOAT

    def words(self, place: Place, args: argparse.Namespace) -> list[str]:
        """What comes after ``ncf.py``."""
        load = recipe.loading_words(place.split, place.out, place.seed, args, self.model)
        flags = [word.format(out=place.out, root=place.root) for word in self.flags.split()]
        return [*map(str, load), *flags]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: As the table has it.
        evaluation: What leaves its ranks.
        before: The steps that must be done by then.
    """

    name: str
    evaluation: Step
    before: tuple[Step, ...] = ()


def row_of(name: str, slug: str, flags: str = "", *before: Step, model: str = FLOAT) -> Row:
    """A row whose evaluation has the directory ``slug``, and ``flags`` beside ``--evaluate``."""
    evaluation = Step(f"--evaluate -o {{out}}/{slug} {flags}", f"{slug}/{RANKS}", model)
    return Row(name, evaluation, before)


def calibration(split_final: bool) -> Step:
    """What leaves statistics of activations."""
    words = recipe.calibration_words("{out}", split_final)
    return Step(" ".join(map(str, words)), recipe.STATISTICS[split_final])


def fine_tuning(slug: str, schedule: str, rate: str) -> Step:
    """An epoch of quantization-aware training, from the float model."""
    flags = f"--reset-optimizer -l {rate} -e 1 --compress {{root}}/{schedule} --overwrite -o {{out}}/{slug}"
    return Step(flags, f"{slug}/{CHECKPOINT}")


INT8 = "--quantize-eval --qem asym_u --qepc"
# As in ncf_qat.yaml and, with 4-bit weights, in ncf_qat_4bit.yaml.
LIKE_QAT = "--quantize-eval --qeba 8 --qema asym_u --qemw sym --qepc --qenql final sigmoid"
WHOLE, SPLIT = calibration(split_final=False), calibration(split_final=True)
OF_WHOLE, OF_SPLIT = (f"--qe-stats-file {{out}}/{step.leaves}" for step in (WHOLE, SPLIT))
AUTO = Step("--qe-auto -o {out}/auto", "auto/quant_auto.yaml")
QAT_8, QAT_4 = (
    fine_tuning("qat8", "ncf_qat.yaml", "0.00001"),
    fine_tuning("qat4", "ncf_qat_4bit.yaml", "0.0001"),
)
# The first is the one that the others are compared with.
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
    """What one seed's model of a row does.

    Attributes:
        ranks: (V,) int64, of the test items of the users that the table reports on.
        megabytes: Of the model, without its optimizer.
        seconds: That evaluating all users took.
    """

    ranks: torch.Tensor
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Difference:
    """What a row has more than FP32, in points.

    Attributes:
        hr: Mean over users and seeds.
        p: That hits are equally likely in both, over all pairs of a user and a seed.
        ndcg: Mean over users of their mean over seeds.
        interval: Its 95 % interval, over users.
    """

    hr: float
    p: float
    ndcg: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """A row's figures.

    Attributes:
        name: The row's.
        hr: Each seed's HR@k in percent.
        ndcg: Likewise NDCG@k.
        difference: From FP32; None for FP32 itself.
        megabytes: Mean over seeds.
        seconds: Median over seeds.
    """

    name: str
    hr: list[float]
    ndcg: list[float]
    difference: Difference | None
    megabytes: float
    seconds: float


def make(step: Step, place: Place, split: Split, args: argparse.Namespace) -> str:
    """Do a step, unless the same command line has done it before with the same files.

    A record beside what the step leaves says what made it.

    Returns:
        What it printed.

    Raises:
        InputError: it failed, or its record cannot be read.
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
    # What is left half done has no record.
    record.unlink(missing_ok=True)
    output = recipe.execute("ncf.py", *words)
    made = made_by | {"leaves": file_digest(left), "output": output}
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(made, indent=2) + "\n")
    return output


def data_of(split: Split) -> dict[str, Any]:
    """What makes a split the one that it is: the ratings, and how negatives were drawn."""
    return {
        "digest": split.digest,
        "seed": split.seed,
        "negatives": split.nb_candidates - 1,
        "distinct": split.distinct_negatives,
    }


def read_record(path: Path) -> dict[str, Any]:
    """What ``make`` has written; an ``InputError`` where it is something else."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--out: {path}: {error}: --overwrite starts again") from error
    if not isinstance(record, dict) or not isinstance(record.get("output"), str):
        raise InputError(f"--out: {path} is no record of a command: --overwrite starts again")
    return record


def evaluations_of_seed(path: Path, split: Split, seed: int, args: argparse.Namespace) -> list[Evaluation]:
    """Train with a seed, do what every row needs, and evaluate every row."""
    out = args.out / f"seed-{seed}"
    recipe.train(path, out, seed, args)
    place = Place(str(path), str(out), str(seed), str(recipe.ROOT))
    for step in dict.fromkeys(step for row in ROWS for step in row.before):
        make(step, place, split, args)
    return [evaluation_of(row, place, split, args) for row in ROWS]


def evaluation_of(row: Row, place: Place, split: Split, args: argparse.Namespace) -> Evaluation:
    """Evaluate a row, or read what its evaluation has left."""
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
    """A row's figures, from its evaluations and FP32's, in the same order of seeds; None for FP32 itself."""
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
    """What (S, V) ranks, of S seeds and V users, have more than FP32's."""
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
    """The table."""
    rows = []
    for row in figures:
        means = (recipe.over_seeds(row.hr), recipe.over_seeds(row.ndcg))
        rows.append((row.name, *means, *cells(row.difference), f"{row.megabytes:.2f}", f"{row.seconds:.1f}"))
    return markdown_table(HEADER, rows)


def cells(difference: Difference | None) -> tuple[str, str]:
    """A difference's cells; empty where there is none."""
    if difference is None:
        return "", ""
    p = f"p = {difference.p:.2g}" if difference.p >= 1e-4 else "p < 0.0001"
    low, high = map(signed, difference.interval)
    return f"{signed(difference.hr)} ({p})", f"{signed(difference.ndcg)} [{low}, {high}]"


def signed(points: float) -> str:
    """Points with a sign, and no minus before a zero."""
    return f"{round(points, 2) + 0.0:+.2f}"


def protocol(split: Split, args: argparse.Namespace) -> str:
    """What the figures mean and how they came about."""
    chosen_by = nb_calibration_users(split)
    return (
        f"{recipe.protocol(split, args, 'the last')} HR and NDCG in percent, of the last "
        f"{split.nb_users - chosen_by} users: --qe-auto chooses by the first {chosen_by}. Differences in points; p of "
        "McNemar's exact test over pairs of user and seed; intervals by bootstrap over users, of their means over "
        "seeds. QAT trains an epoch more than the others, at a lower learning rate. Evaluation: of all users, median "
        "over seeds."
    )


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """By row, the command lines that make it, in order, each where it is needed first; $SPLIT, $OUT, $SEED are open."""
    training = recipe.training_words(SHOWN.split, SHOWN.out, SHOWN.seed, args)
    result, seen = {row.name: [] for row in ROWS}, set()
    result[ROWS[0].name].append(shell_line(training))
    for row in ROWS:
        steps = [step for step in (*row.before, row.evaluation) if step not in seen]
        seen.update(steps)
        result[row.name] += [shell_line(step.words(SHOWN, args)) for step in steps]
    return result


def shell_line(words: list[object]) -> str:
    """A command line of ncf.py, its variables left to the shell."""
    quoted = (f'"{word}"' if "$" in str(word) else shlex.quote(str(word)) for word in words)
    return f"python ncf.py {' '.join(quoted)}"


def variables(path: Path, args: argparse.Namespace) -> str:
    """The line that sets what is open in ``commands``, to the first seed's."""
    values = {"SPLIT": path, "OUT": args.out, "SEED": args.seeds[0]}
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def text_of(figures: list[Figures], path: Path, split: Split, args: argparse.Namespace) -> str:
    """The table, what it means, and the commands, as a block that a shell takes."""
    lines = [variables(path, args)]
    for name, of_row in commands(args).items():
        lines += [f"# {name}", *of_row]
    block = "\n".join(f"    {line}" for line in lines)
    return f"{markdown(figures)}\n\n{protocol(split, args)}\n\n{block}"


def json_of(figures: list[Figures], path: Path, split: Split, args: argparse.Namespace) -> str:
    """The same as JSON."""
    of_rows = commands(args)
    content = {
        "rows": [asdict(row) | {"commands": of_rows[row.name]} for row in figures],
        "seeds": args.seeds,
        "protocol": protocol(split, args),
        "variables": variables(path, args),
    }
    return json.dumps(content, indent=2)


def parse_args() -> argparse.Namespace:
    description = __doc__.split("\n\n")[0]
    parser = recipe.build_parser("precision.py", description, "run/precision", [1, 2, 3, 4, 5], EPOCHS)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds: {' '.join(map(str, args.seeds))}: each counts once")
    return args


def main() -> None:
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
