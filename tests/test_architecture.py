"""The arrows of docs/architecture.md, read off the imports: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A group imports from the groups below it and from itself.
LAYERS = [
    {"neural_cf.__main__"},
    {"neural_cf.commands"},
    {"neural_cf.serving", "neural_cf.reporting"},
    {"neural_cf.int8", "neural_cf.training"},
    {"neural_cf.ranking"},
    {"neural_cf.data"},
    {"neural_cf.runs"},
    {"neural_cf.model", "neural_cf.split", "neural_cf.shipped"},
    {"distiller"},
]
LEVEL = {group: len(LAYERS) - number for number, layer in enumerate(LAYERS) for group in layer}
PACKAGES = ("neural_cf", "distiller")


def modules() -> dict[str, str]:
    """Return the source of every module in the packages, by its name."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path.read_text() for name, path in zip(names, paths, strict=True)}


def imports(source: str) -> set[str]:
    """Return the modules that a source imports, those that it imports from as ``module.name`` too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def group_of(module: str) -> str | None:
    """Return the group of ``LAYERS`` that a module is in; None for the bare package and for other packages."""
    parts = module.split(".")
    return next((group for group in (parts[0], ".".join(parts[:2])) if group in LEVEL), None)


def wrong_arrows(sources: dict[str, str]) -> list[str]:
    """Return the imports that run against the arrows: of a group beside or above, or of a script."""
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "tests"}
    wrong = []
    for name, source in sources.items():
        own = group_of(name)
        for other in imports(source):
            target = group_of(other)
            against = target and own and target != own and LEVEL[target] >= LEVEL[own]
            if against or other.split(".")[0] in scripts:
                wrong.append(f"{name} imports {other}")
    return wrong


def cycle(sources: dict[str, str]) -> list[str]:
    """Return modules that import each other in a ring; nothing where there is none."""
    graph = {
        name: {other for other in imports(source) if other in sources} for name, source in sources.items()
    }
    while leaves := [name for name, others in graph.items() if not others & graph.keys() - {name}]:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def test_arrows_run_one_way():
    assert wrong_arrows(modules()) == []


def test_no_module_is_in_a_ring():
    assert cycle(modules()) == []


def test_every_module_has_a_layer():
    assert [name for name in modules() if group_of(name) is None] == ["neural_cf"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("neural_cf.ranking.metrics", "from neural_cf.training import trainer"),
        ("neural_cf.serving.recommend", "from neural_cf.reporting.compare import overlaps"),
        ("neural_cf.model", "from neural_cf.split import Split"),
        ("distiller.graph", "import neural_cf.model"),
        ("neural_cf.commands.train", "from neumf import NeuMF"),
        ("neural_cf.commands.auto", "import benchmarks.table"),
    ],
)
def test_an_arrow_turned_round_is_seen(module, line):
    sources = modules()
    sources[module] += f"\n{line}\n"
    (wrong,) = {text.split(" imports ")[0] for text in wrong_arrows(sources)}
    assert wrong == module


def test_a_ring_is_seen():
    sources = modules()
    sources["distiller.modules"] += "\nimport distiller.graph\n"
    assert {"distiller.graph", "distiller.modules"} <= set(cycle(sources))


def test_four_scripts_stand_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "convert.py",
        "dataset.py",
        "ncf.py",
        "neumf.py",
    ]
