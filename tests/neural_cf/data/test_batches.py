"""Unseen items against brute force; training batches: complete, uniform, the same from the same seed, shared."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers_split import tiny_split
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_cf.data.batches import Batch, TrainingBatches, distinct, one_ahead
from neural_cf.data.negatives import UnseenItems
from neural_cf.runs.processes import Processes
from neural_cf.split import Split, load_split
from neural_cf.training.cuda_graph import tensors_of

# --- unseen items ---


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_unseen_items_are_those_of_brute_force(data):
    """Every rank of every user, with repeated pairs, users without pairs and users with every item."""
    nb_users, nb_items = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    pair = st.tuples(st.integers(0, nb_users - 1), st.integers(0, nb_items - 1))
    pairs = data.draw(st.lists(pair, min_size=1, max_size=50))
    users, items = (np.array(ids, dtype=np.uint8) for ids in zip(*pairs, strict=True))
    unseen = UnseenItems(users, items, nb_users, nb_items)
    expected = [
        [item for item in range(nb_items) if (user, item) not in set(pairs)] for user in range(nb_users)
    ]
    assert unseen.counts.tolist() == [len(row) for row in expected]
    asked = [(user, rank) for user in range(nb_users) for rank in range(len(expected[user]))]
    asked = data.draw(st.permutations(asked))
    if asked:
        asked_users, ranks = (torch.tensor(ids) for ids in zip(*asked, strict=True))
        assert unseen.item(asked_users, ranks).tolist() == [expected[user][rank] for user, rank in asked]


def test_unseen_items_do_not_overflow_the_types_that_pairs_come_in():
    """138,493 users by 26,744 items are more pairs than 32 bits count."""
    users = np.array([0, 138_492, 138_492], dtype=np.uint32)
    items = np.array([26_743, 0, 26_742], dtype=np.uint16)
    unseen = UnseenItems(users, items, 138_493, 26_744)
    assert unseen.item(torch.tensor([138_492] * 3), torch.tensor([0, 26_740, 26_741])).tolist() == [
        1,
        26_741,
        26_743,
    ]
    assert unseen.item(torch.tensor([0]), torch.tensor([26_742])).tolist() == [26_742]


# --- training batches ---


def real(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users, items and labels of what is in a batch not only to fill it up."""
    counts = batch.weights > 0
    return batch.users[counts], batch.items[counts], batch.labels[counts]


def drawn(batches: list[Batch]) -> list[tuple[int, int, float]]:
    """Every sample: user, item, label."""
    return [
        sample for batch in batches for sample in zip(*(part.tolist() for part in real(batch)), strict=True)
    ]


def equal(first: list[Batch], second: list[Batch]) -> bool:
    """The same batches in the same order."""
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(tensors_of(one), tensors_of(other), strict=True)
    )


@pytest.fixture(params=[None, 1, 7, 100, 1000])
def window(request, monkeypatch) -> int | None:
    """The number of positives shuffled together, mostly far below the data's."""
    if request.param:
        monkeypatch.setattr(TrainingBatches, "WINDOW", request.param)
    return request.param


