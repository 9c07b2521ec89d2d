"""Write a synthetic ratings file, in the format of ml-20m, of any size up to and beyond it.

    neural-cf synthetic OUT [--users N] [--items N] [--ratings N] [--seed S]

The file has the properties of real ratings that matter to a recommender: a few items get many of the ratings, a few
users give many times the ratings of the others, tastes can be learned, and times come in bursts with ties. The items
that a user rates are a weighted sample without replacement, in which the weight of item i is

    popularity[i] * exp(<taste of the user, trait of item i>)

The sample of k items is the first k arrivals of a race in which item i's arrival time is exponentially distributed with
its weight as the rate. This is exact at any density (Efraimidis and Spirakis 2006, "Weighted random sampling with a
reservoir"). One rater of each item is drawn beforehand, so that every item is rated.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from distiller.system.files import atomic_write
from neural_cf.runs.progress_bar import progress_bar

MIN_RATINGS_PER_USER = 20  # as in every MovieLens set; a conversion drops users with fewer
MIN_UNRATED_PER_USER = 2  # so that a conversion has negatives to draw from, for every user
MAX_COUNT = 10_000_000  # users or items: more than in any public set, and still only 40 MB for a user's row of weights
MAX_SEED = 2**32 - 1  # the limit of numpy.random.RandomState: a seed valid here is valid for all commands
# Activity, popularity and tastes were fitted together to ml-1m. In a synthetic set of its size (and in ml-1m itself),
# the median user has 89 ratings (96), the top tenth of the items has 37 % of the ratings (44 %), and the hit rate HR@10
# against 99 negatives is 0.49 by popularity (0.43) and 0.73 by a truncated SVD of rank 16 (0.68). In a set of ml-20m's
# size, the top tenth has 81 % of the ratings.
ACTIVITY_SIGMA = 1.2  # standard deviation of the log of a user's number of ratings above the minimum
POPULARITY_EXPONENT = 2.0  # popularity = (rank + head) ** -exponent, the law of Zipf and Mandelbrot
# The head in units of the mean number of ratings of a user. Nobody rates an item twice, so that everybody would rate
# the items of a head much shorter than a user's list. With 2, a quarter of the users rate the first item; in ml-1m 57 %
# do.
POPULARITY_HEAD = 2.0
TASTE_RANK = 8  # directions of taste: few enough for the smallest NeuMF that is in use to learn
TASTE_STRENGTH = 2.0  # standard deviation of an item's log weight over the users
# Stars from affinity. Since users rate what they like, at affinities far above 0, these give about ml-20m's mean of 3.5
# and standard deviation of 1.05.
RATING_OFFSET, RATING_PER_AFFINITY, RATING_NOISE = 2.6, 0.35, 0.85
# As text, because Arrow writes the float 4.0 as 4.
RATING_TEXTS = pa.array([str(half_steps / 2) for half_steps in range(1, 11)])
FIRST_DAY_S, LAST_DAY_S = 789_652_009, 1_427_784_002  # ml-20m's first and last timestamps: 1995-01 to 2015-03
# Seconds from one rating of a user to the next, fitted to ml-100k: none (a tie), a step in a burst, a pause between
# bursts.
GAP_SHARES = (0.50, 0.48, 0.02)
GAP_MEANS_S = np.array([0.0, 60.0, 12 * 86_400.0])
# Users are drawn in blocks of about this many weights, 8 MB in a matrix. Half or twice as many are no faster.
BLOCK_WEIGHTS = 2**21
# Written as bytes, because the oldest supported pyarrow cannot omit the quotes around names.
HEADER = b"userId,movieId,rating,timestamp\n"
CSV_OPTIONS = pa.csv.WriteOptions(include_header=False, quoting_style="none")


class Market(NamedTuple):
    """The properties of U users and I items from which ratings are drawn; both are numbered from 0.

    In the file, users and items are numbered from 1.

    Attributes:
        activity: (U,) int64, the number of ratings of each user.
        first_raters: (I,) int64, for each item the user who is certain to rate it.
        tastes: (U, TASTE_RANK) float32, the taste vectors of the users.
        traits: (TASTE_RANK, I) float32, the trait vectors of the items, each of length 1.
        log_popularity: (I,) float32, the logs of the items' popularities, up to a constant.
    """

    activity: np.ndarray
    first_raters: np.ndarray
    tastes: np.ndarray
    traits: np.ndarray
    log_popularity: np.ndarray


def draw_market(num_users: int, num_items: int, num_ratings: int, rng: np.random.Generator) -> Market:
    """Draw the users and the items; ``check_counts`` must have accepted the three numbers."""
    activity = draw_activity(num_users, num_items, num_ratings, rng)
    tastes = TASTE_STRENGTH * rng.standard_normal((num_users, TASTE_RANK), dtype=np.float32)
    traits = rng.standard_normal((TASTE_RANK, num_items), dtype=np.float32)
    traits /= np.linalg.norm(traits, axis=0)
    ranks = 1 + rng.permutation(num_items)
    head = POPULARITY_HEAD * num_ratings / num_users
    log_popularity = -POPULARITY_EXPONENT * np.log(ranks + head).astype(np.float32)
    return Market(activity, draw_first_raters(activity, num_items, rng), tastes, traits, log_popularity)


def draw_activity(num_users: int, num_items: int, num_ratings: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the users' numbers of ratings: the minimum, and a lognormal share of the rest, up to the item limit.

    Returns:
        (num_users,) int64 numbers that sum to ``num_ratings``, each at least ``MIN_RATINGS_PER_USER`` and at most
        ``num_items - MIN_UNRATED_PER_USER``.
    """
    shares = np.exp(ACTIVITY_SIGMA * rng.standard_normal(num_users))
    room = num_items - MIN_UNRATED_PER_USER - MIN_RATINGS_PER_USER
    target = num_ratings - MIN_RATINGS_PER_USER * num_users
    low, high = 0.0, room / shares.min()
    for _ in range(64):  # halvings, after which the total is wrong by far less than one rating
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * shares, room).sum() <= target else (low, middle)
    extra = np.minimum(low * shares, room).astype(np.int64)
    # Rounding down took less than one rating from each user with room left, so that there are enough such users.
    extra[rng.choice(np.flatnonzero(extra < room), target - extra.sum(), replace=False)] += 1
    return MIN_RATINGS_PER_USER + extra


