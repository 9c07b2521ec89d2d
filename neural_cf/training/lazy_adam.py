"""Adam whose embedding tables are brought up to date row by row, as batches need them.

Dense Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1) moves every row on every step, touched or not, because its
momentum decays slowly. Here a row waits until a batch touches it, and then makes up for the steps it was not in at
once, to what dense Adam would have made of it up to float32 rounding. The cost of a step grows with the batch and
not with the tables.

The skipped steps. A row last moved in step t0, with moments m and v and s = sqrt(v), skips K steps, in which its
gradient is zero. Step t0 + d moves it by

    -c_d m / (s r_d + eps),   c_d = lr beta1^d / (1 - beta1^(t0+d)),   r_d = sqrt(beta2^d / (1 - beta2^(t0+d))).

c_d falls by a factor of beta1 a step, in which r_d hardly changes. With C_i the sums of c_d r_d^i over d = 1..K,
the second-order Taylor expansion of 1 / (s r + eps) around the mean rho = C_1 / C_0, where the first-order term
vanishes, gives

    -m C_0 / D (1 + (s / D)^2 (C_2 / C_0 - rho^2)),   D = s rho + eps.

The sums come from tables. With q_i = beta1 beta2^(i/2) and h_i(t) = lr / (1 - beta1^t) / (1 - beta2^t)^(i/2),

    G_i(t) = sum over d >= 1 of q_i^d h_i(t + d),   C_i = G_i(t0) - q_i^K G_i(t0 + K).

Shapes: n rows in a table, D its width, R rows and N samples in a batch.
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

# The expansion's third-order term falls with the bias correction of the second moment, from half of all movement in the
# first steps to 4.5e-7 of it here, four roundings of float32, and to 2e-7 in the end. This is for Adam's usual betas.
DENSE_STEPS = 1500
ROWS_PER_BLOCK = 1 << 14  # brought up to date at once: the published model's take 38 MB


class Table(NamedTuple):
    """Embedding tables that are indexed alike, side by side, with their moments: a row is one piece of memory.

    Attributes:
        values: (n, 3, D), the parameters' dtype: the weights, and the exponential averages of gradient and squared
            gradient.
        last: (n,) int64, the step that each row was last moved in.
    """

    values: Tensor
    last: Tensor


class Fetched(NamedTuple):
    """A batch's rows of a table, up to date.

    Attributes:
        ids: Which rows.
        weights: (R, D), the parameters' dtype.
        decays: (R, 2), likewise: what the skipped steps leave of the two moments.
        embeddings: (N, D), likewise: every sample's row.
    """

    ids: Distinct
    weights: Tensor
    decays: Tensor
    embeddings: Tensor


class Coefficients(NamedTuple):
    """What a step needs to know of the steps around it, in float64.

    Attributes:
        sums: (T, 3), G_0, G_1 and G_2 of the step of that number.
        corrections: (T, 2), of the step after it: lr / (1 - beta1^t) and sqrt(1 - beta2^t).
        log_q: (3,), the logarithms of q_0, q_1 and q_2.
    """

    sums: Tensor
    corrections: Tensor
    log_q: Tensor


class Settings(NamedTuple):
    """Of Adam: what a row must be brought up to date with, as long as it lags."""

    lr: float
    betas: tuple[float, float]
    eps: float


def coefficients(lr: float, betas: tuple[float, float]) -> Coefficients:
    """The coefficients of all steps at a constant learning rate; of later ones than the last they are the last's.

    Raises:
        ValueError: betas that are not between 0 and 1.
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
    """What rows have skipped up to and with step ``clock``.

    Args:
        table: Whose rows.
        rows: (R,) int64.
        clock: (1,) int64.
        known: Of the optimizer's learning rate.

    Returns:
        (R, 3): C_0, rho and C_2 / C_0 - rho^2; and (R, 2): the moments' decays. Both in the parameters' dtype.
    """
    since = table.last[rows]
    skipped = clock - since
    end = len(known.sums) - 1
    powers = torch.exp(skipped[:, None] * known.log_q)  # float64: the sums below cancel
    sums = known.sums[since.clamp(max=end)] - powers * known.sums[clock.clamp(max=end)]
    none = sums[:, 0] == 0  # no step skipped, or steps at a learning rate of zero
    total = torch.where(none, 1.0, sums[:, 0])
    mean = torch.where(none, 1.0, sums[:, 1] / total)
    variance = sums[:, 2] / total - mean.square()
    expansion = torch.stack([torch.where(none, 0.0, total), mean, torch.where(none, 0.0, variance)], dim=1)
    log_beta2 = known.log_q[2] - known.log_q[0]
    decays = torch.stack([powers[:, 0], torch.exp(skipped * log_beta2)], dim=1)
    return expansion.to(table.values.dtype), decays.to(table.values.dtype)


