"""neural-cf plot: what its pictures hold, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import call
from matplotlib.figure import Figure

from neural_cf.commands import plot as command
from neural_cf.reporting import plot
from neural_cf.reporting.plot import names_of, read_run

ROW = {"name": "FP32", "hr": [60.0, 64.0], "ndcg": [30.0, 31.0], "difference": None, "megabytes": 7.5}
INT8 = ROW | {
    "name": "INT8",
    "hr": [58.0, 61.0],
    "difference": {"hr": -2.5, "p": 0.03, "ndcg": -0.5, "interval": [-0.9, 0.1]},
    "megabytes": 2.0,
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved; saving goes on."""
    figures, save = [], plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def run_plot(*arguments: object):
    return call("neural-cf plot", command.main, arguments)


def write_run(directory: Path, hits: list[float], **settings: object) -> Path:
    """A run's two files."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"topk": 10} | settings))
    lines = [f"{epoch},5,{hr},0.1,{1 / (1 + epoch)},1.0,1.0" for epoch, hr in enumerate(hits)]
    header = "epoch,steps,hr@10,ndcg@10,avg_train_loss,train_time_s,val_time_s"
    (directory / "valid_results.csv").write_text("\n".join([header, *lines]) + "\n")
    return directory


def write_table(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps({"rows": rows}))
    return path


# --- runs ---


def test_run_is_read_as_recorded(run_dir):
    """Of ncf.py's own files; the best epoch's HR@10 is that of the best checkpoint."""
    run = read_run(run_dir)
    assert run.epochs == [0, 1]
    assert run.k == 10
    assert 0 < run.losses[1] < run.losses[0] < 1
    assert all(0 < hr < 100 for hr in run.hits)


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("svg", b"<?xml")])
def test_picture_of_a_run_of_ncf(run_dir, tmp_path, suffix, start):
    """In the format that the suffix names, and nothing else beside it."""
    path = tmp_path / f"out.{suffix}"
    outcome = run_plot(run_dir, "-o", path)
    assert (outcome.code, outcome.err) == (0, "")
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_runs_are_lines_with_their_best_epoch(tmp_path, drawn):
    """The first of equal ones, as training keeps it; settings are told where runs agree in them."""
    a = write_run(tmp_path / "seed-1/base", [0.2, 0.4, 0.4], factors=8, layers=[4, 2], batch_size=5)
    b = write_run(tmp_path / "seed-2/base", [0.1, 0.3, 0.25], factors=8, layers=[4, 2], batch_size=6)
    assert run_plot(a, b, "-o", tmp_path / "out.png").code == 0
    losses, hits = drawn[0].axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[1, 1 / 2, 1 / 3]] * 2
    lines = [line for line in hits.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_ydata()) for line in lines] == [[20, 40, 40], [10, 30, 25]]
    told = [text.get_text() for text in hits.get_legend().get_texts()]
    assert told == ["seed-1: best 40.00, epoch 1", "seed-2: best 30.00, epoch 1"]
    assert drawn[0].get_suptitle() == "layers 4 2, 8 factors"


def test_many_runs_have_a_colour_each(tmp_path, drawn):
    """Beyond the ten of the usual cycle."""
    runs = [write_run(tmp_path / f"seed-{seed}", [0.1, 0.2]) for seed in range(12)]
    assert run_plot(*runs, "-o", tmp_path / "out.png").code == 0
    lines = drawn[0].axes[0].lines
    assert len(lines) == len({tuple(line.get_color()) for line in lines}) == 12


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/run"], ["run"]),
        (["/a/seed-1/base", "/a/seed-2/base"], ["seed-1", "seed-2"]),
        (["/a/x/1", "/b/y/1"], ["a/x", "b/y"]),
        (["/a", "/a/b"], ["a", "a/b"]),
        (["/a/b/b", "/a/b"], ["b/b", "b"]),
    ],
)
def test_names_are_what_differs(paths, names):
    assert names_of([Path(path) for path in paths]) == names


def test_a_figure_makes_the_same_file_again(run_dir, tmp_path):
    """So that a picture in a repository changes with its data alone."""
    paths = [tmp_path / name / "out.svg" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        assert run_plot(run_dir, "-o", path).code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


# --- the precision table ---


def test_precision_table_is_bars(tmp_path, drawn):
    """Means over seeds with deviations, differences with intervals, sizes."""
    outcome = run_plot(write_table(tmp_path / "table.json", ROW, INT8), "-o", tmp_path / "out.svg")
    assert (outcome.code, outcome.err) == (0, "")
    hits, differences, sizes = drawn[0].axes
    assert [bar.get_width() for bar in hits.patches] == [62.0, 59.5]
    assert [bar.get_width() for bar in differences.patches] == [-2.5, -0.5]
    assert [bar.get_width() for bar in sizes.patches] == [7.5, 2.0]
    assert [label.get_text() for label in hits.get_yticklabels()] == ["FP32", "INT8"]
    assert hits.get_xlim()[0] == 0
    (interval,) = differences.collections[0].get_segments()
    assert interval[:, 0].tolist() == pytest.approx([-0.9, 0.1])
    assert "2 seeds" in hits.get_xlabel()


def test_table_of_one_seed_has_no_deviations(tmp_path, drawn):
    row = ROW | {"hr": [60.0]}
    assert run_plot(write_table(tmp_path / "table.json", row), "-o", tmp_path / "out.png").code == 0
    assert drawn[0].axes[0].get_xlabel() == "%"
    assert not drawn[0].axes[0].collections


@pytest.mark.parametrize("name", ["$\\frac$", "a\udcffb"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_names_are_drawn_as_they_are(tmp_path, drawn, name, kind):
    """Neither as formulas nor as text where they have bytes that are none."""
    shown = name.replace("\udcff", "\\udcff")
    out = ("-o", tmp_path / f"out.{kind}")
    outcome = run_plot(write_table(tmp_path / "table.json", ROW, INT8 | {"name": name}), *out)
    assert (outcome.code, outcome.err) == (0, "")
    assert drawn[-1].axes[0].get_yticklabels()[1].get_text() == shown
    runs = [write_run(tmp_path / each, [0.1, 0.2]) for each in (name, "other")]
    outcome = run_plot(*runs, *out)
    assert (outcome.code, outcome.err) == (0, "")
    assert drawn[-1].axes[1].get_legend().get_texts()[0].get_text().startswith(f"{shown}: best")


# --- what is refused ---


def refused(*arguments: object) -> str:
    """The one line that a mistake ends with; no picture is left."""
    outcome = run_plot(*arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    return outcome.err


@pytest.mark.parametrize("name", ["config.json", "valid_results.csv"])
def test_directory_without_a_run_is_named(run_dir, tmp_path, name):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / name).unlink()
    assert f"neural-cf plot: error: {run}: no run of ncf.py: it has no {name}" in refused(
        run, "-o", tmp_path / "a.png"
    )
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[" * 100_000, "config.json: not JSON"),
        ("config.json", "[]", "config.json: no configuration"),
        ("config.json", '{"topk": "10"}', "config.json: no configuration"),
        ("config.json", '{"topk": 5}', "valid_results.csv: no column hr@5"),
        ("valid_results.csv", "", "valid_results.csv: no column epoch"),
        ("valid_results.csv", "epoch,hr@10,avg_train_loss\n", "valid_results.csv: no epochs"),
        ("valid_results.csv", "epoch,hr@10,avg_train_loss\n0,0.1,0.2\n1,x,0.2\n", "valid_results.csv:3: "),
        ("valid_results.csv", "epoch,hr@10,avg_train_loss\n0,0.1\n", "valid_results.csv:2: "),
        ("valid_results.csv", "epoch,hr@10,avg_train_loss\n0,0.1,nan\n", "valid_results.csv:2: "),
        ("valid_results.csv", f"epoch,hr@10,avg_train_loss\n{10**400},0.1,1\n", "valid_results.csv:2: "),
        ("valid_results.csv", "epoch,hr@10,avg_train_loss\n0,1e308,1\n", "valid_results.csv:2: "),
        ("valid_results.csv", f"epoch,hr@10,avg_train_loss\n0,{'1' * 200_000},1\n", "valid_results.csv:2: "),
        ("valid_results.csv", "x" * 200_000, "valid_results.csv:"),
    ],
)
def test_damaged_run_is_named(tmp_path, name, text, told):
    run = write_run(tmp_path / "run", [0.1, 0.2])
    (run / name).write_text(text)
    assert told in refused(run, "-o", tmp_path / "a.png")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        "{}",
        '{"rows": []}',
        '{"rows": [1]}',
        json.dumps({"rows": [ROW, ROW]}),
        json.dumps({"rows": [ROW | {"hr": []}]}),
        json.dumps({"rows": [ROW | {"megabytes": "7"}]}),
        json.dumps({"rows": [ROW | {"hr": [1e308]}]}),
        json.dumps({"rows": [ROW, INT8 | {"difference": {"hr": 1, "ndcg": 1, "interval": [1]}}]}),
    ],
)
def test_file_that_is_no_table_is_named(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    assert f"error: {path}: " in refused(path, "-o", tmp_path / "a.png")


def test_sources_that_do_not_go_together(run_dir, tmp_path):
    """A table beside a run, a run twice, runs of different k."""
    table = write_table(tmp_path / "table.json", ROW)
    out = ("-o", tmp_path / "a.png")
    assert "a table is drawn alone" in refused(table, run_dir, *out)
    assert "twice" in refused(run_dir, run_dir, *out)
    other = write_run(tmp_path / "other", [0.1], topk=5)
    (other / "valid_results.csv").write_text("epoch,hr@5,avg_train_loss\n0,0.1,0.2\n")
    assert "runs that do not compare" in refused(run_dir, other, *out)
    for number, setting in enumerate([{"validate": True}, {"ranking": "full"}]):
        other = write_run(tmp_path / f"other-{number}", [0.1], **setting)
        assert "runs that do not compare" in refused(run_dir, other, *out)


@pytest.mark.parametrize(
    ("out", "told"), [("a.jpg", "-o/--out: "), ("a", "-o/--out: "), ("no/a.png", "no/a.png: No such file")]
)
def test_place_for_the_picture_is_checked(run_dir, tmp_path, out, told):
    assert told in refused(run_dir, "-o", tmp_path / out)


def test_without_matplotlib_there_is_one_line(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("neural_cf.runs.recorder.has_matplotlib", lambda: False)
    assert "pip install matplotlib" in refused(run_dir, "-o", tmp_path / "a.png")
