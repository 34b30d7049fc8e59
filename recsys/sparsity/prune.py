"""Magnitude pruning: sparse tables that hold the largest weights of trained dense ones. A yardstick for the others.

Shapes: R rows of a table, D embedding dimension, K rows of a chunk.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from recsys.sparsity.layout import UNIT, even_sizes, slots_of
from recsys.sparsity.tables import SparseTables

_CHUNK = 2**16


def pruned(tables: SparseTables, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `tables.adopt` takes: of `dense` weights_RD, by table, as many as the density means.

    Where rows may be unequal, the units of four weights with the largest sums over all tables; otherwise each row's
    largest weights, of which all rows of sparse tables have about as many whatever the allocation.
    """
    dense = {t.name: dense[t.name][:, : tables.dim] for t in tables.tables}  # dense rows may end in padding
    sizes = [
        torch.from_numpy(even_sizes(t.rows, tables.dim, _density(tables, t.sparse), unequal=_unequal(tables, t.sparse)))
        for t in tables.tables
    ]
    if tables.sparsity.unequal:
        chosen = [i for i, t in enumerate(tables.tables) if t.sparse]
        units = [_units(dense[tables.tables[i].name]) for i in chosen]
        total = sum(int(sizes[i].sum(dtype=torch.int64)) for i in chosen) // UNIT
        scores = torch.cat([u.flatten() for u in units])
        taken = torch.zeros(len(scores), dtype=torch.bool)
        taken[scores.topk(total).indices] = True
        for i, part, unit in zip(chosen, taken.split([u.numel() for u in units]), units, strict=True):
            sizes[i] = (part.view(unit.shape).sum(1) * UNIT).to(torch.uint8)
    sizes_R = torch.cat(sizes)
    found = {"rows_T": torch.tensor([t.rows for t in tables.tables]), "sizes_R": sizes_R}
    for size in torch.unique(sizes_R).tolist():
        values, positions = [torch.zeros(0, slots_of(size))], [torch.zeros(0, slots_of(size), dtype=torch.uint8)]
        for table, mine_R in zip(tables.tables, sizes, strict=True):
            for rows_K in (mine_R == size).nonzero().squeeze(1).split(_CHUNK):
                weights_KD = dense[table.name][rows_K]
                at = weights_KD.abs().topk(size, dim=1).indices.sort(1).values
                padding = (0, slots_of(size) - size)
                values.append(torch.nn.functional.pad(weights_KD.gather(1, at), padding))
                positions.append(torch.nn.functional.pad(at.to(torch.uint8), padding))
        found |= {f"values.{size}": torch.cat(values), f"positions.{size}": torch.cat(positions)}
    return found


def _units(weights_RD: Tensor) -> Tensor:
    """Sums of a row's largest four magnitudes, of the next four, and so on: they fall."""
    whole = weights_RD.shape[1] // UNIT * UNIT
    ordered = weights_RD.abs().sort(dim=1, descending=True).values[:, :whole]
    return ordered.unflatten(1, (-1, UNIT)).sum(2)


def _density(tables: SparseTables, sparse: bool) -> float:
    return tables.sparsity.density if sparse else 1.0


def _unequal(tables: SparseTables, sparse: bool) -> bool:
    return tables.sparsity.unequal and sparse