@pytest.mark.parametrize(("batch_size", "negatives"), [(256, 4), (1, 2), (100_000, 4), (97, 1), (50, 4)])
def test_epoch_has_every_positive_once_and_negatives_beside_it(split_dir, window, batch_size, negatives):
    """Labels, numbers, types, and never a training item among the negatives; windows change nothing of it."""
    split = load_split(split_dir)
    if batch_size == 1:
        parts = {name: getattr(split, name)[:200] for name in ("train_users", "train_items")}
        split = Split(**vars(split) | parts)
    batches = TrainingBatches(split, batch_size, negatives, seed=3)
    epoch = list(batches.epoch(5))
    total = len(split.train_users) * (1 + negatives)
    for batch in epoch:
        types = tuple(part.dtype for part in batch[:4])
        assert types == (torch.int64, torch.int64, torch.float32, torch.float32)
        assert {part.shape for part in batch[:4]} == {(min(batch_size, total),)}
        assert batch.weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert len(batch.weights[batch.weights > 0].unique()) == 1
    assert batches.nb_samples == total
    assert len(epoch) == len(batches) == -(-total // batch_size)
    sizes = [len(real(batch)[0]) for batch in epoch]
    assert sizes == [batches.samples_in(number, number + 1) for number in range(len(epoch))]
    assert sum(sizes[1:]) == batches.samples_in(1, len(epoch))
    assert sizes == [batch_size] * (len(epoch) - 1) + [(total - 1) % batch_size + 1]

    pairs = list(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
    samples = drawn(epoch)
    assert {label for *_, label in samples} == {0.0, 1.0}
    assert sorted((user, item) for user, item, label in samples if label) == sorted(pairs)
    negative = [(user, item) for user, item, label in samples if not label]
    assert not set(negative) & set(pairs)
    assert all(0 <= item < split.nb_items for _, item in negative)
    of_user = Counter(split.train_users.tolist())
    assert Counter(user for user, _ in negative) == {user: negatives * n for user, n in of_user.items()}


def test_same_seed_and_epoch_give_the_same_batches(split_dir, window):
    """Whatever was drawn before, and from another object; another seed or epoch gives others."""
    split = load_split(split_dir)
    batches = TrainingBatches(split, 128, 2, seed=11)
    first = list(batches.epoch(0))
    second = list(batches.epoch(1))
    torch.manual_seed(5)
    torch.rand(3)
    assert equal(list(TrainingBatches(split, 128, 2, seed=11).epoch(1)), second)
    assert equal(list(batches.epoch(0)), first)
    assert not equal(first, second)
    assert not equal(list(TrainingBatches(split, 128, 2, seed=12).epoch(0)), first)
    assert not equal(list(TrainingBatches(split, 128, 2, seed=12).epoch(0)), second)
    # Fresh negatives in each epoch, not only another order.
    assert sorted(drawn(first)) != sorted(drawn(second))


def test_drawing_leaves_the_global_generator_alone(split_dir):
    """So that initial weights do not depend on when batches are drawn."""
    batches = TrainingBatches(load_split(split_dir), 128, 2, seed=11)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(batches.epoch(0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("skip", [0, 1, 5, "one less", "all"])
def test_skip_gives_exactly_the_later_batches(split_dir, window, skip):
    """As a resumed run needs them."""
    batches = TrainingBatches(load_split(split_dir), 200, 3, seed=2)
    whole = list(batches.epoch(4))
    skip = {"one less": len(whole) - 1, "all": len(whole)}.get(skip, skip)
    assert equal(list(batches.epoch(4, skip=skip)), whole[skip:])


def test_samples_are_shuffled(split_dir):
    """Labels and users are spread over the epoch, not in the order of the file."""
    split = load_split(split_dir)
    epoch = list(TrainingBatches(split, 256, 4, seed=0).epoch(0))
    for batch in epoch[:-1]:
        assert 20 < batch.labels.sum() < 85  # 51 expected, 6.4 deviation
        assert len(set(batch.users.tolist())) > 40  # of 60
    positives = [(user, item) for user, item, label in drawn(epoch) if label]
    assert positives != list(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
    # A negative need not follow its positive.
    order = [user for user, *_ in drawn(epoch)]
    repeats = sum(a == b for a, b in pairwise(order))
    assert repeats < len(order) / 10


def test_positives_are_spread_over_the_epoch_evenly_in_any_window(split_dir, window):
    """The first half of an epoch has about half of the first user's positives (fixed seeds)."""
    split = load_split(split_dir)
    batches = TrainingBatches(split, 100, 1, seed=1)
    busiest = np.bincount(split.train_users).argmax()
    count = np.sum(split.train_users == busiest)
    shares = []
    for epoch in range(10):
        samples = drawn(list(batches.epoch(epoch)))
        half = samples[: len(samples) // 2]
        shares.append(sum(user == busiest and label == 1 for user, _, label in half) / count)
    assert abs(np.mean(shares) - 0.5) < 5 * 0.5 / np.sqrt(10 * count)


def test_negatives_are_uniform_over_unseen_items(window):
    """Chi-square for each user of a tiny split, over many epochs with fixed seeds."""
    split = tiny_split()
    batches = TrainingBatches(split, 64, 4, seed=9)
    samples = [sample for epoch in range(300) for sample in drawn(list(batches.epoch(epoch)))]
    for user, seen in enumerate([{0, 1}, {5}, {1, 2, 3}]):
        counts = Counter(item for who, item, label in samples if who == user and not label)
        assert set(counts) == set(range(6)) - seen
        expected = 4 * 300 * len(seen) / (6 - len(seen))
        statistic = sum((count - expected) ** 2 / expected for count in counts.values())
        assert statistic < 25  # p < 0.0002 at up to 4 degrees of freedom


def test_no_item_is_left_out_where_a_user_has_one_unseen_item():
    """A single candidate is drawn every time."""
    split = tiny_split()
    parts = {
        "train_users": np.zeros(5, dtype=np.uint8),
        "train_items": np.array([5, 3, 1, 0, 2], dtype=np.uint8),
    }
    samples = drawn(list(TrainingBatches(Split(**vars(split) | parts), 7, 4, seed=1).epoch(0)))
    assert [item for _, item, label in samples if not label] == [4] * 20


def test_data_in_any_order_give_batches_of_the_same_kind():
    """Training pairs need not be sorted by user."""
    split = tiny_split()
    order = [4, 1, 0, 5, 3, 2]
    parts = {name: getattr(split, name)[order] for name in ("train_users", "train_items")}
    samples = drawn(list(TrainingBatches(Split(**vars(split) | parts), 8, 3, seed=1).epoch(0)))
    pairs = sorted(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
    assert sorted((user, item) for user, item, label in samples if label) == pairs
    assert not {(user, item) for user, item, label in samples if not label} & set(pairs)


# --- distinct ids ---


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(6, 9)
)
def test_distinct_ids_are_those_of_brute_force(batches, capacity):
    """Rows, where each sample's id is among them, and what fills up the rest."""
    ids = torch.tensor(batches)
    rows, slots, first = distinct(ids, capacity)
    for number, batch in enumerate(batches):
        expected = sorted(set(batch))
        padding = capacity - len(expected)
        assert rows[number].tolist() == expected + [expected[-1]] * padding
        assert slots[number].tolist() == [expected.index(value) for value in batch]
        assert first[number].tolist() == [*range(len(expected)), *[len(expected) - 1] * padding]


def test_batches_have_their_distinct_users_and_items(split_dir):
    """Of every batch, the last and smaller one too; no more rows than there are users or items."""
    split = load_split(split_dir)
    for batch in TrainingBatches(split, 256, 4, seed=1).epoch(0):
        for ids, found, count in (
            (batch.users, batch.distinct_users, split.nb_users),
            (batch.items, batch.distinct_items, split.nb_items),
        ):
            assert found.rows.shape == (min(256, count),)
            assert torch.equal(found.rows[found.slots], ids)
            assert sorted(set(ids.tolist())) == sorted(set(found.rows.tolist()))
            assert torch.equal(found.rows[found.first], found.rows)


# --- several processes ---


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_the_batches_that_one_would_have(split_dir, world_size):
    """Put together in the order of ranks they are the same, and so are the distinct ids of each process."""
    split = load_split(split_dir)
    alone = list(TrainingBatches(split, 100, 4, seed=1).epoch(2, skip=50))
    shares = [
        list(TrainingBatches(split, 100, 4, 1, "cpu", Processes(rank, world_size)).epoch(2, skip=50))
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        for number, part in enumerate(whole[:4]):
            assert torch.equal(torch.cat([share[number] for share in parts]), part)
        for kind in (4, 5):
            assert torch.equal(torch.cat([share[kind].slots for share in parts]), whole[kind].slots)
            for share in parts:
                assert torch.equal(share[kind].rows, whole[kind].rows)
                assert torch.equal(share[kind].first, whole[kind].first)


# --- one ahead ---


def test_one_ahead_is_map():
    """In order, each argument once, none for none."""
    assert list(one_ahead(lambda x: x * x, range(20))) == [x * x for x in range(20)]
    assert list(one_ahead(str, [])) == []


def test_one_ahead_computes_one_result_more_than_asked_for():
    """And no further, so that memory holds two."""
    computed = []
    results = one_ahead(computed.append, range(10))
    next(results)
    results.close()
    assert computed == [0, 1]


def test_one_ahead_passes_errors_on():
    """Where the result would have been."""
    results = one_ahead(lambda x: 1 // x, [1, 0, 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_batches_drawn_ahead_are_those_drawn_at_once(split_dir, monkeypatch):
    """The thread beside changes nothing but the time."""
    monkeypatch.setattr(TrainingBatches, "WINDOW", 100)
    batches = TrainingBatches(load_split(split_dir), 64, 4, seed=5)
    ahead = list(batches.epoch(0))
    monkeypatch.setattr("neural_cf.data.batches.one_ahead", map)
    assert equal(list(batches.epoch(0)), ahead)
