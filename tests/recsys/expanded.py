"""Sparse tables as the dense ones that they stand for: rows x dim, which only tests may afford."""

from collections.abc import Callable

import torch
from torch import Tensor

from recsys.sparsity.tables import Group, SparseTables


def weights(tables: SparseTables) -> dict[str, Tensor]:
    """By table, weights_RD; inactive ones are 0."""
    return _spread(tables, lambda group: group.values_NS[:, : group.size])


def masks(tables: SparseTables) -> dict[str, Tensor]:
    """By table, active_RD."""
    return {n: m == 1 for n, m in _spread(tables, lambda group: torch.ones(len(group), group.size)).items()}


def sums(tables: SparseTables) -> dict[str, Tensor]:
    """By table, Adagrad's sums: state_R, or state_RD where each weight has its own."""
    if tables.sparsity.state == "row":
        rows = torch.zeros(tables.rows)
        for group in tables.groups:
            if group.state is not None:
                rows[tables.sizes_R == group.size] = group.state
        return _split(tables, rows)
    return _spread(tables, lambda g: torch.empty(len(g), 0) if g.state is None else g.state[:, : g.size])


def put(tables: SparseTables, dense: dict[str, Tensor]) -> None:
    """Set the active weights to those of dense tables."""
    all_RD = torch.cat([dense[t.name] for t in tables.tables])
    for group in tables.groups:
        mine_ND = all_RD[tables.sizes_R == group.size]
        group.values_NS[:, : group.size] = mine_ND.gather(1, group.positions_NS[:, : group.size].long())


def redraw(tables: SparseTables, std: float) -> None:
    """Set the active weights to normal ones."""
    for group in tables.groups:
        group.values_NS[:, : group.size] = torch.randn(len(group), group.size) * std


def _spread(tables: SparseTables, part: Callable[[Group], Tensor]) -> dict[str, Tensor]:
    all_RD = torch.zeros(tables.rows, tables.dim)
    for group in tables.groups:
        mine_ND = torch.zeros(len(group), tables.dim)
        mine_ND.scatter_(1, group.positions_NS[:, : group.size].long(), part(group).detach())
        all_RD[tables.sizes_R == group.size] = mine_ND
    return _split(tables, all_RD)


def _split(tables: SparseTables, all_RX: Tensor) -> dict[str, Tensor]:
    parts = all_RX.split([t.rows for t in tables.tables])
    return {t.name: part for t, part in zip(tables.tables, parts, strict=True)}
