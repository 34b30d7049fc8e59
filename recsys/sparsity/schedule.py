"""How the mask moves: weights are dropped and others grow, within rows and between them, their number being constant.

A weight that grows begins at the step that it missed, or at 0 (`schedule.begin`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import ConfigError
from recsys.sparsity.collect import Collector, Seen
from recsys.sparsity.layout import UNIT
from recsys.sparsity.loops import exchange
from recsys.sparsity.tables import Group, SparseTables

# Shape suffixes: R = rows of all tables, N = rows of a group, K = chosen rows, S = slots of a row, D = embedding
# dimension.

_CHUNK = 2**14
"""Rows that are worked on at a time."""


@dataclass
class Mover:
    """Moves the masks of one model's tables in the course of a training of `steps` steps, `per_epoch` each epoch."""

    tables: Sequence[SparseTables]
    steps: int
    per_epoch: int
    seed: int
    warm: bool = False
    """Whether training goes on from an earlier one, so that it may be shorter than an interval."""

    def __post_init__(self) -> None:
        for tables in self.tables:
            schedule = tables.sparsity.schedule
            given = schedule.interval is not None and schedule.grow != "none" and not self.warm
            if given and self._interval(tables) >= self._last(tables):  # what moves at the last step is nothing
                raise ConfigError(
                    f"sparsity.schedule.interval = {schedule.interval} steps: the mask would never move, it may before "
                    f'step {self._last(tables)} of {self.steps}; use a shorter one, or grow = "none"'
                )
            tables.window = min(schedule.window or self._interval(tables), self._interval(tables))

    def before_step(self, step: int) -> None:
        """Collect gradients during step number `step`, counted from 0, if it lies in the window of an update."""
        for tables in self.tables:
            interval, limit = self._interval(tables), tables.sparsity.schedule.window_rows
            due = -(-(step + 1) // interval) * interval
            wanted = self._moves(tables, due) and due - step <= tables.window
            if wanted and tables.collector is None:
                tables.collector = Collector(limit, tables.rows, salt=due, dim=tables.dim)
            elif not wanted:
                tables.collector = None

    def after_step(self, step: int) -> None:
        """Move the mask where an update is due after step number `step`."""
        for tables in self.tables:
            if not self._moves(tables, step + 1):
                continue
            assert tables.collector is not None
            fraction = tables.sparsity.schedule.fraction / 2 * (1 + math.cos(math.pi * (step + 1) / self._last(tables)))
            seen, tables.collector = tables.collector.seen(), None  # which lets go of its memory
            move(tables, seen, fraction, seed=hash((self.seed, step)))

    def _interval(self, tables: SparseTables) -> int:
        """Steps between updates."""
        return tables.sparsity.schedule.interval or max(1, self.per_epoch // 2)

    def _last(self, tables: SparseTables) -> int:
        """The last step after which the mask may move."""
        return int(tables.sparsity.schedule.stop * self.steps)

    def _moves(self, tables: SparseTables, done: int) -> bool:
        """Whether the mask moves when so many steps are done."""
        schedule = tables.sparsity.schedule
        return schedule.grow != "none" and done % self._interval(tables) == 0 and 0 < done <= self._last(tables)


def move(tables: SparseTables, seen: Seen, fraction: float, *, seed: int) -> None:
    """Exchange about `fraction` of the weights of the rows that were seen; their number stays.

    Dropped are the weights of smallest magnitude, and as many grow in the same row, at its largest summed gradients;
    with `redistribute` whole units also go from the rows with the least to lose to those with the most to gain.
    """
    budget, schedule = tables.budget, tables.sparsity.schedule
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    grown_K = torch.zeros(len(seen.rows_K), dtype=torch.bool)
    if schedule.redistribute:
        grown_K = _redistribute(tables, seen, fraction * schedule.redistribute)
    for group, index_K, sums_KD in _chunks(tables, seen, ~grown_K):
        if 0 < group.size < tables.dim:
            _exchange(tables, group, index_K, sums_KD, fraction, generator)
    assert tables.budget == budget, f"{budget} active weights became {tables.budget}"


def _chunks(tables: SparseTables, seen: Seen, chosen_K: Tensor) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Some of the rows that were seen, a group and a chunk at a time: index_K in the group and sums_KD."""
    for numbers_K in chosen_K.nonzero().squeeze(1).split(_CHUNK):
        for group, index_K, mine_K in tables.by_group(seen.rows_K[numbers_K]):
            if len(index_K):
                yield group, index_K, seen.sums_KD[numbers_K if mine_K is None else numbers_K[mine_K]]


def _exchange(
    tables: SparseTables,
    group: Group,
    index_K: Tensor,
    sums_KD: Tensor,
    fraction: float,
    generator: torch.Generator,
) -> None:
    """Drop and grow within rows of a group."""
    size, dim, rows = group.size, tables.dim, len(index_K)
    index_K = index_K.to(group.values_NS.device)
    positions_KS, values_KS = group.positions_NS[index_K].cpu(), group.values_NS[index_K].cpu()
    strength_KD = sums_KD
    if tables.sparsity.schedule.grow == "random":
        strength_KD = torch.rand(rows, dim, generator=generator)
    # A fraction of a weight is one weight in that share of the rows.
    wanted_K = (fraction * size + torch.rand(rows, generator=generator)).long()
    by_element = group.state is not None and group.state.ndim == 2
    state_KS = group.state[index_K].cpu() if group.state is not None and by_element else torch.empty(rows, 0)
    missed_KD = tables.missed(group, index_K, sums_KD)
    exchange(
        size,
        positions_KS.numpy(),
        values_KS.numpy(),
        state_KS.numpy(),
        strength_KD.numpy(),
        missed_KD.numpy(),
        wanted_K.numpy(),
        tables.accumulator,
    )
    group.values_NS[index_K] = values_KS.to(index_K.device)
    group.positions_NS[index_K] = positions_KS.to(index_K.device)
    if group.state is not None and by_element:
        group.state[index_K] = state_KS.to(index_K.device)


def _redistribute(tables: SparseTables, seen: Seen, fraction: float) -> Tensor:
    """Move units of weights to the seen rows with most to gain, from the rows of least magnitude; which got some."""
    movable_R, gain_K = tables.movable(), _gains(tables, seen)
    gain_K[~movable_R[seen.rows_K]] = 0.0
    loss_R = _losses(tables)
    loss_R[~movable_R] = torch.inf
    wanted = min(int(fraction * tables.budget / UNIT), int((gain_K > 0).sum()))
    takers_K = gain_K.topk(wanted).indices
    loss_R[seen.rows_K[takers_K]] = torch.inf
    units = min(wanted, int(loss_R.isfinite().sum()))
    grown_K = torch.zeros(len(gain_K), dtype=torch.bool)
    if units:
        grown_K[takers_K[:units]] = True
        givers_K = loss_R.topk(units, largest=False).indices.sort().values
        tables.resize(givers_K, seen.rows_K[grown_K], seen.sums_KD[grown_K])
    return grown_K


def _gains(tables: SparseTables, seen: Seen) -> Tensor:
    """gain_K: the summed gradients of the unit of weights that each seen row would take; 0 where it has no room."""
    gain_K = torch.zeros(len(seen.rows_K))
    for numbers_K in torch.arange(len(seen.rows_K)).split(_CHUNK):
        for group, index_K, mine_K in tables.by_group(seen.rows_K[numbers_K]):
            if not len(index_K) or group.size + UNIT > tables.dim:
                continue
            mine_K = numbers_K if mine_K is None else numbers_K[mine_K]
            positions_KS = group.positions_NS[index_K.to(group.positions_NS.device), : group.size].cpu().long()
            free_KD = seen.sums_KD[mine_K].abs().scatter_(1, positions_KS, 0.0)
            gain_K[mine_K] = free_KD.topk(UNIT, dim=1).values.sum(1)
    return gain_K


def _losses(tables: SparseTables) -> Tensor:
    """loss_R: the summed magnitude of the unit of weights that each row would give; inf where it has none."""
    loss_R = torch.full((tables.rows,), torch.inf)
    for group in tables.groups:
        if group.size < UNIT:
            continue
        rows_N = (tables.sizes_R == group.size).nonzero().squeeze(1)
        for rows_K, values_KS in zip(rows_N.split(_CHUNK), group.values_NS.split(_CHUNK), strict=True):
            smallest_KS = values_KS.cpu().abs().topk(UNIT, dim=1, largest=False).values
            loss_R[rows_K] = smallest_KS.sum(1)
    return loss_R
