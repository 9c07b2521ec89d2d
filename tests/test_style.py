"""What the code looks like: functions that fit a screen, docstrings, and who may see argparse's namespaces."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from helpers_paths import ROOT

MOST_LINES = 60
# A flag is a call, and these are lists of flags.
LISTS_OF_FLAGS = {"neural_cf/commands/flags.py", "distiller/quantization/flags.py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources() -> dict[str, str]:
    """Return the source of every file of the two packages, of the measurements and of the scripts, by its path."""
    paths = [
        path for folder in ("distiller", "neural_cf", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    paths += ROOT.glob("*.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}


def long_functions(path: str, source: str) -> list[str]:
    """Return the functions that have more than ``MOST_LINES``, those within functions too."""
    if path in LISTS_OF_FLAGS:
        return []
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    lines = [(node.name, node.end_lineno - node.lineno + 1) for node in found]
    return [f"{path}: {name} has {count} lines" for name, count in lines if count > MOST_LINES]


def documented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield a module or class and the public classes, functions and methods in it, each with its name."""
    yield prefix, node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)) and not child.name.startswith("_"):
            name = f"{prefix} {child.name}"
            if isinstance(child, ast.ClassDef):
                yield from documented(child, name)
            else:
                yield name, child


def without_a_sentence(path: str, source: str) -> list[str]:
    """Return what has no docstring, or one whose first paragraph ends without a full stop or a colon."""
    wrong = []
    for name, node in documented(ast.parse(source), path):
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].rstrip()
        if not paragraph.endswith((".", ":")):
            wrong.append(name)
    return wrong


def namespaces(path: str, source: str) -> list[str]:
    """Return the lines that name argparse's ``Namespace`` in a folder below that of the commands."""
    if not path.startswith("neural_cf/") or path.startswith("neural_cf/commands/"):
        return []
    lines = []
    for node in ast.walk(ast.parse(source)):
        imported = isinstance(node, ast.ImportFrom) and any(alias.name == "Namespace" for alias in node.names)
        if imported or (isinstance(node, ast.Attribute) and node.attr == "Namespace"):
            lines.append(f"{path}:{node.lineno}")
    return lines


def test_all_folders_are_looked_at():
    """Nothing below passes because no file was found."""
    assert {path.partition("/")[0] for path in sources()} == {
        *("distiller", "neural_cf", "benchmarks"),
        *("convert.py", "dataset.py", "ncf.py", "neumf.py"),
    }


def test_functions_have_at_most_sixty_lines():
    """A list of flags may be longer."""
    assert [line for item in sources().items() for line in long_functions(*item)] == []


def test_modules_and_what_is_public_say_what_they_are():
    """In a first paragraph that is a sentence, or ends with a colon before what it lists."""
    assert [line for item in sources().items() for line in without_a_sentence(*item)] == []


def test_argparse_ends_at_the_commands():
    """What is below them takes ``Settings`` or plain values."""
    assert [line for item in sources().items() for line in namespaces(*item)] == []


# --- the tests above can fail ---


def function(lines: int, head: str = "def f():", indent: str = "") -> str:
    """Return the source of a function of so many lines."""
    return f"{indent}{head}\n" + f"{indent}    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("ncf.py", function(60), []),
        ("ncf.py", function(61), ["ncf.py: f has 61 lines"]),
        ("ncf.py", function(61, "async def f():"), ["ncf.py: f has 61 lines"]),
        ("ncf.py", "class C:\n" + function(61, "def _m(self):", "    "), ["ncf.py: _m has 61 lines"]),
        ("ncf.py", function(61) + function(2), ["ncf.py: f has 61 lines"]),
        ("neural_cf/commands/flags.py", function(61), []),
    ],
)
def test_a_function_of_61_lines_is_seen(path, source, found):
    assert long_functions(path, source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", ["a.py"]),
        ('"""Do it"""', ["a.py"]),
        ('"""Do it.\n\nAt once"""', []),
        ('"""Do one of\n\n- this."""', ["a.py"]),
        ('"""Do one of:\n\n- this"""', []),
        ('"""M."""\ndef f(): pass\ndef _g(): pass', ["a.py f"]),
        (
            '"""M."""\nclass C:\n    """C."""\n    def m(self): pass\n    def __len__(self): pass',
            ["a.py C m"],
        ),
        ('"""M."""\nclass C: pass\nclass _D:\n    def m(self): pass', ["a.py C"]),
        ('"""M."""\ndef f():\n    """F."""\n    def inner(): pass', []),
    ],
)
def test_a_missing_sentence_is_seen(source, found):
    assert without_a_sentence("a.py", source) == found


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("neural_cf/model.py", "from argparse import Namespace", ["neural_cf/model.py:1"]),
        ("neural_cf/runs/log.py", "import argparse\nargparse.Namespace()", ["neural_cf/runs/log.py:2"]),
        ("neural_cf/runs/log.py", "from argparse import Action", []),
        ("neural_cf/commands/train.py", "from argparse import Namespace", []),
        ("distiller/graph.py", "from argparse import Namespace", []),
    ],
)
def test_a_namespace_below_the_commands_is_seen(path, source, found):
    assert namespaces(path, source) == found
