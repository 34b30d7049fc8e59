"""Sparse tables in numbers: where their weights are, what they take beside dense ones, how much each field counts."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection

from base.config import Config
from recsys.embeddings import WIDTH_UNIT, shown
from recsys.sparsity.layout import slots_of
from recsys.sparsity.tables import SparseTables

# Shape suffixes: R = rows of all tables or of one, K = chosen rows, S = weights of a row, T = tables, D = embedding
# dimension.

TENTHS = 10
"""Parts of a table's rows by popularity; a table of fewer rows has none."""

_CHUNK = 2**16
"""Rows that are worked on at a time, so that what is made of them stays small."""

_FLOAT = 4


class Tenth(Config):
    """A tenth of a table's rows, by how often training looked them up."""

    rows: int
    lookups: int
    active: int
    """Weights."""


class Table(Config):
    """One table."""

    name: str
    field: str
    """Whose ids look it up; independent copies for several tasks are tables of one field."""
    rows: int
    sparse: bool
    """Whether the density is for it; otherwise it holds every weight."""
    active: int
    """Weights that exist."""
    density: float
    magnitude: float
    """Sum of its weights' magnitudes."""
    spread: float | None
    """How far apart its rows lie: their standard deviation, all positions together, over the lookups in training; None
    where nobody counted them."""
    tenths: tuple[Tenth, ...]
    """The most popular first."""


class Strength(Config):
    """How much a field counts: all of its tables together."""

    field: str
    magnitude: float
    """Sum of its weights' magnitudes (QuickSelection: Atashgahi et al., Machine Learning 2022). It grows with the rows,
    so it compares fields of about as many."""
    spread: float | None
    """How much it matters which id an example has, whatever the number of rows: what all rows have in common is left
    out, and a row counts by its lookups."""


class Bytes(Config):
    """What tables take, and the network of the same model."""

    weights: int
    positions: int
    padding: int
    """Slots beside weights and positions that only fill up rows."""
    sizes: int
    """How many weights each row has."""
    places: int
    """Where each row is, in memory only."""
    state: int
    """The optimizer's sums, with their padding; in training only."""
    network: int
    """Parameters that are in no table."""

    @property
    def stored(self) -> int:
        """Of the tables on disk, without the optimizer's sums."""
        return self.weights + self.positions + self.padding + self.sizes

    @property
    def scoring(self) -> int:
        """Of the tables in memory, without the optimizer's sums."""
        return self.stored + self.places

    @property
    def training(self) -> int:
        """Of the tables and the optimizer's sums, in memory."""
        return self.scoring + self.state

    @property
    def bundle(self) -> int:
        """Of a Bundle's weights on disk."""
        return self.stored + self.network

    @property
    def checkpoint(self) -> int:
        """Of a checkpoint between two windows of gradients, with Adam's two moments of the network."""
        return self.stored + self.state + 3 * self.network


class Description(Config):
    """A model with sparse tables."""

    dim: int
    state: Literal["row", "element"] = "row"
    """What Adagrad has a sum of."""
    tables: tuple[Table, ...]
    network: int
    """Parameters that are in no table."""
    sparse: Bytes
    dense: Bytes
    """The same model with dense tables under row-wise Adagrad."""

    @property
    def active(self) -> int:
        """Weights of all tables: the budget, and those of tables that are kept dense."""
        return sum(t.active for t in self.tables)

    @property
    def budget(self) -> int:
        """Active weights of the tables that the density is for."""
        return sum(t.active for t in self.tables if t.sparse)

    @property
    def cells(self) -> int:
        """Weights that these tables would have if they were dense."""
        return sum(t.rows for t in self.tables if t.sparse) * self.dim

    @property
    def not_sparse(self) -> int:
        """Parameters that are not sparse at all: the network, and tables that are kept dense."""
        return self.network + self.active - self.budget

    @property
    def share_not_sparse(self) -> float:
        """Of all parameters that exist."""
        return self.not_sparse / (self.network + self.active)

    def strengths(self) -> list[Strength]:
        """One per field with a table; the strongest first by its spread, or by the sum where that is not known."""
        found: list[Strength] = []
        for field in dict.fromkeys(t.field for t in self.tables):
            mine = [t for t in self.tables if t.field == field]
            spreads = [t.spread for t in mine if t.spread is not None]
            spread = math.hypot(*spreads) if len(spreads) == len(mine) else None
            found.append(Strength(field=field, magnitude=sum(t.magnitude for t in mine), spread=spread))
        return sorted(found, key=lambda s: s.magnitude if s.spread is None else s.spread, reverse=True)


