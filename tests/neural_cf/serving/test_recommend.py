"""recommend.py and titles: against plain loops, in all formats, and what a user can get wrong."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from helpers_split import tiny_split

from neural_cf.commands import recommend as command
from neural_cf.data.titles import TITLES, read_titles
from neural_cf.int8.scorer import scorer_of
from neural_cf.runs.models import read_model
from neural_cf.serving import recommend as serving
from neural_cf.split import CSV_FILES, load_split

GENRES = {"movies.csv": ",Drama", "movies.dat": "::Drama", "u.item": "|01-Jan-1995||http://x|0|1"}


@pytest.fixture(name="recommend")
def recommend_script():
    """Calls ``neural-cf recommend``."""
    return lambda *arguments: call("neural-cf recommend", command.main, arguments)


def error_line(outcome) -> str:
    """The only line of a user's error."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("neural-cf recommend: error: ")
    return line


def movies_text(name: str, titles: dict[int, str]) -> str:
    """A movies file in the format that MovieLens has under this name."""
    if name == "movies.csv":
        lines = [f'{item},"{title}"' if "," in title else f"{item},{title}" for item, title in titles.items()]
        return "".join(f"{line}\n" for line in ["movieId,title,genres", *(x + GENRES[name] for x in lines)])
    delimiter = "::" if name == "movies.dat" else "|"
    return "".join(f"{item}{delimiter}{title}{GENRES[name]}\n" for item, title in titles.items())


# --- what is recommended ---


