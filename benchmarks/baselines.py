"""Evaluate simple recommenders on the same split and in the same way as NeuMF: popularity, item-kNN and ALS.

    python -m neural_cf baselines SPLIT [--methods popularity knn als] [-k 10] [--json] ...

Item-kNN and implicit-feedback ALS come from the package implicit.

Shapes: U users, I items, B users in a block, C candidates of each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distiller.system.cli import ArgumentParser, InputError
from distiller.system.tables import markdown_table
from neural_cf.ranking.metrics import Metrics, metrics_of_ranks
from neural_cf.ranking.places import rank_test_items
from neural_cf.ranking.scorers import Scorer
from neural_cf.split import Split, described, load_split

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Scores computed at once, users times items: 16 MB of float64, whatever the size of the data.
CELLS_AT_ONCE = 1 << 21
# Far beyond any use, but small enough that memory does not run out before an error can be reported.
MAX_SIZE, MAX_FACTORS, MAX_SEED = (1 << 31) - 1, 1 << 16, (1 << 63) - 1
PROG = "neural-cf baselines"
SIMILARITIES = ("cosine", "tfidf", "bm25")


class Method(Protocol):
    """A recommender: a dataclass whose fields are its settings."""

    def fit(self, split: Split) -> Scorer:
        """Learn from the training pairs and return a scorer with higher scores for likelier items."""


@dataclass(frozen=True)
class Popularity:
    """The recommender that scores an item, for every user, by the number of its training pairs."""

    def fit(self, split: Split) -> Scorer:
        """Count the training pairs of each item."""
        counts = torch.from_numpy(np.bincount(split.train_items, minlength=split.nb_items)).double()
        return lambda users, items: counts[items]


@dataclass(frozen=True)
class ItemKNN:
    """Item-based nearest neighbours: an item's score is the sum of its similarities to the user's items.

    The method is that of Sarwar et al. 2001, section 3.

    Attributes:
        similarity: The similarity between items as vectors over users, one of ``SIMILARITIES``.
        neighbours: The number of most similar items that each item keeps. By cosine and tfidf, they include the item
            itself.
    """

    # Chosen in the same way as ALS's: within 1.5 points of the best HR@10 with 99 negatives, and 0.5 with 999.
    similarity: str = "tfidf"
    neighbours: int = 200

    def fit(self, split: Split) -> Scorer:
        """Compute the similarities between items."""
        from implicit.nearest_neighbours import ItemItemRecommender

        rated = interactions(split)
        model = ItemItemRecommender(self.neighbours)
        model.fit(weighted_users(rated, self.similarity))
        similarity = model.similarity  # (I, I) float64, whose row i has the neighbours of item i
        return RowScorer(
            lambda users: torch.from_numpy((rated[users.numpy()] @ similarity).toarray()), split.nb_items
        )


@dataclass(frozen=True)
class ALS:
    """Matrix factorization of implicit feedback by alternating least squares (ALS).

    The method is that of Hu, Koren and Volinsky 2008, section 4.

    Attributes:
        factors: The number of factors of a user and of an item.
        iterations: The number of iterations, each of which solves for users and then for items.
        regularization: The weight of the squared factors of each user and each item.
        alpha: The weight of a training pair's squared error; that of any other pair has weight 1.
        seed: The seed of the initial factors.
    """

    factors: int = 64  # as in NeuMF's recipe; with 128, HR@10 is 1.6 points lower against 99 negatives
    iterations: int = 15  # 30 iterations are the same within 0.15 points
    # Chosen on ml-1m without its test items, by HR@10 and NDCG@10 of each user's second to last item. Against 99
    # negatives, these metrics are 3.8 and 2.0 points above those of implicit's own defaults, 0.01 and 1.
    regularization: float = 30.0
    alpha: float = 4.0
    seed: int = 0  # fixed, so that a table can be reproduced

    def fit(self, split: Split) -> Scorer:
        """Factorize the matrix of training pairs.

        Raises:
            InputError: a linear system has no solution with these settings.
        """
        from implicit.cpu.als import AlternatingLeastSquares
        from implicit.recommender_base import ModelFitError
        from threadpoolctl import threadpool_limits

        settings = asdict(self)
        seed = settings.pop("seed")
        # Each of implicit's threads solves small systems, and would wait for threads that BLAS starts for each system.
        # NumPy's warnings of overflow are suppressed, because implicit reports it as a system without a solution.
        with threadpool_limits(1, "blas"), np.errstate(over="ignore", invalid="ignore"):
            model = AlternatingLeastSquares(**settings, random_state=seed)
            try:
                model.fit(interactions(split))
            except ModelFitError as error:
                raise InputError(f"--alpha, --regularization: no solution with these: {error}") from error
        of_users, of_items = (torch.from_numpy(x) for x in (model.user_factors, model.item_factors))
        return RowScorer(lambda users: of_users[users] @ of_items.T, split.nb_items)


METHODS: dict[str, type[Method]] = {"popularity": Popularity, "knn": ItemKNN, "als": ALS}


def interactions(split: Split) -> csr_matrix:
    """Return the matrix (U, I) float32 with 1 for each training pair."""
    from scipy.sparse import csr_matrix

    ones = np.ones(len(split.train_users), dtype=np.float32)
    pairs = split.train_users.astype(np.int32), split.train_items.astype(np.int32)
    matrix = csr_matrix((ones, pairs), shape=(split.nb_users, split.nb_items))
    matrix.data.fill(1)  # Pairs that a ratings file repeats have been added up.
    return matrix


def weighted_users(rated: csr_matrix, similarity: str) -> csr_matrix:
    """Return a matrix (U, I) whose columns are items, with their similarities as inner products.

    The weights are those of implicit's CosineRecommender, TFIDFRecommender and BM25Recommender. These classes are not
    used, because they pass the weights on in a form that their base class warns about.
    """
    from implicit.nearest_neighbours import bm25_weight, normalize, tfidf_weight

    weigh = {
        "cosine": normalize,
        "tfidf": lambda items: normalize(tfidf_weight(items)),
        "bm25": lambda items: bm25_weight(items, K1=1.2, B=0.75),
    }
    return weigh[similarity](rated.T).T.tocsr()


class RowScorer:
    """A scorer that scores all items for a few users at a time and picks the scores of the candidates.

    Args:
        rows: A function from users (B,) int64 to the scores (B, I) of all items.
        nb_items: I.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor], nb_items: int):
        self._rows, self._users_at_once = rows, max(1, CELLS_AT_ONCE // nb_items)

    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores (B, C) of items (B, C) int64 for users (B,) int64."""
        parts = zip(users.split(self._users_at_once), items.split(self._users_at_once), strict=True)
        return torch.cat([self._rows(of_part).gather(1, candidates) for of_part, candidates in parts])


@dataclass(frozen=True)
class Figures:
    """The figures of a method on a split.

    Attributes:
        method: The name of the method in ``METHODS``.
        settings: The settings of the method.
        metrics: The metrics at each k.
        fit_seconds: Seconds of learning.
        evaluation_seconds: Seconds of ranking the candidates of all users.
    """

    method: str
    settings: dict[str, Any]
    metrics: list[Metrics]
    fit_seconds: float
    evaluation_seconds: float


def measure(name: str, method: Method, split: Split, ks: list[int]) -> Figures:
    """Fit a method to a split, rank the test items and return the figures."""
    start = time.perf_counter()
    scorer = method.fit(split)
    fitted = time.perf_counter()
    ranks = rank_test_items(scorer, split, ks[0])
    done = time.perf_counter()
    return Figures(
        name, asdict(method), [metrics_of_ranks(ranks, k) for k in ks], fitted - start, done - fitted
    )


def text_of(figures: list[Figures], split: Split) -> str:
    """Return the figures as a table in Markdown, with a line on the split."""
    names = [f"{name}@{metrics.k}" for metrics in figures[0].metrics for name in ("HR", "NDCG")]
    rows = []
    for row in figures:
        settings = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        percent = [f"{100 * x:.2f}" for metrics in row.metrics for x in (metrics.hr, metrics.ndcg)]
        seconds = (f"{row.fit_seconds:.1f}", f"{row.evaluation_seconds:.1f}")
        rows.append((row.method, settings, *percent, *seconds))
    table = markdown_table(("Method", "Settings", *names, "fit, s", "evaluation, s"), rows)
    return f"{table}\n\n{described(split)} In percent."


def json_of(figures: list[Figures], split: Split) -> str:
    """Return the figures as JSON, with a line on the split."""
    return json.dumps({"methods": [asdict(row) for row in figures], "protocol": described(split)}, indent=2)


def build_parser() -> ArgumentParser:
    """Return the parser of the command line. Only settings that are given become attributes of its result."""
    parser = ArgumentParser(prog=PROG, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("data", type=Path, help="directory of the split, written by convert.py")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"which of {', '.join(METHODS)} (default: all)",
    )
    add(
        "-k",
        "--topk",
        type=int,
        nargs="+",
        default=[10],
        metavar="K",
        help="of HR@K and NDCG@K (default: 10)",
    )
    add("--json", action="store_true", help="print figures as JSON")
    add = parser.add_argument_group("Item-kNN").add_argument
    text = {"default": argparse.SUPPRESS}
    number = {"type": int, "metavar": "N"} | text
    real = {"type": float, "metavar": "X"} | text
    add("--similarity", choices=SIMILARITIES, **text, help=f"between items (default: {ItemKNN.similarity})")
    add("--neighbours", **number, help=f"that each item keeps (default: {ItemKNN.neighbours})")
    add = parser.add_argument_group("ALS").add_argument
    add("--factors", **number, help=f"of a user and an item (default: {ALS.factors})")
    add("--iterations", **number, help=f"(default: {ALS.iterations})")
    add("--regularization", **real, help=f"of squared factors (default: {ALS.regularization})")
    add("--alpha", **real, help=f"weight of a training pair; others weigh 1 (default: {ALS.alpha})")
    add("-s", "--seed", **number, help=f"of initial factors (default: {ALS.seed})")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: one of them is out of its range.
    """
    args = build_parser().parse_args(argv)
    given = vars(args)
    for flag, values, least, greatest in (
        ("-k/--topk", args.topk, 1, MAX_SIZE),
        ("--neighbours", [given.get("neighbours")], 1, MAX_SIZE),
        ("--factors", [given.get("factors")], 1, MAX_FACTORS),
        ("--iterations", [given.get("iterations")], 1, MAX_SIZE),
        ("-s/--seed", [given.get("seed")], 0, MAX_SEED),
    ):
        for value in values:
            if value is not None and not least <= value <= greatest:
                raise InputError(f"{flag} must be from {least} to {greatest}, not {value}")
    if len(set(args.topk)) < len(args.topk):
        raise InputError(f"-k/--topk: {' '.join(map(str, args.topk))} has a number twice")
    for name in ("regularization", "alpha"):
        if not 0 < given.get(name, 1.0) < math.inf:
            raise InputError(f"--{name} must be above 0, not {given[name]}")
    return args


def chosen_methods(args: argparse.Namespace) -> dict[str, Method]:
    """Return the methods asked for, by name, with the settings given.

    Raises:
        InputError: a setting belongs to a method that is left out, or the package of a method is not installed.
    """
    methods, used = {}, set()
    for name in dict.fromkeys(args.methods):
        settings = {field.name for field in fields(METHODS[name])} & vars(args).keys()
        methods[name] = METHODS[name](**{setting: getattr(args, setting) for setting in settings})
        used |= settings
    for name, method in METHODS.items():
        for field in fields(method):
            if field.name in vars(args).keys() - used:
                raise InputError(f"--{field.name} is for {name}, which --methods leaves out")
    needing = [name for name in methods if name != "popularity"]
    if needing and importlib.util.find_spec("implicit") is None:
        raise InputError(f"--methods: {needing[0]} is computed by the package implicit: pip install implicit")
    return methods


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    args = parse_args(argv)
    methods = chosen_methods(args)
    split = load_split(args.data)
    if max(args.topk) > split.nb_candidates:
        raise InputError(f"-k/--topk: {max(args.topk)} of a list of only {split.nb_candidates} candidates")
    figures = [measure(name, method, split, args.topk) for name, method in methods.items()]
    print((json_of if args.json else text_of)(figures, split))