def describe(model: nn.Module, counts: Mapping[str, Tensor] | None = None) -> Description | None:
    """Numbers of a model's sparse tables; None if its tables are dense. No tensor of a table's size is made.

    `counts`: by sparse feature, how often each row of its table was looked up in training.
    """
    tables = next((m for m in model.modules() if isinstance(m, SparseTables)), None)
    if tables is None:
        return None
    magnitudes, spreads = _strengths(tables, counts)
    found: list[Table] = []
    for i, (table, start) in enumerate(zip(tables.tables, tables.starts, strict=True)):
        sizes_R = tables.sizes_R[start : start + table.rows]
        active = int(sizes_R.sum(dtype=torch.int64))
        found.append(
            Table(
                name=shown(table.name),
                field=table.feature,
                rows=table.rows,
                sparse=table.sparse,
                active=active,
                density=active / (table.rows * tables.dim),
                magnitude=magnitudes[i],
                spread=spreads[i],
                tenths=() if counts is None else _tenths(sizes_R, counts[table.feature]),
            )
        )
    network = sum(p.numel() for p in model.parameters())
    return Description(
        dim=tables.dim,
        state=tables.sparsity.state,
        tables=tuple(found),
        network=network,
        sparse=_sparse_bytes(tables, network),
        dense=dense_bytes(tables.rows, tables.dim, network),
    )


def bytes_of(model: nn.Module) -> Bytes:
    """What the tables of a model take, sparse or dense, and its network. Dense ones are trained by row-wise Adagrad."""
    network = sum(p.numel() for p in model.parameters())
    tables = next((m for m in model.modules() if isinstance(m, SparseTables | EmbeddingBagCollection)), None)
    assert tables is not None
    if isinstance(tables, SparseTables):
        return _sparse_bytes(tables, network)
    found = [(t.num_embeddings, t.embedding_dim) for t in tables.embedding_bag_configs()]
    (dim,) = {dim for _, dim in found}
    rows = sum(rows for rows, _ in found)
    return dense_bytes(rows, dim, network - rows * dim)


def _strengths(tables: SparseTables, counts: Mapping[str, Tensor] | None) -> tuple[list[float], list[float | None]]:
    """Per table the sum of its weights' magnitudes, and the spread of its rows."""
    number = len(tables.tables)
    magnitude_T, square_T, lookups_T = (torch.zeros(number, dtype=torch.float64) for _ in range(3))
    sum_TD = torch.zeros(number, tables.dim, dtype=torch.float64)
    for i, rows_K, values_KS, positions_KS in _parts(tables):
        values_KS = values_KS.double()
        magnitude_T[i] += values_KS.abs().sum()
        if counts is not None:
            counts_K = counts[tables.tables[i].feature][rows_K].double()
            lookups_T[i] += counts_K.sum()
            square_T[i] += counts_K @ values_KS.square().sum(1)
            sum_TD[i].index_add_(0, positions_KS.reshape(-1), (values_KS * counts_K[:, None]).reshape(-1))
    mean_TD = sum_TD / lookups_T[:, None]
    spread_T = (square_T / lookups_T - mean_TD.square().sum(1)).clamp(min=0).sqrt()
    spreads = [s if n else None for s, n in zip(spread_T.tolist(), lookups_T.tolist(), strict=True)]
    return magnitude_T.tolist(), spreads


def _parts(tables: SparseTables) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """All weights, some rows at a time: the table's number, rows_K in it, values_KS and positions_KS."""
    read = dict.fromkeys((g.size for g in tables.groups), 0)
    for i, (table, start) in enumerate(zip(tables.tables, tables.starts, strict=True)):
        for first in range(0, table.rows, _CHUNK):
            sizes_K = tables.sizes_R[start + first : start + min(first + _CHUNK, table.rows)]
            for group in tables.groups:
                rows_K = (sizes_K == group.size).nonzero().squeeze(1) + first
                place = slice(read[group.size], read[group.size] + len(rows_K))
                read[group.size] = place.stop
                if len(rows_K) and group.size:
                    values_KS, positions_KS = (x[place, : group.size] for x in (group.values_NS, group.positions_NS))
                    yield i, rows_K, values_KS.detach().cpu(), positions_KS.cpu().long()


