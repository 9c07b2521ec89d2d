"""Adam that updates only the embedding rows of a batch and equals dense Adam up to float32 rounding.

Dense Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1) moves every row of an embedding table in every step, because
the momentum of a row decays slowly. Here a row waits until a batch touches it. All the steps that it skipped are then
applied at once, in closed form, so that the cost of a step grows with the batch and not with the tables.

The skipped steps in closed form. A row was last updated in step t0, with moments m and v, and s = sqrt(v). It then
skips K steps, in which its gradient is zero. Dense Adam's step t0 + d moves the row by

    -c_d m / (s r_d + eps),   c_d = lr beta1^d / (1 - beta1^(t0+d)),   r_d = sqrt(beta2^d / (1 - beta2^(t0+d))).

c_d falls by a factor of beta1 a step, while r_d hardly changes. Let C_i be the sum of c_d r_d^i over d = 1..K. The
second-order Taylor expansion of 1 / (s r + eps) around r = rho, where the first-order term vanishes, gives the sum of
all K movements as -delta, with

    delta = m C_0 / D (1 + (s / D)^2 (C_2 / C_0 - rho^2)),   rho = C_1 / C_0,   D = s rho + eps.

The moments become beta1^K m and beta2^K v.

Each C_i is a difference of two table look-ups. With q_i = beta1 beta2^(i/2) and
h_i(t) = lr / (1 - beta1^t) / (1 - beta2^t)^(i/2),

    G_i(t) = sum over d >= 1 of q_i^d h_i(t + d),   C_i = G_i(t0) - q_i^K G_i(t0 + K).

``coefficients`` tabulates G_i, ``skipped_steps`` looks up C_i, and ``caught_up`` subtracts delta.

Shapes: n rows in a table, W its width, R rows and N samples in a batch, T steps with coefficients of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neural_cf.data.batches import Distinct

# The expansion needs bias corrections that change slowly, so the first steps are dense. Relative to the whole movement,
# its third-order term falls from a half in the first steps to 4.5e-7 after this many, which is four roundings of
# float32, and to 2e-7 in the end (for Adam's usual betas).
DENSE_STEPS = 1500
ROWS_PER_BLOCK = 1 << 14  # that ``flush`` brings up to date at once: 38 MB for the published model


class Table(NamedTuple):
    """Embedding tables with the same ids and their moments, side by side: a row is one piece of memory.

    Attributes:
        values: (n, 3, W) in the parameters' dtype: the weights, the first moments (averages of the gradient)
            and the second moments (of the squared gradient).
        last: (n,) int64, the step in which each row was last updated.
    """

    values: Tensor
    last: Tensor


class Fetched(NamedTuple):
    """The rows of a table that a batch touches, brought up to date.

    Attributes:
        ids: The row numbers.
        weights: (R, W) in the parameters' dtype, the weights of the rows.
        decays: (R, 2) in the parameters' dtype, the factors beta1^K and beta2^K by which the skipped steps shrink the
            two moments.
        embeddings: (N, W) in the parameters' dtype, the row of each sample.
    """

    ids: Distinct
    weights: Tensor
    decays: Tensor
    embeddings: Tensor


class Coefficients(NamedTuple):
    """Look-up tables, in float64, for a constant learning rate. Row t of a table belongs to step t.

    Attributes:
        sums: (T, 3), G_0(t), G_1(t) and G_2(t).
        corrections: (T, 2), the bias corrections of the step after t: lr / (1 - beta1^(t+1)) and sqrt(1 - beta2^(t+1)).
        log_q: (3,), the logarithms of q_0, q_1 and q_2.
    """

    sums: Tensor
    corrections: Tensor
    log_q: Tensor


class Hyperparameters(NamedTuple):
    """The hyperparameters of Adam with which the skipped steps of lagging rows must be computed.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
    """

    lr: float
    betas: tuple[float, float]
    eps: float


def coefficients(lr: float, betas: tuple[float, float]) -> Coefficients:
    """Return the coefficients for a constant learning rate.

    Later steps than those of the last row have the coefficients of the last row.

    Raises:
        ValueError: the betas are not between 0 and 1.
    """
    beta1, beta2 = betas
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"betas {betas} are not between 0 and 1")
    # Where beta^t is below half of float64's rounding error, 1 - beta^t is 1 and nothing changes any more.
    negligible = math.log(2**-54)
    steps = math.ceil(negligible / math.log(max(beta1, beta2)))
    tail = math.ceil(negligible / math.log(beta1))
    t = torch.arange(1, steps + tail + 1, dtype=torch.float64)
    step_sizes, roots = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
    log_q = torch.tensor([math.log(beta1) + i / 2 * math.log(beta2) for i in range(3)], dtype=torch.float64)
    powers = torch.exp(log_q[:, None] * torch.arange(1, tail + 1))
    h = torch.stack([step_sizes, step_sizes / roots, step_sizes / roots.square()])
    sums = F.conv1d(h[None], powers[:, None], groups=3)[0, :, :steps].T
    corrections = torch.stack([step_sizes, roots], dim=1)[:steps]
    return Coefficients(sums.contiguous(), corrections.contiguous(), log_q)


def skipped_steps(table: Table, rows: Tensor, clock: Tensor, known: Coefficients) -> tuple[Tensor, Tensor]:
    """Return the sums over the steps that rows have skipped, up to and including step ``clock``.

    Args:
        table: The table of the rows.
        rows: (R,) int64, the row numbers.
        clock: (1,) int64, the number of the last step taken.
        known: The coefficients for the optimizer's learning rate.

    Returns:
        (R, 3), the expansion's C_0, rho and C_2 / C_0 - rho^2; and (R, 2), the decays beta1^K and beta2^K of the
        moments. Both are in the parameters' dtype.
    """
    since = table.last[rows]
    skipped = clock - since
    end = len(known.sums) - 1
    powers = torch.exp(skipped[:, None] * known.log_q)  # in float64, because the difference below cancels
    sums = known.sums[since.clamp(max=end)] - powers * known.sums[clock.clamp(max=end)]
    none = sums[:, 0] == 0  # no steps skipped, or a learning rate of zero
    total = torch.where(none, 1.0, sums[:, 0])
    mean = torch.where(none, 1.0, sums[:, 1] / total)
    variance = sums[:, 2] / total - mean.square()
    expansion = torch.stack([torch.where(none, 0.0, total), mean, torch.where(none, 0.0, variance)], dim=1)
    log_beta2 = known.log_q[2] - known.log_q[0]
    decays = torch.stack([powers[:, 0], torch.exp(skipped * log_beta2)], dim=1)
    return expansion.to(table.values.dtype), decays.to(table.values.dtype)


def caught_up(table: Table, rows: Tensor, expansion: Tensor, eps: float) -> Tensor:
    """Return the weights (R, W) of rows after their skipped steps.

    ``expansion`` is (R, 3) and comes from ``skipped_steps``.
    """
    total, mean, variance = (expansion[:, i : i + 1] for i in range(3))
    weights, first, second = (table.values[rows, i] for i in range(3))
    root = second.sqrt()
    inverse = 1 / (root * mean + eps)
    return weights - first * (total * inverse) * (1 + (root * inverse).square() * variance)


def fetch_rows(
    tables: Sequence[Table],
    batches: Sequence[Distinct],
    clock: Tensor,
    known: Coefficients,
    eps: float,
) -> list[Fetched]:
    """Return the rows of each table that a batch touches, brought up to date. The tables are not changed."""
    fetched = []
    for table, ids in zip(tables, batches, strict=True):
        expansion, decays = skipped_steps(table, ids.rows, clock, known)
        weights = caught_up(table, ids.rows, expansion, eps)
        fetched.append(Fetched(ids, weights, decays, weights[ids.slots]))
    return fetched


def update_rows(
    tables: Sequence[Table],
    fetched: Sequence[Fetched],
    gradients: Sequence[Tensor],
    clock: Tensor,
    known: Coefficients,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take Adam's step number ``clock`` + 1 on a batch's rows, write them back and advance the clock.

    Args:
        tables: The tables, which are changed in place.
        fetched: What ``fetch_rows`` returned for this batch.
        gradients: (R, W) for each table. The gradient of a row stands where its id first occurs in ``ids.rows``.
        clock: (1,) int64, the number of the last step taken; changed in place.
        known: The coefficients for the optimizer's learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
    """
    beta1, beta2 = betas
    now = known.corrections[clock.clamp(max=len(known.corrections) - 1)]
    step_size, root = now.to(tables[0].values.dtype).split(1, dim=1)
    for table, (ids, weights, decays, _), gradient in zip(tables, fetched, gradients, strict=True):
        rows, gradient = ids.rows, gradient[ids.first]  # rows that repeat are all written alike
        first = table.values[rows, 1] * decays[:, :1]
        second = table.values[rows, 2] * decays[:, 1:]
        first = first + (1 - beta1) * (gradient - first)
        second = beta2 * second + (1 - beta2) * gradient.square()
        weights = weights - step_size * first / (second.sqrt() / root + eps)
        table.values.index_put_((rows,), torch.stack([weights, first, second], dim=1))
        table.last.index_put_((rows,), (clock + 1).expand_as(rows))
    clock.add_(1)