def caught_up(table: Table, rows: Tensor, expansion: Tensor, eps: float) -> Tensor:
    """The weights (R, D) of rows after the steps that they skipped."""
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
    """A batch's rows of every table, brought up to date; the tables stay as they are."""
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
    """Take Adam's step number ``clock`` + 1 with a batch's rows and write them back; the clock moves on.

    Args:
        tables: Changed in place.
        fetched: Of ``fetch_rows`` in this step.
        gradients: (R, D) for each table, a row's where it stands first in ``rows``.
        clock: (1,) int64.
        known: Of the optimizer's learning rate.
        betas: Of the moments.
        eps: Added to the denominator.
    """
    beta1, beta2 = betas
    now = known.corrections[clock.clamp(max=len(known.corrections) - 1)]
    step_size, root = now.to(tables[0].values.dtype).split(1, dim=1)
    for table, (ids, weights, decays, _), gradient in zip(tables, fetched, gradients, strict=True):
        rows, gradient = ids.rows, gradient[ids.first]  # where a row repeats, it is written alike
        first = table.values[rows, 1] * decays[:, :1]
        second = table.values[rows, 2] * decays[:, 1:]
        first = first + (1 - beta1) * (gradient - first)
        second = beta2 * second + (1 - beta2) * gradient.square()
        weights = weights - step_size * first / (second.sqrt() / root + eps)
        table.values.index_put_((rows,), torch.stack([weights, first, second], dim=1))
        table.last.index_put_((rows,), (clock + 1).expand_as(rows))
    clock.add_(1)


