"""Training batches: every positive once per epoch with fresh negatives, shuffled, and drawn as whole tensors.

Shapes: U users, I items, P training positives, N samples in a batch, R distinct ids in a batch at most, W positives in
a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from neural_cf.data.negatives import UnseenItems
from neural_cf.runs.processes import Processes
from neural_cf.split import Split

Argument, Result = TypeVar("Argument"), TypeVar("Result")


class Distinct(NamedTuple):
    """The distinct ids of a batch, in tensors whose shapes do not depend on the number of distinct ids.

    Attributes:
        rows: (R,) int64 distinct ids, ascending; the greatest is repeated to fill the tensor.
        slots: (N,) int64, the first position of each sample's id in ``rows``.
        first: (R,) int64, the first position in ``rows`` of the id at each position.
    """

    rows: Tensor
    slots: Tensor
    first: Tensor


class Batch(NamedTuple):
    """One process's samples of a step; all batches of an epoch have the same shapes.

    Attributes:
        users: (N,) int64 row numbers of the users.
        items: (N,) int64 row numbers of the items.
        labels: (N,) float32, 1 for a positive and 0 for a negative.
        weights: (N,) float32, each sample's share of the step's mean loss over all processes; 0 for the samples that
            only fill the last batch of an epoch.
        distinct_users: The users of the step's samples in all processes, with the slots of this process's samples.
        distinct_items: The items of the step's samples in all processes, with the slots of this process's samples.
    """

    users: Tensor
    items: Tensor
    labels: Tensor
    weights: Tensor
    distinct_users: Distinct
    distinct_items: Distinct


def distinct(ids: Tensor, capacity: int) -> Distinct:
    """Return the distinct ids of each of several batches.

    Args:
        ids: (batches, N) int64 ids.
        capacity: R, at least the number of distinct ids in any batch.

    Returns:
        A ``Distinct`` for all batches: rows (batches, R), slots (batches, N) and first (batches, R).
    """
    ordered, order = ids.sort(dim=1)
    slot_in_order = torch.zeros_like(ids)
    torch.cumsum(ordered[:, 1:] != ordered[:, :-1], dim=1, out=slot_in_order[:, 1:])
    slots = torch.empty_like(ids).scatter_(1, order, slot_in_order)
    rows = ordered[:, -1:].repeat(1, capacity).scatter_(1, slot_in_order, ordered)
    first = torch.arange(capacity, device=ids.device).minimum(slot_in_order[:, -1:])
    return Distinct(rows, slots, first)


class TrainingBatches:
    """The training batches of every epoch: each positive once, with fresh negatives, shuffled.

    Positives are taken in a random order. Each is followed by ``negatives_per_positive`` negatives of its user,
    drawn uniformly from the items outside the user's training list, and the samples are shuffled in windows of about
    ``WINDOW`` positives, so that memory stays small at any number of ratings. Every window has a random stream of its
    own, so that an epoch can start at any batch.

    Args:
        split: The split whose training pairs are the positives.
        batch_size: The number of samples of a step, in all processes together.
        negatives_per_positive: The number of negatives drawn for each positive.
        seed: The seed. An epoch's batches depend on it and on the epoch's number alone.
        device: The device that batches are drawn on. On the CPU, a second thread draws the next window meanwhile.
        processes: The processes that share each batch; by default one. All of them draw the same batches, and each
            hands out its own samples.

    Attributes:
        batch_size: The number of samples of a step in all processes, at most those of an epoch.
    """

    # 1.3 M samples with the default 4 negatives: 70 MB, and hundreds of batches to spread them over.
    WINDOW = 1 << 18

    def __init__(
        self,
        split: Split,
        batch_size: int,
        negatives_per_positive: int,
        seed: int,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
    ):
        self._users = torch.from_numpy(split.train_users.astype(np.int32)).to(device)
        self._items = torch.from_numpy(split.train_items.astype(np.int32)).to(device)
        self._unseen = UnseenItems(
            split.train_users, split.train_items, split.nb_users, split.nb_items, device
        )
        self._negatives = negatives_per_positive
        self.batch_size = batch_size = min(batch_size, self.nb_samples)
        self._rows = (min(batch_size, split.nb_users), min(batch_size, split.nb_items))
        self._seed = seed
        self._device = torch.device(device)
        own = (processes or Processes()).share(batch_size)
        self._own = slice(own.start, own.stop)
        # The number of positives is such that a window's samples make whole batches.
        unit = batch_size // gcd(batch_size, 1 + negatives_per_positive)
        self._positives_per_window = -(-self.WINDOW // unit) * unit

    @property
    def nb_samples(self) -> int:
        """The number of samples in an epoch, positives and negatives."""
        return len(self._users) * (1 + self._negatives)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-self.nb_samples // self.batch_size)

    def samples_in(self, start: int, stop: int) -> int:
        """Return the number of samples in batches ``start`` .. ``stop`` - 1; an epoch's last batch may have fewer."""
        return min(stop * self.batch_size, self.nb_samples) - start * self.batch_size

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, without its first ``skip`` ones."""
        order = torch.randperm(len(self._users), generator=self._generator(epoch, 0), device=self._device)
        positives = order.split(self._positives_per_window)
        batches_per_window = self._positives_per_window * (1 + self._negatives) // self.batch_size
        first, skip = divmod(skip, batches_per_window)

        def draw(window: int) -> list[Batch]:
            return self._window(positives[window], self._generator(epoch, 1 + window))

        windows = range(first, len(positives))
        for batches in one_ahead(draw, windows) if self._device.type == "cpu" else map(draw, windows):
            yield from batches[skip:]
            skip = 0

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """Return a generator for one of an epoch's random streams."""
        # NumPy's seed hashing keeps the streams apart; torch takes 63 bits of the hash.
        state = np.random.SeedSequence([self._seed, epoch, stream]).generate_state(1, np.uint64)[0]
        return torch.Generator(self._device).manual_seed(int(state >> 1))

    def _window(self, positives: Tensor, generator: torch.Generator) -> list[Batch]:
        """Return the batches of a window: (W,) positives, given by their index, and fresh negatives, shuffled."""
        # In this order, users' lists of items are searched one after the other and stay in the cache.
        positives = positives.sort()[0]
        users, items = self._users[positives].long(), self._items[positives].long()
        negative_users = users.repeat_interleave(self._negatives)
        # The remainder of 62 random bits is uniform to within I / 2^62.
        draws = torch.randint(1 << 62, negative_users.shape, generator=generator, device=self._device)
        negative_items = self._unseen.item(negative_users, draws % self._unseen.counts[negative_users])
        users, items = torch.cat([users, negative_users]), torch.cat([items, negative_items])
        order = torch.randperm(len(users), generator=generator, device=self._device)
        return self._batches(users[order], items[order], (order < len(positives)).float())

    def _batches(self, users: Tensor, items: Tensor, labels: Tensor) -> list[Batch]:
        """Cut samples into batches; repeat the last sample to fill the last batch."""
        count, size = len(users), self.batch_size
        whole = count // size
        nb_batches = -(-count // size)
        if nb_batches > whole:
            padding = nb_batches * size - count
            users, items, labels = (
                torch.cat([part, part[-1:].expand(padding)]) for part in (users, items, labels)
            )
        weights = torch.full((nb_batches, size), 1 / size, device=self._device)
        if nb_batches > whole:
            rest = count - whole * size
            weights[-1] = 0
            weights[-1, :rest] = 1 / rest
        users, items, labels = (part.view(nb_batches, size) for part in (users, items, labels))
        distinct_users, distinct_items = distinct(users, self._rows[0]), distinct(items, self._rows[1])

        def own(ids: Distinct, batch: int) -> Distinct:
            return Distinct(ids.rows[batch], ids.slots[batch, self._own], ids.first[batch])

        return [
            Batch(
                *(part[i, self._own] for part in (users, items, labels, weights)),
                own(distinct_users, i),
                own(distinct_items, i),
            )
            for i in range(nb_batches)
        ]


def one_ahead(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """Yield ``map(function, arguments)``, computing each next result in a thread while the last one is in use.

    The thread computes on one core, so that it takes little from the main thread's work.
    """
    # In PyTorch, the number of threads to compute with is a setting of each thread.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        ahead = None
        for argument in arguments:
            computed, ahead = ahead, thread.submit(function, argument)
            if computed is not None:
                yield computed.result()
        if ahead is not None:
            yield ahead.result()