def tenths_of(counts_R: Tensor) -> Tensor:
    """tenth_R uint8: 0 for the tenth of the rows that is looked up most, and so on; equal ones by their numbers."""
    rows = len(counts_R)
    tenth_R = torch.empty(rows, dtype=torch.uint8)
    order_R = counts_R.argsort(descending=True, stable=True)
    tenth_R[order_R] = (torch.arange(rows) * TENTHS // rows).to(torch.uint8)
    return tenth_R


@dataclass(frozen=True)
class Watch:
    """Tells where the weights of tables are while training moves them; it reads one byte a row."""

    tables: SparseTables
    tenth_R: Tensor | None
    """uint8: each row's tenth of its table, TENTHS for rows of tables without; None where all rows have alike."""

    @classmethod
    def over(cls, tables: SparseTables, counts: Mapping[str, Tensor] | None) -> Self:
        """`counts`: lookups in training of each feature's rows, where rows may differ."""
        if counts is None:
            return cls(tables, None)
        parts = [
            tenths_of(counts[t.feature]) if t.sparse and t.rows >= TENTHS else torch.full((t.rows,), TENTHS)
            for t in tables.tables
        ]
        return cls(tables, torch.cat([p.to(torch.uint8) for p in parts]))

    def densities(self) -> dict[str, float]:
        """Of each sparse table, `density.user_id`; and of the tenths of all tables by popularity, `density_tenth.1`."""
        tables, found = self.tables, dict[str, float]()
        for table, start in zip(tables.tables, tables.starts, strict=True):
            if table.sparse:
                active = int(tables.sizes_R[start : start + table.rows].sum(dtype=torch.int64))
                found[f"density.{shown(table.name)}"] = active / (table.rows * tables.dim)
        if self.tenth_R is None:
            return found
        rows, active = torch.zeros(TENTHS + 1), torch.zeros(TENTHS + 1, dtype=torch.float64)
        for tenth_K, sizes_K in zip(self.tenth_R.split(_CHUNK), tables.sizes_R.split(_CHUNK), strict=True):
            rows += torch.bincount(tenth_K, minlength=TENTHS + 1)
            active += torch.bincount(tenth_K, sizes_K.double(), minlength=TENTHS + 1)
        shares = (active / rows.clamp(min=1) / tables.dim).tolist()
        return found | {f"density_tenth.{i + 1}": shares[i] for i in range(TENTHS) if rows[i]}


def _tenths(sizes_R: Tensor, counts_R: Tensor) -> tuple[Tenth, ...]:
    if len(counts_R) < TENTHS:
        return ()
    tenth_R = tenths_of(counts_R)
    chosen = [tenth_R == i for i in range(TENTHS)]
    return tuple(
        Tenth(
            rows=int(mine_R.sum()),
            lookups=int(counts_R[mine_R].sum()),
            active=int(sizes_R[mine_R].sum(dtype=torch.int64)),
        )
        for mine_R in chosen
    )


def _sparse_bytes(tables: SparseTables, network: int) -> Bytes:
    groups = [(g.size, slots_of(g.size), len(g)) for g in tables.groups]
    by_row = tables.sparsity.state == "row"
    return Bytes(
        weights=_FLOAT * tables.budget,
        positions=tables.budget,
        padding=(_FLOAT + 1) * sum((slots - size) * rows for size, slots, rows in groups),
        sizes=tables.sizes_R.nbytes,
        places=0 if tables.place_R is None else tables.place_R.nbytes,
        state=_FLOAT * sum((1 if by_row else slots) * rows for size, slots, rows in groups if size),
        network=_FLOAT * network,
    )


def dense_bytes(rows: int, dim: int, network: int) -> Bytes:
    """What dense tables of `rows` in all take under row-wise Adagrad, beside `network` parameters."""
    more = -dim % WIDTH_UNIT
    return Bytes(
        weights=_FLOAT * rows * dim,
        positions=0,
        padding=_FLOAT * rows * more,
        sizes=0,
        places=0,
        state=_FLOAT * rows,
        network=_FLOAT * network,
    )