def reference(checkpoint: Path, directory: Path, user_id: int, n: int) -> list[tuple[int, float]]:
    """Ids and scores of a user's best unrated items, by plain loops."""
    split = load_split(directory)
    user = split.user_ids.tolist().index(user_id)
    pairs = zip(split.train_users.tolist(), split.train_items.tolist(), strict=True)
    rated = {item for other, item in pairs if other == user} | {int(split.test_items[user])}
    items = [item for item in range(split.nb_items) if item not in rated]
    scores = scorer_of(read_model(checkpoint))(torch.tensor([user]), torch.tensor([items]))[0].tolist()
    best = sorted(zip(items, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [(int(split.item_ids[item]), score) for item, score in best[:n]]


@pytest.fixture
def quantized_file(quantize_eval, tmp_path, monkeypatch) -> Path:
    """A ``quantized.pth.tar`` whose scores tie."""
    monkeypatch.chdir(tmp_path)
    assert quantize_eval(["--qem", "asym_u", "--qepc"], "int8").code == 0
    return tmp_path / "int8" / "quantized.pth.tar"


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("pairs", [1 << 20, 200, 7])
def test_the_best_unrated_items(recommend, split_dir, checkpoint, quantized_file, monkeypatch, kind, pairs):
    """As plain loops have them, in blocks of any size; users in the order asked for, each once."""
    monkeypatch.setitem(serving.PAIRS_PER_BLOCK, "cpu", pairs)
    path = checkpoint if kind == "float" else quantized_file
    outcome = recommend(path, split_dir, "--user", 3, 1, 60, 3, "-n", 5, "--format", "json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)
    expected = {user: reference(path, split_dir, user, 5) for user in (3, 1, 60)}
    assert [(x["user"], x["rank"]) for x in rows] == [(user, r) for user in expected for r in range(1, 6)]
    assert [x["item"] for x in rows] == [item for best in expected.values() for item, _ in best]
    np.testing.assert_allclose(
        [x["score"] for x in rows], [score for best in expected.values() for _, score in best], atol=1e-6
    )


def test_a_worked_out_split():
    """User 2 has trained on items 1, 2, 3; her test item is rated too, and of the rest ties go by number."""
    split = tiny_split()
    table = torch.tensor([[0.5, 0.9, 0.9, 0.9, 0.5, 0.6]])
    test_item = int(split.test_items[2])
    rest = [item for item in (5, 0, 4) if item != test_item]

    def scorer(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return table.expand(len(users), -1).gather(1, items)

    ((items, scores),) = serving.best_unseen(scorer, split, [2], 10)
    assert items == rest
    np.testing.assert_allclose(scores, [table[0, item] for item in rest])


def test_a_list_is_as_long_as_there_are_items(recommend, split_dir, checkpoint):
    split = load_split(split_dir)
    rated = 1 + int((split.train_users == 0).sum())
    user = split.user_ids[0]
    rows = json.loads(recommend(checkpoint, split_dir, "--user", user, "-n", 500, "--format", "json").out)
    assert len({row["item"] for row in rows}) == len(rows) == split.nb_items - rated


# --- formats and titles ---


@pytest.fixture
def titled_split(convert, ratings_file, tmp_path):
    """A split of ratings beside which a movies file lies."""

    def make(name: str, encoding: str) -> tuple[Path, dict[int, str]]:
        directory = tmp_path / "data"
        directory.mkdir()
        shutil.copy(ratings_file, directory)
        titles = {item: f"Amélie, part {item} (2001)" for item in range(1, 200)}
        (directory / name).write_bytes(movies_text(name, titles).encode(encoding))
        outcome = convert(directory / "ratings.csv", tmp_path / "split", "-n", 40)
        assert outcome.code == 0, outcome.err
        return tmp_path / "split", titles

    return make


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("movies.csv", "utf-8"), ("movies.dat", "latin-1"), ("movies.dat", "utf-8"), ("u.item", "latin-1")],
)
def test_titles_beside_the_ratings(recommend, checkpoint, titled_split, name, encoding):
    """In MovieLens's three formats and both encodings; the split keeps those of its items."""
    directory, titles = titled_split(name, encoding)
    assert set(read_titles(directory / TITLES)) == set(load_split(directory).item_ids.tolist())
    rows = json.loads(recommend(checkpoint, directory, "--user", 1, "--format", "json").out)
    assert [row["title"] for row in rows] == [titles[row["item"]] for row in rows]


def test_the_three_formats_say_the_same(recommend, checkpoint, titled_split):
    directory, _ = titled_split("movies.csv", "utf-8")
    asked = (checkpoint, directory, "--user", 1, 2, "-n", 3)
    rows = json.loads(recommend(*asked, "--format", "json").out)
    assert list(rows[0]) == ["user", "rank", "item", "score", "title"]
    read = list(csv.DictReader(io.StringIO(recommend(*asked, "--format", "csv").out)))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == read
    heading, *lines = recommend(*asked).out.splitlines()
    assert heading.split() == list(rows[0])
    assert len({line.index("Am") for line in lines}) == 1
    for line, row in zip(lines, rows, strict=True):
        *numbers, title = line.split(maxsplit=4)
        assert numbers == [str(row["user"]), str(row["rank"]), str(row["item"]), f"{row['score']:.4f}"]
        assert title == row["title"]


def test_without_titles_there_is_no_column(recommend, split_dir, checkpoint):
    assert recommend(checkpoint, split_dir, "--user", 1).out.split()[:4] == ["user", "rank", "item", "score"]
    assert "title" not in recommend(checkpoint, split_dir, "--user", 1, "--format", "csv").out


def test_titles_from_a_file(recommend, split_dir, checkpoint, tmp_path):
    """An item that it has not stays without."""
    (first, _), *_ = reference(checkpoint, split_dir, 1, 1)
    path = tmp_path / "movies.dat"
    path.write_text(f"{first}::One (1999)::Drama\n")
    asked = (checkpoint, split_dir, "--user", 1, "-n", 2, "--movies", path)
    titles = [row["title"] for row in json.loads(recommend(*asked, "--format", "json").out)]
    assert titles == ["One (1999)", None]
    assert recommend(*asked).out.splitlines()[1].endswith("  One (1999)")


def test_converting_again_without_titles_removes_them(convert, ratings_file, titled_split):
    directory, _ = titled_split("movies.csv", "utf-8")
    assert convert(ratings_file, directory, "-n", 40).code == 0
    assert not (directory / TITLES).exists()


# --- bad input ---


def test_an_unknown_user(recommend, split_dir, checkpoint):
    assert "--user: " in (line := error_line(recommend(checkpoint, split_dir, "--user", 1, 4242)))
    assert line.endswith("no user 4242")


@pytest.mark.parametrize("flags", [["--user", "someone"], ["--user"], [], ["--user", "1", "-n", "0"]])
def test_bad_flags(recommend, split_dir, checkpoint, flags):
    error_line(recommend(checkpoint, split_dir, *flags))


def test_a_split_without_ids(recommend, split_dir, checkpoint, tmp_path):
    for name in CSV_FILES:
        shutil.copy(split_dir / name, tmp_path)
    assert "convert the ratings again" in error_line(recommend(checkpoint, tmp_path, "--user", 1))


def test_a_model_of_other_data(recommend, convert, split_dir, checkpoint, tmp_path):
    """Of other sizes it is an error, of the same sizes a warning."""
    rows = [f"{user},{item},3.5,{item}" for user in range(1, 4) for item in range(user, user + 25)]
    (tmp_path / "r.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows, ""]))
    assert convert(tmp_path / "r.csv", tmp_path / "other", "-n", 5).code == 0
    line = error_line(recommend(checkpoint, tmp_path / "other", "--user", 1))
    assert "60 users and 80 items" in line
    content = torch.load(checkpoint, weights_only=False) | {"data_digest": "sha256:0"}
    torch.save(content, tmp_path / "model.pth.tar")
    outcome = recommend(tmp_path / "model.pth.tar", split_dir, "--user", 1)
    assert outcome.code == 0
    assert outcome.err.startswith("neural-cf recommend: warning: ")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("", "no titles"),
        ("1::One::Drama\nx::Two::Drama\n", ":2: "),
        ("1::One\n\n2\n", ":3: "),
        ("1|\n", ":1: "),
        (f"1::One::Drama\n{'2' * 5000}::Two::Drama\n", ":2: "),
        (f"movieId,title,genres\n1,One,x\n2,{'x' * 200_000},x\n", ":3: "),
        (f"movieId,title,{'x' * 200_000}\n1,One,x\n", ":1: "),
    ],
)
def test_a_bad_movies_file(recommend, convert, ratings_file, split_dir, checkpoint, tmp_path, content, place):
    path = tmp_path / "movies.dat"
    path.write_text(content)
    line = error_line(recommend(checkpoint, split_dir, "--user", 1, "--movies", path))
    assert f"{path}{place}" in line or place in line
    shutil.copy(ratings_file, tmp_path)
    outcome = convert(tmp_path / "ratings.csv", tmp_path / "split")
    assert outcome.code == 2
    assert str(path) in outcome.err
    assert not (tmp_path / "split").exists()
