"""What sparse tables are in numbers: where their weights lie, what they take beside dense ones, how strong fields are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from base.config import Config
from recsys.embeddings import WIDTH_UNIT, feature_of
from recsys.sparsity.layout import slots_of
from recsys.sparsity.tables import SparseTables

# Shape suffixes: R = rows of all tables or of one, K = chosen rows.

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
    lookups: int | None
    """In training; None where nobody counted."""
    met: float | None
    """Summed magnitude of a row's weights, the mean over the lookups in training."""
    tenths: tuple[Tenth, ...]
    """The most popular first."""


class Strength(Config):
    """How much a field weighs: all of its tables together."""

    field: str
    magnitude: float
    """Sum of its weights' magnitudes, a field with more rows having more of them (QuickSelection: Atashgahi et al.,
    Machine Learning 2022)."""
    met: float | None
    """What an example meets of it, whatever its rows: the mean over lookups of a row's summed magnitude."""


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
        """Of the tables on disk and when scoring starts, without the optimizer's sums."""
        return self.weights + self.positions + self.padding + self.sizes

    @property
    def training(self) -> int:
        """Of the tables and the optimizer's sums, in memory."""
        return self.stored + self.places + self.state

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
        """One per field with a table; the strongest first by what an example meets, or by the sum where unknown."""
        found: list[Strength] = []
        for field in dict.fromkeys(t.field for t in self.tables):
            mine = [t for t in self.tables if t.field == field]
            met = [t.met for t in mine if t.met is not None]
            total = sum(met) if len(met) == len(mine) else None
            found.append(Strength(field=field, magnitude=sum(t.magnitude for t in mine), met=total))
        return sorted(found, key=lambda s: (s.magnitude if s.met is None else s.met), reverse=True)


def describe(model: nn.Module, counts: Sequence[Tensor] | None = None) -> Description | None:
    """Numbers of a model's sparse tables; None if its tables are dense. No tensor of a table's size is made.

    `counts`: per sparse feature, how often each row of its table was looked up in training.
    """
    tables = next((m for m in model.modules() if isinstance(m, SparseTables)), None)
    if tables is None:
        return None
    magnitude_R = row_magnitudes(tables)
    found: list[Table] = []
    for table, start in zip(tables.tables, tables.starts, strict=True):
        mine = slice(start, start + table.rows)
        counts_R = None if counts is None else counts[table.feature]
        active = int(tables.sizes_R[mine].sum(dtype=torch.int64))
        lookups = None if counts_R is None else int(counts_R.sum())
        found.append(
            Table(
                name=table.name,
                field=feature_of(table.name),
                rows=table.rows,
                sparse=table.sparse,
                active=active,
                density=active / (table.rows * tables.dim),
                magnitude=float(magnitude_R[mine].sum(dtype=torch.float64)),
                lookups=lookups,
                met=_met(magnitude_R[mine], counts_R) if lookups else None,
                tenths=() if counts_R is None else _tenths(tables.sizes_R[mine], counts_R),
            )
        )
    network = sum(p.numel() for p in model.parameters())
    return Description(
        dim=tables.dim,
        tables=tuple(found),
        network=network,
        sparse=_sparse_bytes(tables, network),
        dense=_dense_bytes(tables.rows, tables.dim, network),
    )


def row_magnitudes(tables: SparseTables) -> Tensor:
    """magnitude_R: the sum of the magnitudes of each row's weights."""
    found_R = torch.zeros(tables.rows)
    read = dict.fromkeys((g.size for g in tables.groups), 0)
    for first in range(0, tables.rows, _CHUNK):
        sizes_K = tables.sizes_R[first : first + _CHUNK]
        for group in tables.groups:
            mine_K = sizes_K == group.size
            start = read[group.size]
            read[group.size] = stop = start + int(mine_K.sum())
            # Slots that only fill up a row hold 0.
            found_R[first : first + _CHUNK][mine_K] = group.values_NS[start:stop].detach().abs().sum(1).cpu()
    return found_R


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
    def over(cls, tables: SparseTables, counts: Sequence[Tensor] | None) -> Self:
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
                found[f"density.{table.name}"] = active / (table.rows * tables.dim)
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


def _met(magnitude_R: Tensor, counts_R: Tensor) -> float:
    total = 0.0
    for magnitude_K, counts_K in zip(magnitude_R.split(_CHUNK), counts_R.split(_CHUNK), strict=True):
        total += float(magnitude_K.double() @ counts_K.double())
    return total / int(counts_R.sum())


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


def _dense_bytes(rows: int, dim: int, network: int) -> Bytes:
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
