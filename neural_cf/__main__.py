"""The command ``neural-cf NAME ...``, which is also ``python -m neural_cf NAME ...``."""

from __future__ import annotations

import importlib.util
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from types import ModuleType
from typing import NamedTuple

from distiller.system.cli import ArgumentParser, InputError, run
from neural_cf import __version__

PACKAGE, PROG = "neural_cf", "neural-cf"
USAGE = f"{PROG} NAME ...   (or: python -m {PACKAGE} NAME ...)"


class Command(NamedTuple):
    """A command and where it is.

    Attributes:
        help: One line for the list of commands.
        module: The module whose ``main`` takes the arguments. It is imported only when its command runs.
        less_memory: What a user can do when memory runs out; empty where there is nothing to change.
    """

    help: str
    module: str
    less_memory: str = ""


SMALLER_MODEL = "smaller -b/--batch-size, -f/--factors or --layers take less"
COMMANDS = {
    "convert": Command(
        "turn a ratings file into a split",
        "neural_cf.commands.convert",
        "a smaller -n/--negatives takes less",
    ),
    "train": Command("train NeuMF on a split", "neural_cf.commands.train", SMALLER_MODEL),
    "evaluate": Command(
        "evaluate a checkpoint, in FP32 or quantized to INT8", "neural_cf.commands.evaluate", SMALLER_MODEL
    ),
    "calibrate": Command(
        "collect the statistics that quantization needs", "neural_cf.commands.calibrate", SMALLER_MODEL
    ),
    "auto": Command(
        "choose the cheapest quantization within a loss", "neural_cf.commands.auto", SMALLER_MODEL
    ),
    "recommend": Command("print the best items for users", "neural_cf.commands.recommend"),
    "export": Command("write a model as ONNX or for torch.export", "neural_cf.commands.export"),
    "compare": Command("compare two evaluation reports user by user", "neural_cf.commands.compare"),
    "plot": Command("draw training curves or the precision table", "neural_cf.commands.plot"),
    "synthetic": Command("write synthetic ratings to try things with", "neural_cf.commands.synthetic"),
    "baselines": Command(
        "evaluate popularity, item-kNN and ALS (in a clone of the repository)", "benchmarks.baselines"
    ),
}


def description() -> str:
    """Return the commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["NeuMF from ratings to recommendations. Each command has its own --help.", "", "commands:", *lines]
    )


def main() -> None:
    """Run the command that the first argument names."""
    parser = ArgumentParser(
        prog=PROG, description=description(), formatter_class=RawDescriptionHelpFormatter, usage=USAGE
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("name", choices=COMMANDS, help=SUPPRESS)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).name
    command = COMMANDS[name]
    sys.exit(run(f"{PROG} {name}", lambda: load(name, command).main(sys.argv[2:]), command.less_memory))


def load(name: str, command: Command) -> ModuleType:
    """Import a command's module.

    Raises:
        InputError: it belongs to the repository and is not installed.
    """
    package = command.module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{name} is a measurement of the repository: run python -m {PACKAGE} {name} in a clone"
        )
    return importlib.import_module(command.module)


if __name__ == "__main__":
    main()