def draw_first_raters(activity: np.ndarray, num_items: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a first rater of each item, so that every item is rated, within the users' activity.

    Returns:
        (num_items,) int64 numbers of the users.
    """
    slots = rng.choice(activity.sum(), num_items, replace=False)
    return np.searchsorted(np.cumsum(activity), slots, side="right")


def draw_items(market: Market, start: int, stop: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the items that users ``start`` .. ``stop`` - 1 rate, each user's in random order.

    Returns:
        (sum of their activity,) int64 items, user after user; no item twice for one user.
    """
    # Not by @: on a busy machine the threads of BLAS wait for one another, which makes it three times as slow.
    arrivals = np.einsum("ur,ri->ui", market.tastes[start:stop], market.traits)
    arrivals += market.log_popularity
    np.exp(np.negative(arrivals, out=arrivals), out=arrivals)
    arrivals *= rng.standard_exponential(arrivals.shape, dtype=np.float32)
    given = np.flatnonzero((start <= market.first_raters) & (market.first_raters < stop))
    arrivals[market.first_raters[given] - start, given] = -1.0  # before every other arrival
    return np.concatenate(
        [
            rng.permutation(np.argpartition(row, count)[:count])  # a partition leaves heavier items in front
            for row, count in zip(arrivals, market.activity[start:stop], strict=True)
        ]
    )


def draw_rating_codes(affinities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw ratings that rise with the users' affinities to the items, (n,) float32.

    Returns:
        (n,) int64 indices into ``RATING_TEXTS``, 0 .. 9 for 0.5 to 5.0 stars.
    """
    stars = (
        RATING_OFFSET + RATING_PER_AFFINITY * affinities + RATING_NOISE * rng.standard_normal(len(affinities))
    )
    return np.clip(np.rint(2 * stars).astype(np.int64) - 1, 0, len(RATING_TEXTS) - 1)


def draw_times(activity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the times of all ratings, which start at a random time for each user and never decrease.

    Returns:
        (sum of activity,) int64 times, in seconds since 1970.
    """
    means_s = rng.choice(GAP_MEANS_S, activity.sum(), p=GAP_SHARES)
    clock = np.cumsum((means_s * rng.standard_exponential(len(means_s))).astype(np.int64))
    first_rows = np.cumsum(activity) - activity
    starts = rng.integers(FIRST_DAY_S, LAST_DAY_S, len(activity))
    return clock + np.repeat(starts - clock[first_rows], activity)


def draw_block(market: Market, start: int, stop: int, rng: np.random.Generator) -> pa.Table:
    """Draw the file's rows for users ``start`` .. ``stop`` - 1."""
    activity = market.activity[start:stop]
    users = np.repeat(np.arange(start, stop), activity)
    items = draw_items(market, start, stop, rng)
    affinities = np.einsum("nr,rn->n", market.tastes[users], market.traits[:, items])
    ratings = RATING_TEXTS.take(pa.array(draw_rating_codes(affinities, rng)))
    columns = [pa.array(1 + users), pa.array(1 + items), ratings, pa.array(draw_times(activity, rng))]
    return pa.table(columns, names=["userId", "movieId", "rating", "timestamp"])


def write_ratings(path: Path, num_users: int, num_items: int, num_ratings: int, seed: int) -> None:
    """Write a synthetic ratings file; the same arguments give the same bytes.

    Args:
        path: The file.
        num_users: The number of users.
        num_items: The number of items.
        num_ratings: The number of ratings.
        seed: The seed of all draws.

    Raises:
        OSError: the file cannot be written; the error names it, and what was there before is still there.
    """
    rng = np.random.default_rng(seed)
    market = draw_market(num_users, num_items, num_ratings, rng)
    block = max(1, BLOCK_WEIGHTS // num_items)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(HEADER)
        starts = range(0, num_users, block)
        with progress_bar(len(starts), path.name, "block") as bar:
            for start in starts:
                table = draw_block(market, start, min(start + block, num_users), rng)
                pa.csv.write_csv(table, file, CSV_OPTIONS)
                bar.update()