class LazyAdam(torch.optim.Adam):
    """``torch.optim.Adam`` that updates only those rows of embedding tables that a batch touches.

    The first ``DENSE_STEPS`` steps are dense: give every parameter a gradient and call ``step``. Once ``dense`` is
    False, do this for each batch:

    1. ``fetch`` the rows of the batch.
    2. Compute the loss with their embeddings and run the backward pass; the tables get no gradient.
    3. ``step`` the other parameters.
    4. ``update`` the rows with their gradients.

    From the first ``fetch`` until the next ``flush`` the parameters and their state lag behind. ``state_dict`` flushes.
    Its format is that of ``torch.optim.Adam``, and either optimizer can load the other's.

    Changes of the learning rate, the betas or eps take effect with the next step, at the cost of bringing all rows up
    to date.

    Attributes:
        version: A number that changes whenever a captured CUDA graph of a step is no longer valid: after a change of
            hyperparameters and after ``load_state_dict``.

    Args:
        params: All parameters, in the order in which ``torch.optim.Adam`` would get them.
        tables: The embedding tables among ``params``, (n, W_i) each. Tables that share their ids are in one sequence.
        lr: Learning rate.
        betas: Decay rates of the two moments, by default the paper's.
        eps: Added to the denominator, by default the paper's.

    Raises:
        ValueError: ``params`` has parameter groups instead of parameters.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        tables: Sequence[Sequence[nn.Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        params = list(params)
        if not all(isinstance(parameter, Tensor) for parameter in params):
            raise ValueError("lazy Adam takes parameters, not groups of them")
        on_gpu = params[0].is_cuda
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True, capturable=on_gpu)
        self._parameters = [list(alike) for alike in tables]
        self._dense_steps_left = DENSE_STEPS
        self._fetch, self._update = fetch_rows, update_rows
        self._tables: list[Table] | None = None  # made when first needed; CUDA graphs rely on their addresses
        self._hyperparameters: Hyperparameters | None = None  # of the steps that lagging rows have skipped
        self._lagging = False
        self.version = 0

    @property
    def dense(self) -> bool:
        """Return whether the next step must be dense."""
        return self._dense_steps_left > 0

    def compile(self) -> None:
        """Compute ``fetch`` and ``update`` with ``torch.compile`` from now on, for batches of one shape."""
        self._fetch = torch.compile(fetch_rows, dynamic=False, fullgraph=True)
        self._update = torch.compile(update_rows, dynamic=False, fullgraph=True)

    def step(self, closure: Any = None) -> Any:
        """Take Adam's step for all parameters that have a gradient."""
        if self._lagging and any(parameter.grad is not None for parameter in chain(*self._parameters)):
            self.flush()
        self._dense_steps_left -= 1
        return super().step(closure)

    def begin(self) -> None:
        """Prepare for lazy steps with the current hyperparameters. ``fetch`` calls this itself."""
        if self._lagging and self._hyperparameters != self._current_hyperparameters():
            self.flush()
        if not self._lagging:
            self._load()

    @torch.no_grad()
    def fetch(self, batches: Sequence[Distinct]) -> list[Fetched]:
        """Return the rows that a batch touches, brought up to date.

        Args:
            batches: The distinct ids of the batch, one entry for each sequence of ``tables``.
        """
        self.begin()
        return self._fetch(self._tables, batches, self._clock, self._known, self._hyperparameters.eps)

    @torch.no_grad()
    def update(self, fetched: Sequence[Fetched], gradients: Sequence[Tensor]) -> None:
        """Take Adam's step for the rows of the last ``fetch``.

        Args:
            fetched: What ``fetch`` returned.
            gradients: (R, W) for each entry of ``fetched``. The gradient of a row stands where its id first occurs in
                ``ids.rows``.
        """
        betas, eps = self._hyperparameters.betas, self._hyperparameters.eps
        self._update(self._tables, fetched, gradients, self._clock, self._known, betas, eps)

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all rows of all tables up to date, in the parameters and in Adam's state."""
        if not self._lagging:
            return
        for table, parameters in zip(self._tables, self._parameters, strict=True):
            for start in range(0, len(table.last), ROWS_PER_BLOCK):
                block = Table(*(part[start : start + ROWS_PER_BLOCK] for part in table))
                rows = torch.arange(len(block.last), device=block.last.device)
                expansion, decays = skipped_steps(block, rows, self._clock, self._known)
                weights = caught_up(block, rows, expansion, self._hyperparameters.eps)
                moments = block.values[:, 1:] * decays[:, :, None]
                self._store(parameters, start, torch.cat([weights[:, None], moments], dim=1))
            for parameter in parameters:
                self.state[parameter]["step"].copy_(self._clock[0])
        self._lagging = False

    def lagging(self) -> list[Table] | None:
        """Return the tables with their lagging rows as they are; None if no row lags.

        A ``flush`` changes the rounding of later steps. After it, ``restore_lagging`` with these tables goes back, so
        that training goes on to the same bits as without the ``flush``.
        """
        return self._tables if self._lagging else None

    @torch.no_grad()
    def restore_lagging(self, tables: Sequence[Sequence[Tensor]]) -> None:
        """Restore tables that ``lagging`` returned.

        The present weights and state must be those that a ``flush`` made of these tables.

        Raises:
            ValueError: the tables have other shapes, or rows with a last step that has not been taken.
        """
        if tables is self._tables:
            self._lagging = True
            return
        self._load()
        for own, (values, last) in zip(self._tables, tables, strict=True):
            if (values.shape, last.shape) != (own.values.shape, own.last.shape):
                raise ValueError("rows of other shapes than the tables")
            if last.min() < 0 or last.max() > self._clock.item():
                raise ValueError("rows that moved in no step that was")
            own.values.copy_(values)
            own.last.copy_(last)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the format of ``torch.optim.Adam``, with all rows up to date."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of ``LazyAdam`` or ``torch.optim.Adam``.

        Raises:
            ValueError: the state belongs to parameters of other shapes, or to an Adam with weight decay, AMSGrad or
                maximization, for which the closed form of the skipped steps does not hold.
        """
        for group in state_dict["param_groups"]:
            for setting in ("weight_decay", "amsgrad", "maximize"):
                if group.get(setting):
                    raise ValueError(f"lazy Adam has no {setting}")
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state_dict["state"].get(number, {}).get(name, parameter)
                if moment.shape != parameter.shape:
                    raise ValueError(f"{name} of shape {tuple(moment.shape)} for {tuple(parameter.shape)}")
        # These choose the implementation and not what is computed: this optimizer keeps its own.
        own = {name: self.param_groups[0][name] for name in ("fused", "foreach", "capturable")}
        groups = [{**group, **own} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._lagging = False
        self._dense_steps_left = DENSE_STEPS - int(self.state[self._parameters[0][0]].get("step", 0))
        self.version += 1

    def _current_hyperparameters(self) -> Hyperparameters:
        """Return the hyperparameters that the next step must have, from the parameter group."""
        group = self.param_groups[0]
        return Hyperparameters(float(group["lr"]), tuple(group["betas"]), group["eps"])

    @torch.no_grad()
    def _load(self) -> None:
        """Fill the tables from the parameters and Adam's state, all of which are up to date."""
        first = self._parameters[0][0]
        if self._hyperparameters != self._current_hyperparameters():
            self._hyperparameters = self._current_hyperparameters()
            known = coefficients(self._hyperparameters.lr, self._hyperparameters.betas)
            self._known = Coefficients(*(part.to(first.device) for part in known))
            self.version += 1
        if self._tables is None:
            self._tables = [self._empty_table(parameters) for parameters in self._parameters]
            self._clock = torch.empty(1, dtype=torch.int64, device=first.device)
        self._clock.copy_(self.state[first]["step"])
        for table, parameters in zip(self._tables, self._parameters, strict=True):
            start = 0
            for parameter in parameters:
                stop = start + parameter.shape[1]
                for i, part in enumerate(self._parts(parameter)):
                    table.values[:, i, start:stop] = part
                start = stop
            table.last.copy_(self._clock.expand_as(table.last))
        self._lagging = True

    def _empty_table(self, parameters: Sequence[nn.Parameter]) -> Table:
        """Return an uninitialized table for parameters that share their ids."""
        rows, width = len(parameters[0]), sum(parameter.shape[1] for parameter in parameters)
        values = parameters[0].new_empty(rows, 3, width, requires_grad=False)
        return Table(values, torch.empty(rows, dtype=torch.int64, device=values.device))

    def _parts(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """Return a parameter's weights and two moments, in the order of ``Table.values``."""
        state = self.state[parameter]
        return parameter, state["exp_avg"], state["exp_avg_sq"]

    def _store(self, parameters: Sequence[nn.Parameter], start: int, values: Tensor) -> None:
        """Write rows (R, 3, W), numbered from ``start`` on, to the parameters and Adam's state."""
        widths = [parameter.shape[1] for parameter in parameters]
        for parameter, columns in zip(parameters, values.split(widths, dim=2), strict=True):
            for i, part in enumerate(self._parts(parameter)):
                part[start : start + len(values)] = columns[:, i]
