"""A set of embedding tables whose inactive weights exist nowhere: not in memory, not in a checkpoint, not in a Bundle.

The rows of all tables are numbered through and grouped by how many weights they hold. A group is one array of weights,
in training the memory of an fbgemm kernel, and one of positions, a byte each. A lookup reads the batch's rows of every
group and adds their weights into the batch's dense embeddings at their positions; its gradient takes the same way
back, so that fbgemm's fused optimizer sees active weights only.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from base.errors import ArtefactError, ConfigError, IdError
from features.schema import NewRows
from recsys.draws import normal_rows
from recsys.sparsity.collect import Collector
from recsys.sparsity.config import Sparsity
from recsys.sparsity.kernels import Bags, Compiled, Lookups, apply_gradients
from recsys.sparsity.layout import (
    UNIT,
    check_density,
    enough,
    er_densities,
    even_sizes,
    even_total,
    nested_positions,
    popular_sizes,
    random_positions,
    slots_of,
)

# Shape suffixes: R = rows of all tables, N = lookups of a batch or rows of a group, K = chosen rows, S = slots of a
# row, B = batch, T = tables, D = embedding dimension, X = anything.

_CHUNK = 2**16
"""Rows that are worked on at a time, so that what is made of them stays small."""


@dataclass(frozen=True)
class SparseTable:
    """One of the tables."""

    name: str
    feature: str
    rows: int
    multi: bool
    sparse: bool
    """Whether the density is for it; otherwise it holds every weight."""


@dataclass
class Group:
    """The rows that hold equally many weights, in the order of their numbers."""

    size: int
    values_NS: Tensor
    """Weights; a row of fewer than four ends in slots that hold 0 and stay so."""
    positions_NS: Tensor
    """uint8, ascending within the row."""
    state: Tensor | None = None
    """Adagrad's sums, state_N or state_NS; in training only."""
    kernel: SplitTableBatchedEmbeddingBagsCodegen | None = None
    """Owns the weights and the sums in training."""

    def __len__(self) -> int:
        return self.values_NS.shape[0]


@dataclass(frozen=True)
class _Rows:
    """Rows of one group that leave it, in main memory."""

    rows_K: Tensor
    positions_KS: Tensor
    """int64."""
    values_KS: Tensor
    state: Tensor | None

    @classmethod
    def of(cls, rows_K: Tensor, group: Group, index_K: Tensor) -> "_Rows":
        """Copies of some rows of a group."""
        index_K, size = index_K.to(group.values_NS.device), group.size
        state = None if group.state is None else group.state[index_K].cpu()
        return cls(
            rows_K,
            group.positions_NS[index_K, :size].cpu().long(),
            group.values_NS[index_K, :size].cpu(),
            state if state is None or state.ndim == 1 else state[:, :size],
        )

    def less(self) -> "_Rows":
        """Without a unit of weights, those of least magnitude."""
        kept_KS = self.values_KS.abs().sort(dim=1, descending=True, stable=True).indices[:, :-UNIT].sort(1).values
        return self._at(kept_KS, self.positions_KS, self.values_KS, self.state)

    def more(self, sums_KD: Tensor, first_KD: Tensor, accumulator: float) -> "_Rows":
        """With a unit of weights more: where it is free and the summed gradients are largest."""
        free_KD = sums_KD.abs().scatter(1, self.positions_KS, -1.0)
        grown_KS = free_KD.topk(UNIT, dim=1).indices
        positions_KS = torch.cat([self.positions_KS, grown_KS], 1)
        begun_KS = first_KD.gather(1, grown_KS)
        state = self.state
        if state is not None and state.ndim == 2:
            state = torch.cat([state, torch.full_like(begun_KS, accumulator)], 1)
        return self._at(positions_KS.argsort(1), positions_KS, torch.cat([self.values_KS, begun_KS], 1), state)

    def _at(self, order_KS: Tensor, positions_KS: Tensor, values_KS: Tensor, state: Tensor | None) -> "_Rows":
        by_element = state is not None and state.ndim == 2
        return _Rows(
            self.rows_K,
            positions_KS.gather(1, order_KS),
            values_KS.gather(1, order_KS),
            state.gather(1, order_KS) if by_element and state is not None else state,
        )