class LazyAdam(torch.optim.Adam):
    """``torch.optim.Adam`` that computes the steps of embedding tables only for the rows that a batch touches.

    The first ``DENSE_STEPS`` steps are dense: give every parameter a gradient and call ``step``. After that
    (``dense`` is False), for each batch: ``fetch`` its rows, compute with their embeddings, ``step`` the other
    parameters, whose tables have no gradient, and ``update`` the rows. From the first ``fetch`` to the next
    ``flush`` the tables lag behind. ``state_dict`` flushes; it is Adam's, and each loads the other's.

    Changes of the learning rate, the betas or eps take effect with the next step, at the cost of bringing all rows up
    to date.

    Attributes:
        version: Another one whenever a CUDA graph of a step no longer holds: after such a change and a loaded state.

    Args:
        params: All parameters, in the order that Adam would be given them.
        tables: Embedding tables among ``params``, (n, D_i) each; those indexed alike in one sequence.
        lr: Learning rate.
        betas: Decays of the moments; the paper's defaults.
        eps: Added to the denominator; the paper's default.

    Raises:
        ValueError: parameter groups in place of parameters.
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
        self._tables: list[Table] | None = None  # made when first needed, and then kept for CUDA graphs
        self._settings: Settings | None = None  # those that rows lag at
        self._lagging = False
        self.version = 0

    @property
    def dense(self) -> bool:
        """Whether the next step must be a dense one."""
        return self._dense_steps_left > 0

    def compile(self) -> None:
        """Compute ``fetch`` and ``update`` with ``torch.compile``, for batches of one shape."""
        self._fetch = torch.compile(fetch_rows, dynamic=False, fullgraph=True)
        self._update = torch.compile(update_rows, dynamic=False, fullgraph=True)

    def step(self, closure: Any = None) -> Any:
        """Adam's step for all parameters that have a gradient."""
        if self._lagging and any(parameter.grad is not None for parameter in chain(*self._parameters)):
            self.flush()
        self._dense_steps_left -= 1
        return super().step(closure)

    def begin(self) -> None:
        """Make ready for lazy steps at the current settings; ``fetch`` does so by itself."""
        if self._lagging and self._settings != self._current_settings():
            self.flush()
        if not self._lagging:
            self._load()

    @torch.no_grad()
    def fetch(self, batches: Sequence[Distinct]) -> list[Fetched]:
        """A batch's rows of the tables, up to date.

        Args:
            batches: The distinct ids of the batch, for each sequence of ``tables``.
        """
        self.begin()
        return self._fetch(self._tables, batches, self._clock, self._known, self._settings.eps)

    @torch.no_grad()
    def update(self, fetched: Sequence[Fetched], gradients: Sequence[Tensor]) -> None:
        """Take a step with the rows of the last ``fetch``.

        Args:
            fetched: What it returned.
            gradients: (R, D) for each, a row's where it stands first in ``rows``.
        """
        betas, eps = self._settings.betas, self._settings.eps
        self._update(self._tables, fetched, gradients, self._clock, self._known, betas, eps)

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all rows of all tables up to date."""
        if not self._lagging:
            return
        for table, parameters in zip(self._tables, self._parameters, strict=True):
            for start in range(0, len(table.last), ROWS_PER_BLOCK):
                block = Table(*(part[start : start + ROWS_PER_BLOCK] for part in table))
                rows = torch.arange(len(block.last), device=block.last.device)
                expansion, decays = skipped_steps(block, rows, self._clock, self._known)
                weights = caught_up(block, rows, expansion, self._settings.eps)
                moments = block.values[:, 1:] * decays[:, :, None]
                self._store(parameters, start, torch.cat([weights[:, None], moments], dim=1))
            for parameter in parameters:
                self.state[parameter]["step"].copy_(self._clock[0])
        self._lagging = False

    def lagging(self) -> list[Table] | None:
        """The tables as they are, rows behind and all; None where nothing is behind.

        With ``flush`` after it, what the optimizer has is up to date, and ``restore_lagging`` still takes it back
        to where going on gives the same bits as never having stopped.
        """
        return self._tables if self._lagging else None

    @torch.no_grad()
    def restore_lagging(self, tables: Sequence[Sequence[Tensor]]) -> None:
        """Take the tables back to a value of ``lagging``, which belongs to the weights and the state that are here.

        Raises:
            ValueError: tables of other shapes, or rows that moved in no step that was.
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
        """Adam's, with all rows up to date."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over an Adam's state, from here or from ``torch.optim.Adam``.

        Raises:
            ValueError: of other parameters, or of an Adam with weight decay, AMSGrad or maximizing, which rows that
                are not touched would not follow.
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
        # How to compute, unlike what, is this optimizer's own.
        own = {name: self.param_groups[0][name] for name in ("fused", "foreach", "capturable")}
        groups = [{**group, **own} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._lagging = False
        self._dense_steps_left = DENSE_STEPS - int(self.state[self._parameters[0][0]].get("step", 0))
        self.version += 1

    def _current_settings(self) -> Settings:
        group = self.param_groups[0]
        return Settings(float(group["lr"]), tuple(group["betas"]), group["eps"])

    @torch.no_grad()
    def _load(self) -> None:
        """Fill the tables from weights and state, all of which are up to date."""
        first = self._parameters[0][0]
        if self._settings != self._current_settings():
            self._settings = self._current_settings()
            known = coefficients(self._settings.lr, self._settings.betas)
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
        rows, width = len(parameters[0]), sum(parameter.shape[1] for parameter in parameters)
        values = parameters[0].new_empty(rows, 3, width, requires_grad=False)
        return Table(values, torch.empty(rows, dtype=torch.int64, device=values.device))

    def _parts(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[parameter]
        return parameter, state["exp_avg"], state["exp_avg_sq"]

    def _store(self, parameters: Sequence[nn.Parameter], start: int, values: Tensor) -> None:
        """Write rows (R, 3, D) from number ``start`` on to weights and state."""
        widths = [parameter.shape[1] for parameter in parameters]
        for parameter, columns in zip(parameters, values.split(widths, dim=2), strict=True):
            for i, part in enumerate(self._parts(parameter)):
                part[start : start + len(values)] = columns[:, i]