class SparseTables(nn.Module):
    """Sparse tables of one width. On the meta device they hold nothing until `adopt` or `begin`.

    Raises ConfigError where the density leaves a row without weights.
    """

    def __init__(
        self, tables: Sequence[SparseTable], dim: int, sparsity: Sparsity, device: torch.device, std: float
    ) -> None:
        super().__init__()
        check_density(sparsity.density, dim, unequal=sparsity.unequal)
        if not sparsity.schedule.redistribute and sparsity.unequal and sparsity.density * dim < UNIT:
            raise ConfigError(
                f'sparsity.density = {sparsity.density:g}: with allocation = "popularity" rows hold whole units of '
                f"{UNIT} weights, and those of {dim} would hold {sparsity.density * dim:.2g} on average, so that some "
                f"would never hold any; use at least {enough(dim):g}, or schedule.redistribute above 0"
            )
        for table in tables:
            _check_table(table, dim, sparsity.density, sparsity)
        self.tables = tuple(tables)
        self.dim = dim
        self.sparsity = sparsity
        self.std = std
        """Of weights at first."""
        ends = torch.tensor([t.rows for t in tables]).cumsum(0)
        self.starts = [0, *ends[:-1].tolist()]
        self.rows = int(ends[-1])
        self.sizes_R = torch.empty(0, dtype=torch.uint8)
        self.place_R: Tensor | None = None
        """Where a row stands when rows are sorted by size; None where all sizes are equal."""
        self.groups: list[Group] = []
        self.accumulator = 0.0
        """What sums of squared gradients begin at."""
        self.window = sparsity.schedule.window or 1
        """Steps whose gradients decide an update; where the schedule does not say, `Mover` does."""
        self.collector: Collector | None = None
        """Takes the gradients of all weights of the batch's rows, while it is there."""
        if device.type != "meta":
            self._fill(self.first_sizes(None), 0, device)

    # What is stored

    @property
    def budget(self) -> int:
        """Active weights, which no update of the mask changes."""
        return sum(g.size * len(g) for g in self.groups)

    def first_sizes(self, counts_R: Tensor | None) -> Tensor:
        """sizes_R with which an untrained model begins. `counts_R`: examples of each row, where they decide."""
        config = self.sparsity
        densities = [config.density if t.sparse else 1.0 for t in self.tables]
        sparse = [i for i, t in enumerate(self.tables) if t.sparse]
        if config.allocation == "er":
            found = er_densities(
                [self.tables[i].rows for i in sparse], self.dim, config.density, unequal=config.unequal
            )
            for i, density in zip(sparse, found, strict=True):
                densities[i] = density
                _check_table(self.tables[i], self.dim, density, config)
        parts = [
            even_sizes(t.rows, self.dim, d, unequal=config.unequal and t.sparse)
            for t, d in zip(self.tables, densities, strict=True)
        ]
        if config.allocation == "popularity" and counts_R is not None:
            total = sum(even_total(self.tables[i].rows, self.dim, config.density, unequal=True) for i in sparse)
            mine = [counts_R[self.starts[i] : self.starts[i] + self.tables[i].rows] for i in sparse]
            found_R = popular_sizes(torch.cat(mine), self.dim, total)
            for i in sparse:
                parts[i], found_R = found_R[: self.tables[i].rows], found_R[self.tables[i].rows :]
                if not parts[i].any():
                    raise ConfigError(
                        f"sparsity.density = {config.density:g}: by popularity no weight is left for the "
                        f"{self.tables[i].rows} rows of table {self.tables[i].name!r}; use at least "
                        f'{enough(self.dim):g}, or allocation = "uniform"'
                    )
        return torch.cat([torch.from_numpy(p) for p in parts])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the weights consist of, by name: the very memory, not copies."""
        rows_T = torch.tensor([t.rows for t in self.tables])
        found = {"rows_T": rows_T, "sizes_R": self.sizes_R}
        for group in self.groups:
            found[f"values.{group.size}"] = group.values_NS
            found[f"positions.{group.size}"] = group.positions_NS
        return found

    def states(self) -> dict[str, Tensor]:
        """The optimizer's state, by name: the very memory."""
        return {f"state.{g.size}": g.state for g in self.groups if g.state is not None}

    def watched(self) -> dict[str, Tensor]:
        """What the collector has, by name; nothing between two windows."""
        return {} if self.collector is None else self.collector.tensors()

    def watch(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with a stored collector."""
        if not tensors:
            return
        self.collector = Collector.restored(tensors, self.sparsity.schedule.window_rows, self.rows, self.dim)

    def adopt(self, tensors: Mapping[str, Tensor], where: Any, *, device: torch.device | None = None) -> None:
        """Take over stored `tensors`. Raises ArtefactError naming what is inconsistent."""
        sizes_R, groups = read_groups(tensors, self.dim, where)
        rows = tensors["rows_T"].tolist()
        if rows != [t.rows for t in self.tables]:
            raise ArtefactError(
                f"{where}: sparse tables of {rows} rows, the model has {[t.rows for t in self.tables]}; "
                "weights and configuration belong to different runs"
            )
        for group in groups:
            group.values_NS, group.positions_NS = group.values_NS.to(device), group.positions_NS.to(device)
        self._set(sizes_R, groups, device)
        self._check_budget(rows, self.budget, where)

    def _check_budget(self, rows_T: Sequence[int], found: int, where: Any) -> None:
        """Raises ArtefactError where tables of `rows_T` rows hold another number of weights than the density means."""
        unequal = self.sparsity.unequal
        wanted = sum(
            even_total(rows, self.dim, self.sparsity.density if t.sparse else 1.0, unequal=unequal and t.sparse)
            for rows, t in zip(rows_T, self.tables, strict=True)
        )
        free = UNIT * len(self.tables) if self.sparsity.allocation == "er" else 0  # each table's is a whole number
        if abs(found - wanted) > free:
            raise ArtefactError(
                f"{where}: holds {found} weights, a density of {found / (sum(rows_T) * self.dim):.4g}, where "
                f"[sparsity] of this run, density {self.sparsity.density:g}, means {wanted}; set it back, or train "
                "from the start"
            )

    def _set(self, sizes_R: Tensor, groups: list[Group], device: torch.device | None) -> None:
        self.sizes_R, self.groups = sizes_R, groups
        self.place_R = None if len(groups) == 1 else _places(sizes_R, [g.size for g in groups]).to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseTables":
        super()._apply(fn, recurse)
        for group in self.groups:
            group.values_NS, group.positions_NS = fn(group.values_NS), fn(group.positions_NS)
        if self.place_R is not None:
            self.place_R = fn(self.place_R)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: tensor for name, tensor in self.tensors().items()}

    # Training

    def prepare(self, adagrad: Mapping[str, float], device: torch.device) -> None:
        """Say how fbgemm's fused Adagrad is to train them (`lr`, `eps`) and where, before they get their weights."""
        self._adagrad, self._device = dict(adagrad), device

    def begin(self, seed: int, accumulator: float, counts: Mapping[str, Tensor] | None = None) -> None:
        """Initialise: normal weights at positions that follow from `seed` and the tables' names.

        `accumulator`: what sums of squared gradients begin at. `counts`: lookups in training of each feature's rows.
        """
        counts_R = None if counts is None else torch.cat([counts[t.feature] for t in self.tables])
        self._fill(self.first_sizes(counts_R), seed, self._device)
        self.accumulator = accumulator
        for group in self.groups:
            self._own(group)

    def resume(
        self, tensors: Mapping[str, Tensor], states: Mapping[str, Tensor], accumulator: float, where: Any
    ) -> None:
        """Go on exactly where stored tensors were left. Raises ArtefactError naming what is inconsistent."""
        self.adopt(tensors, where, device=self._device)
        self.accumulator = accumulator
        for group in self.groups:
            if not group.size:
                continue
            group.state, slots = states.get(f"state.{group.size}"), slots_of(group.size)
            shape = (len(group),) if self.sparsity.state == "row" else (len(group), slots)
            if group.state is None or tuple(group.state.shape) != shape:
                raise ArtefactError(
                    f"{where}: the sums of rows with {group.size} weights should be {shape}; train from the start"
                )
            self._own(group)

    def set_learning_rate(self, value: float) -> None:
        """Takes effect from the next backward pass on."""
        self._adagrad["lr"] = value
        for group in self.groups:
            if group.kernel is not None:
                group.kernel.set_learning_rate(value)

    def _own(self, group: Group) -> None:
        """Move a group's weights into a kernel."""
        if not len(group) or not group.size:
            return
        cuda = group.values_NS.device.type == "cuda"
        width = group.values_NS.shape[1]
        by_row = self.sparsity.state == "row"
        kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [
                (
                    len(group),
                    width,
                    EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST,
                    ComputeDevice.CUDA if cuda else ComputeDevice.CPU,
                )
            ],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD if by_row else EmbOptimType.EXACT_ADAGRAD,
            learning_rate=self._adagrad["lr"],
            eps=self._adagrad["eps"],
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked before rows are looked up
            output_dtype=SparseType.FP32,
            device=group.values_NS.device,
        )
        with torch.no_grad():
            (owned_NS,) = kernel.split_embedding_weights()
            owned_NS.copy_(group.values_NS)
            group.values_NS = owned_NS.detach()
            ((sums, *_),) = kernel.split_optimizer_states()
            if not by_row:
                sums = sums.view(len(group), width)
            if group.state is None:
                sums.fill_(self.accumulator)
            else:
                sums.copy_(group.state)
            group.state = sums
        group.kernel = kernel

    def missed(self, group: Group, index_K: Tensor, sums_KD: Tensor) -> Tensor:
        """The steps that weights would have made on the summed gradients of a window, had they been active.

        One of Adagrad's is no longer than the learning rate, whatever the sum: that of a row whose active weights have
        had no gradient yet, as in a dot product with rows that hold others, is 0.
        """
        if self.sparsity.schedule.begin == "zero" or group.state is None:
            return torch.zeros_like(sums_KD)
        state = group.state[index_K.to(group.state.device)].cpu()
        scale_K = (state if state.ndim == 1 else state[:, : group.size].mean(1)).sqrt() + self._adagrad["eps"]
        longest = float(self.window)
        return -self._adagrad["lr"] * (sums_KD / scale_K.unsqueeze(1)).clamp(-longest, longest)

    def movable(self) -> Tensor:
        """Which rows_R may exchange weights with others: those of tables that are sparse."""
        return torch.cat([torch.full((t.rows,), t.sparse) for t in self.tables])

    def resize(self, givers_K: Tensor, takers_K: Tensor, sums_KD: Tensor) -> None:
        """Move a unit of weights from each giver to a taker: as many, none of them both, ascending.

        A giver loses its weights of least magnitude; a taker gains those with the largest gradients in `sums_KD`.
        """
        sizes_R = self.sizes_R.clone()
        sizes_R[givers_K] -= UNIT
        sizes_R[takers_K] += UNIT
        moved: dict[int, list[_Rows]] = {}
        for rows_K, sums in ((givers_K, None), (takers_K, sums_KD)):
            for group, index_K, mine_K in self.by_group(rows_K):
                if len(index_K):
                    chosen = rows_K if mine_K is None else rows_K[mine_K]
                    old = _Rows.of(chosen, group, index_K)
                    if sums is None:
                        new = old.less()
                    else:
                        mine_KD = sums if mine_K is None else sums[mine_K]
                        new = old.more(mine_KD, self.missed(group, index_K, mine_KD), self.accumulator)
                    moved.setdefault(new.positions_KS.shape[1], []).append(new)
        before_R, old_groups = self.sizes_R, {g.size: g for g in self.groups}
        device, self.groups, groups = self.groups[0].values_NS.device, [], []
        for size in torch.unique(sizes_R).tolist():
            group = old_groups.pop(size, None)  # let go of it as soon as it is copied
            arrived = moved.get(size, [])
            if arrived or group is None or int((sizes_R == size).sum()) != len(group):
                group = self._regroup(size, sizes_R, before_R, group, arrived, device)
                self._own(group)
            groups.append(group)
        self._set(sizes_R, groups, device)

    def _regroup(
        self,
        size: int,
        sizes_R: Tensor,
        before_R: Tensor,
        old: Group | None,
        arrived: Sequence["_Rows"],
        device: torch.device,
    ) -> Group:
        """The rows of `size`: those that have it still, and those that have it now."""
        count, slots = int((sizes_R == size).sum()), slots_of(size)
        group = Group(
            size,
            torch.zeros(count, slots, device=device),
            torch.zeros(count, slots, dtype=torch.uint8, device=device),
        )
        shape = (count,) if self.sparsity.state == "row" else (count, slots)
        group.state = torch.full(shape, float(self.accumulator), device=device) if size else None
        written = read = 0
        for start in range(0, len(sizes_R), _CHUNK):  # numbers of all rows would be as large as the weights
            now_K, was_K = (sizes[start : start + _CHUNK] == size for sizes in (sizes_R, before_R))
            place_K, from_K = now_K.cumsum(0) + (written - 1), was_K.cumsum(0) + (read - 1)
            stay_K = now_K & was_K
            if old is not None:
                _copy(old, from_K[stay_K].to(device), group, place_K[stay_K].to(device))
            for rows in arrived:
                first, last = torch.searchsorted(rows.rows_K, torch.tensor([start, start + _CHUNK])).tolist()
                self._put(rows, slice(first, last), group, place_K[rows.rows_K[first:last] - start].to(device))
            written, read = written + int(now_K.sum()), read + int(was_K.sum())
        return group

    @staticmethod
    def _put(rows: "_Rows", chosen: slice, group: Group, place_K: Tensor) -> None:
        """Some of the rows, whose sizes have changed, at their places."""
        device = place_K.device
        group.values_NS[place_K, : group.size] = rows.values_KS[chosen].to(device)
        group.positions_NS[place_K, : group.size] = rows.positions_KS[chosen].to(torch.uint8).to(device)
        if group.state is not None and rows.state is not None:
            where = (place_K,) if rows.state.ndim == 1 else (place_K, slice(0, group.size))
            group.state[where] = rows.state[chosen].to(device)

    # Lookup

    def forward(self, sparse: KeyedJaggedTensor) -> Tensor:
        """embedding_BTD: the mean of the rows in each bag, 0 for an empty one; tables in their order.

        Raises IdError for an id outside its table.
        """
        bags, batch = self._bags(sparse), sparse.stride()
        collecting = None
        if self.collector is not None:
            collecting = _Collecting(self.collector, bags.row_N, bags.bags(), bags.weights())
        anchor = torch.empty(0, device=bags.row_N.device, requires_grad=torch.is_grad_enabled())
        if bags.row_N.device.type == "cpu":
            dense_XD = _InMainMemory.apply(anchor, self, bags, collecting)
        else:
            dense_XD = self._spread(bags, anchor, collecting)
        return dense_XD.view(batch, len(self.tables), self.dim)

    def _spread(self, bags: Bags, anchor: Tensor, collecting: "_Collecting | None") -> Tensor:
        """dense_XD by tensor operations and fbgemm's autograd."""
        bag_N, weight_N = bags.bags(), bags.weights()
        values: list[Tensor] = []
        lookups: list[Lookups] = []
        for group, index_N, chosen_N in self.by_group(bags.row_N):
            if not index_N.numel() or not group.size:
                continue
            mine_N, share_N = (x if x is None or chosen_N is None else x[chosen_N] for x in (bag_N, weight_N))
            assert mine_N is not None
            lookups.append(Lookups(group.size, group.positions_NS.index_select(0, index_N), mine_N, share_N))
            if group.kernel is not None and torch.is_grad_enabled():
                each = torch.arange(len(index_N) + 1, device=index_N.device)
                values.append(group.kernel(index_N, each))
            else:
                values.append(group.values_NS.index_select(0, index_N))
        return _Spread.apply((len(bags.ends_X), self.dim), anchor, collecting, lookups, *values)

    def _bags(self, sparse: KeyedJaggedTensor) -> Bags:
        """The batch's lookups, checked."""
        ids, ends, keys, batch = sparse.values(), sparse.offset_per_key(), sparse.keys(), sparse.stride()
        order, device = [keys.index(t.feature) for t in self.tables], ids.device
        ids_T = [ids[ends[key] : ends[key + 1]] for key in order]
        if not any(t.multi for t in self.tables) and all(len(ids_B) == batch for ids_B in ids_T):
            ids_BT = torch.stack(ids_T, dim=1)
            if ids_BT.numel():
                self._check_ids(range(len(order)), *torch.aminmax(ids_BT, dim=0))
            row_N = (ids_BT + torch.tensor(self.starts, device=device)).view(-1)
            return Bags(row_N, torch.arange(1, len(row_N) + 1, device=device), tables=1, mean=False)
        if known := [i for i, ids_N in enumerate(ids_T) if ids_N.numel()]:
            least, most = zip(*(torch.aminmax(ids_T[i]) for i in known), strict=True)
            self._check_ids(known, torch.stack(least), torch.stack(most))
        row_N = torch.cat(ids_T).long()
        for mine_N, start in zip(row_N.split([len(x) for x in ids_T]), self.starts, strict=True):
            mine_N += start
        count_TB = sparse.lengths().view(len(keys), batch)[order]
        return Bags(row_N, count_TB.flatten().cumsum(0), tables=len(order), mean=True)

    def _check_ids(self, tables: Sequence[int], least_K: Tensor, most_K: Tensor) -> None:
        """Raises IdError where the least or the largest id that some of the tables are asked for is outside."""
        rows_K = torch.tensor([self.tables[i].rows for i in tables], device=least_K.device)
        wrong_K = (least_K < 0) | (most_K >= rows_K)
        if wrong_K.any():
            place = int(wrong_K.nonzero()[0])
            table, least = self.tables[tables[place]], int(least_K[place])
            wrong = least if least < 0 else int(most_K[place])
            raise IdError(f"table {table.name!r}: id {wrong} is outside its {table.rows} rows")

    def by_group(self, row_N: Tensor) -> Iterator[tuple[Group, Tensor, Tensor | None]]:
        """Per group the index in it of the lookups that are its, and which these are; None for all."""
        if self.place_R is None:
            yield self.groups[0], row_N, None
            return
        ends = accumulate(len(g) for g in self.groups)
        place_N = self.place_R.index_select(0, row_N.to(self.place_R.device)).to(row_N.device)
        start, before_N = 0, torch.zeros_like(place_N, dtype=torch.bool)
        for group, end in zip(self.groups, ends, strict=True):
            until_N = place_N < end
            mine_N = (until_N ^ before_N).nonzero().squeeze(1)
            yield group, place_N.index_select(0, mine_N).long().sub_(start), mine_N
            start, before_N = end, until_N

    def silence(self, row_N: Tensor) -> None:
        """Set rows' weights to 0; they stay where they are."""
        for group, index_N, _ in self.by_group(row_N):
            group.values_NS[index_N.to(group.values_NS.device)] = 0

    # Rows that are new

    def _fill(self, sizes_R: Tensor, seed: int, device: torch.device) -> None:
        """Random positions and normal weights, table by table, so that a table's do not depend on the others."""
        generators = [torch.Generator().manual_seed(seed ^ zlib.crc32(t.name.encode())) for t in self.tables]
        groups = []
        for size in torch.unique(sizes_R).tolist():
            count, slots = int((sizes_R == size).sum()), slots_of(size)
            groups.append(Group(size, torch.zeros(count, slots), torch.zeros(count, slots, dtype=torch.uint8)))
        filled = dict.fromkeys((g.size for g in groups), 0)
        for table, start, generator in zip(self.tables, self.starts, generators, strict=True):
            for first in range(start, start + table.rows, _CHUNK):
                chunk = sizes_R[first : min(first + _CHUNK, start + table.rows)]
                for group in groups:
                    count = int((chunk == group.size).sum())
                    place = slice(filled[group.size], filled[group.size] + count)
                    self._draw(group, place, generator)
                    filled[group.size] += count
        for group in groups:
            group.values_NS, group.positions_NS = group.values_NS.to(device), group.positions_NS.to(device)
        self._set(sizes_R, groups, device)

    def _draw(self, group: Group, place: slice, generator: torch.Generator) -> None:
        count, size = place.stop - place.start, group.size
        group.values_NS[place, :size] = torch.randn(count, size, generator=generator) * self.std
        core = self._core(size)
        rest_KS = random_positions(count, size - core, self.dim - core, generator)
        positions_KS = torch.cat([nested_positions(count, core), rest_KS + core], 1)
        group.positions_NS[place, :size] = positions_KS

    def _core(self, size: int) -> int:
        """How many of a row's weights are at first where every row has them."""
        return {"random": 0, "half": size // 2, "nested": size}[self.sparsity.positions]

    def carry(
        self,
        before: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        fresh: Sequence[Tensor],
        where: Any,
        *,
        rule: NewRows,
        seed: int,
        accumulator: float,
        decay: float,
    ) -> None:
        """Go on from stored tensors of tables that have grown since: rows keep their weights, positions and sums.

        `fresh`: per table the rows that mean something new. One beyond the stored rows gets the density's share, one
        in the place of a retired id that id's share. Raises ArtefactError where growth does not explain a size.
        """
        sizes_R, groups = read_groups(before, self.dim, where)
        known_T = before["rows_T"].tolist()
        if len(known_T) != len(self.tables) or any(n > t.rows for n, t in zip(known_T, self.tables, strict=True)):
            raise ArtefactError(
                f"{where}: sparse tables of {known_T} rows, the model needs {[t.rows for t in self.tables]}; "
                "train with --full"
            )
        self._check_budget(known_T, int(sizes_R.sum(dtype=torch.int64)), where)
        old_T = sizes_R.split(known_T)
        new_T = [
            torch.cat([old_R, self._share(table, len(old_R))]) for table, old_R in zip(self.tables, old_T, strict=True)
        ]
        grown_R = torch.cat(new_T)
        grown: list[Group] = []
        for size in torch.unique(grown_R).tolist():
            count, slots = int((grown_R == size).sum()), slots_of(size)
            group = Group(size, torch.zeros(count, slots), torch.zeros(count, slots, dtype=torch.uint8))
            shape = (count,) if self.sparsity.state == "row" else (count, slots)
            group.state = torch.full(shape, accumulator) if size else None
            source = next((g for g in groups if g.size == size), None)
            sums = states.get(f"state.{size}")
            read = write = 0
            for old_R, new_R in zip(old_T, new_T, strict=True):
                kept, all_ = int((old_R == size).sum()), int((new_R == size).sum())
                if kept and source is not None:
                    group.values_NS[write : write + kept] = source.values_NS[read : read + kept]
                    group.positions_NS[write : write + kept] = source.positions_NS[read : read + kept]
                    if group.state is not None:
                        if sums is None or sums.shape != (len(source), *group.state.shape[1:]):
                            raise ArtefactError(
                                f"{where}: has not the sums of each {self.sparsity.state} with {size} weights, as "
                                f'sparsity.state = "{self.sparsity.state}" asks for; set it back, or train with --full'
                            )
                        group.state[write : write + kept] = sums[read : read + kept] * decay
                read, write = read + kept, write + all_
            grown.append(group)
        self.accumulator = accumulator
        self._set(grown_R, grown, None)
        for i, (table, fresh_K) in enumerate(zip(self.tables, fresh, strict=True)):
            if int((fresh_K >= known_T[i]).sum()) != table.rows - known_T[i]:
                raise ArtefactError(
                    f"{where}: sparse table {table.name!r} holds {known_T[i]} rows, the model needs {table.rows}, of "
                    f"which {len(fresh_K)} are new; train with --full"
                )
            self._draw_rows(i, fresh_K, rule, seed ^ zlib.crc32(table.name.encode()))
        for group in grown:
            group.values_NS, group.positions_NS = group.values_NS.to(self._device), group.positions_NS.to(self._device)
            self._own(group)
        self._set(grown_R, grown, self._device)

    def _share(self, table: SparseTable, first: int) -> Tensor:
        """Sizes of the rows that a table has grown by."""
        density = self.sparsity.density if table.sparse else 1.0
        unequal = self.sparsity.unequal and table.sparse
        return torch.from_numpy(even_sizes(table.rows - first, self.dim, density, unequal=unequal, first=first))

    def _draw_rows(self, table: int, fresh_K: Tensor, rule: NewRows, seed: int) -> None:
        """Weights for rows that nothing is known of; each follows from the row's number, or from the table's mean."""
        mean_D = self.mean(table, fresh_K) if rule == "mean" else None
        for chunk_K in fresh_K.split(_CHUNK):
            if mean_D is None:
                first_KD = (normal_rows(chunk_K, self.dim, seed) * self.std).float()
                order_KD = normal_rows(chunk_K, self.dim, ~seed & 0x7FFFFFFF)
            else:
                first_KD, order_KD = (x.expand(len(chunk_K), -1) for x in (mean_D, mean_D.abs()))
            for group, index_K, mine_K in self.by_group(chunk_K + self.starts[table]):
                mine_KD = (order_KD if mine_K is None else order_KD[mine_K]).clone()
                mine_KD[:, : self._core(group.size)] = torch.inf
                chosen_KD = mine_KD.sort(dim=1, descending=True, stable=True).indices
                values_KD = first_KD if mine_K is None else first_KD[mine_K]
                positions_KS = chosen_KD[:, : group.size].sort(1).values
                group.positions_NS[index_K, : group.size] = positions_KS.to(torch.uint8)
                group.values_NS[index_K, : group.size] = values_KD.gather(1, positions_KS)
                if group.state is not None:
                    group.state[index_K] = self.accumulator

    def mean(self, table: int, except_K: Tensor) -> Tensor | None:
        """mean_D of a table's rows but row 0, which stands for what has no row, and `except_K`; None without any."""
        known_R = torch.ones(self.tables[table].rows, dtype=torch.bool)
        known_R[except_K] = False
        known_R[0] = False
        if not known_R.any():
            return None
        total_D = torch.zeros(self.dim, dtype=torch.float64)
        for rows_K in (known_R.nonzero().squeeze(1) + self.starts[table]).split(_CHUNK):
            for group, index_K, _ in self.by_group(rows_K):
                positions_KS = group.positions_NS[index_K, : group.size].long()
                total_D.index_add_(0, positions_KS.view(-1), group.values_NS[index_K, : group.size].double().view(-1))
        return (total_D / int(known_R.sum())).float()


def _copy(old: Group, from_K: Tensor, group: Group, place_K: Tensor) -> None:
    """Rows of one group to places in another of their size."""
    group.values_NS[place_K] = old.values_NS[from_K]
    group.positions_NS[place_K] = old.positions_NS[from_K]
    if group.state is not None and old.state is not None:
        group.state[place_K] = old.state[from_K]


def _check_table(table: SparseTable, dim: int, density: float, sparsity: Sparsity) -> None:
    """Raises ConfigError where `density`, which is the table's own, leaves it without weights, or a row of equals."""
    found, none = density * dim, "less than one for each row"
    if sparsity.unequal:
        found, none = even_total(table.rows, dim, density, unequal=True), "none at all"
    if table.sparse and found < 1 - 1e-9:
        raise ConfigError(
            f"sparsity.density = {sparsity.density:g} leaves table {table.name!r}, {table.rows} x {dim}, too few "
            f"weights: {none}; use a larger one, or name the other tables in sparsity.features"
        )


def read_groups(tensors: Mapping[str, Tensor], dim: int, where: Any) -> tuple[Tensor, list[Group]]:
    """sizes_R and groups from stored tensors, checked. Raises ArtefactError naming what is inconsistent."""
    damaged = "restore or rebuild it"
    if "sizes_R" not in tensors or "rows_T" not in tensors:
        raise ArtefactError(f"{where}: holds no sparse tables; the model was trained without [sparsity]")
    sizes_R = tensors["sizes_R"]
    if len(sizes_R) != int(tensors["rows_T"].sum()):
        raise ArtefactError(f"{where}: sizes of {len(sizes_R)} rows for {int(tensors['rows_T'].sum())}; {damaged}")
    groups: list[Group] = []
    extra = set(tensors) - {"sizes_R", "rows_T"}
    for size, count in zip(*(x.tolist() for x in torch.unique(sizes_R, return_counts=True)), strict=True):
        values_NS, positions_NS = tensors.get(f"values.{size}"), tensors.get(f"positions.{size}")
        shape, extra = (count, slots_of(size)), extra - {f"values.{size}", f"positions.{size}"}
        for name, found, dtype in (
            ("values", values_NS, torch.float32),
            ("positions", positions_NS, torch.uint8),
        ):
            if found is None or tuple(found.shape) != shape:
                is_there = "nothing" if found is None else tuple(found.shape)
                raise ArtefactError(
                    f"{where}: {name} of rows with {size} weights should be {shape}, found {is_there}; {damaged}"
                )
            if found.dtype != dtype:
                raise ArtefactError(
                    f"{where}: {name} of rows with {size} weights should be {dtype}, found {found.dtype}; {damaged}"
                )
        assert values_NS is not None
        assert positions_NS is not None
        for first in range(0, count, _CHUNK):
            active_KS = positions_NS[first : first + _CHUNK, :size]
            falls_K = (active_KS[:, 1:] <= active_KS[:, :-1]).any(1) | (active_KS >= dim).any(1)
            if falls_K.any():
                row = first + int(falls_K.nonzero()[0])
                raise ArtefactError(
                    f"{where}: positions {active_KS[row - first].tolist()} of a row with {size} weights are not "
                    f"ascending numbers below {dim}; {damaged}"
                )
        if values_NS[:, size:].any() or positions_NS[:, size:].any():
            raise ArtefactError(
                f"{where}: rows with {size} weights hold something where their slots only fill up; {damaged}"
            )
        groups.append(Group(size, values_NS, positions_NS))
    if extra:
        raise ArtefactError(f"{where}: {min(extra)} is of no row; {damaged}")
    return sizes_R, groups


def _places(sizes_R: Tensor, sizes: Sequence[int]) -> Tensor:
    """place_R int32: the stable order of rows by size."""
    place_R = torch.empty(len(sizes_R), dtype=torch.int32)
    start = 0
    for size in sizes:
        mine_R = sizes_R == size
        count = int(mine_R.sum())
        place_R[mine_R] = torch.arange(start, start + count, dtype=torch.int32)
        start += count
    return place_R


@dataclass(frozen=True)
class _Collecting:
    """A lookup whose gradient a collector takes; a step may make several."""

    collector: Collector
    row_N: Tensor
    bag_N: Tensor
    weight_N: Tensor | None

    def add(self, grad_XD: Tensor) -> None:
        self.collector.add(self.row_N, self.bag_N, self.weight_N, grad_XD)


class _InMainMemory(torch.autograd.Function):
    """dense_XD by compiled loops; the backward pass is fbgemm's update of the active weights alone.

    `anchor` holds nothing: it has the backward pass come here, for the step and for the collector.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: SparseTables, bags: Bags, collecting: _Collecting | None) -> Tensor:
        ctx.groups, ctx.collecting = tables.groups, collecting
        ctx.save_for_backward(anchor)  # so that a second backward pass, which would step again, is refused
        memory = [(g.values_NS, g.positions_NS) for g in ctx.groups]
        ctx.lookups = Compiled(bags, [g.size for g in ctx.groups], memory, tables.place_R)
        return ctx.lookups.dense(tables.dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        assert len(ctx.saved_tensors) == 1
        grad_XD = grads[0].contiguous()
        if ctx.collecting is not None:
            ctx.collecting.add(grad_XD)
        for group, (index_N, grad_NS) in zip(ctx.groups, ctx.lookups.gradients(grad_XD), strict=True):
            if group.kernel is not None and len(index_N):
                apply_gradients(group.kernel, index_N, grad_NS)
        return None, None, None, None


class _Spread(torch.autograd.Function):
    """dense_XD from weights and where they go; backward, the gradients of these weights alone.

    `anchor` is as in `_InMainMemory`: no row need hold a weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shape: tuple[int, int],
        anchor: Tensor,
        collecting: _Collecting | None,
        lookups: list[Lookups],
        *values: Tensor,
    ) -> Tensor:
        ctx.lookups, ctx.collecting = lookups, collecting
        dense_XD = torch.zeros(shape, device=anchor.device)
        for value_NS, mine in zip(values, lookups, strict=True):
            mine.add(value_NS, dense_XD)
        return dense_XD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_XD = grads[0].contiguous()
        found = [mine.gradients(grad_XD) for mine in ctx.lookups]
        if ctx.collecting is not None:
            ctx.collecting.add(grad_XD)
        return (None, None, None, None, *found)
