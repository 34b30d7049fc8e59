"""Magnitude pruning against brute force: every row's largest weights, or the largest units of all rows."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from features.schema import Schema, Sparse
from recsys.bundle import load_model
from recsys.checkpoint import TABLE
from recsys.models import FMConfig, build_model
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.layout import UNIT, even_sizes, even_total
from recsys.sparsity.prune import pruned
from recsys.sparsity.tables import SparseTable, SparseTables
from tests.recsys import expanded


def tables_of(rows: list[int], dim: int, sparsity: Sparsity, kept: tuple[int, ...] = ()) -> SparseTables:
    tables = [SparseTable(f"t{i}", f"f{i}", n, False, i not in kept) for i, n in enumerate(rows)]
    return SparseTables(tables, dim, sparsity, torch.device("meta"), 0.1)


def dense_of(rows: list[int], dim: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of very different sizes, so that rows of unequal numbers of weights have something to choose from."""
    rng = np.random.default_rng(seed)
    return {
        f"t{i}": torch.from_numpy(rng.normal(size=(n, dim)) * np.exp(rng.normal(size=(n, 1)))).float()
        for i, n in enumerate(rows)
    }


def after(tables: SparseTables, dense: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """weights_RD and active_RD of the pruned tables, which adopt what they are given."""
    tables.adopt(pruned(tables, dense), Path("pruned"))
    return expanded.weights(tables), expanded.masks(tables)


@pytest.mark.parametrize(("dim", "density"), [(16, 0.25), (16, 0.3), (16, 0.1), (6, 0.5), (12, 1.0)])
def test_equal_rows_keep_their_largest_weights(dim: int, density: float) -> None:
    rows = [40, 7]
    dense = dense_of(rows, dim)
    tables = tables_of(rows, dim, Sparsity(density=density), kept=(1,))
    weights, masks = after(tables, dense)
    for i, name in enumerate(dense):
        sizes_R = even_sizes(rows[i], dim, 1.0 if i == 1 else density, unequal=False)
        for row_D, found_D, mask_D, size in zip(dense[name], weights[name], masks[name], sizes_R, strict=True):
            order = sorted(range(dim), key=lambda d: -abs(float(row_D[d])))
            largest = sorted(order[: int(size)])
            assert mask_D.nonzero().flatten().tolist() == largest
            assert found_D[largest].equal(row_D[largest])
            assert not found_D[~mask_D].any()
    assert masks["t1"].all()


@pytest.mark.parametrize("sparsity", [{"schedule": Schedule(redistribute=1.0)}, {"allocation": "popularity"}])
def test_unequal_rows_keep_the_most_magnitude_that_whole_units_can(sparsity: dict) -> None:
    """Against every way to share so few units among so few rows."""
    rows, dim = [3, 2, 2], 12
    for seed in range(5):
        dense = dense_of(rows, dim, seed)
        tables = tables_of(rows, dim, Sparsity(density=0.5, **sparsity), kept=(1,))
        weights, masks = after(tables, dense)
        assert masks["t1"].all()
        total = sum(even_total(rows[i], dim, 0.5, unequal=True) for i in (0, 2))
        sparse_RD = torch.cat([dense["t0"], dense["t2"]]).abs()
        kept_RD = torch.cat([masks["t0"], masks["t2"]])
        assert int(kept_RD.sum()) == total
        sorted_RD = sparse_RD.sort(1, descending=True).values
        best = max(
            sum(float(sorted_RD[r, : UNIT * n].sum()) for r, n in enumerate(units))
            for units in product(range(dim // UNIT + 1), repeat=len(sorted_RD))
            if sum(units) * UNIT == total
        )
        assert float(sparse_RD[kept_RD].sum()) == pytest.approx(best, rel=1e-6)
        for name in ("t0", "t2"):
            assert weights[name].equal(dense[name] * masks[name])
            partly = [r for r, mask_D in enumerate(masks[name]) if 0 < mask_D.sum() < dim]
            assert partly
            for row_D, mask_D in zip(dense[name][partly].abs(), masks[name][partly], strict=True):
                assert row_D[mask_D].min() >= row_D[~mask_D].max()
        assert len({int(n) for n in kept_RD.sum(1)}) > 1


def test_equal_magnitudes_do_not_change_the_number_of_weights() -> None:
    tables = tables_of([9, 5], 12, Sparsity(density=0.4, schedule=Schedule(redistribute=1.0)))
    _, masks = after(tables, {"t0": torch.ones(9, 12), "t1": torch.zeros(5, 12)})
    found = sum(int(m.sum()) for m in masks.values())
    assert found == even_total(9, 12, 0.4, unequal=True) + even_total(5, 12, 0.4, unequal=True)
    assert masks["t0"].sum() > masks["t1"].sum()


@pytest.mark.parametrize("allocation", ["uniform", "er", "popularity"])
def test_a_dense_models_padding_is_no_weight(allocation: str) -> None:
    """Dense rows of 6 are stored as 8, and what nothing reads is as large as the rest."""
    schema = Schema(keys=(), dense=(), sparse=(Sparse(name="a", rows=50), Sparse(name="b", rows=9)), labels=("click",))
    schedule = {"redistribute": 1.0 if allocation == "popularity" else 0.0}
    given = {"density": 0.6, "allocation": allocation, "schedule": schedule}
    config, sparsity = FMConfig(dim=5), Sparsity.model_validate(given)
    plain = build_model(config, schema)
    weights = dict(plain.state_dict())
    dense = {name: weights.pop(TABLE.format(name)) for name in ("a", "b")}
    assert dense["a"].shape == (50, 8)
    dense["a"][:, 6:] = 100.0
    tables = build_model(config, schema, table_device="meta", sparsity=sparsity).embed.tables
    assert isinstance(tables, SparseTables)
    found = {f"embed.tables.{name}": t for name, t in pruned(tables, dense).items()}
    # What numbers have is of the same width.
    weights = {n: t[:, :6] if n == "embed.numeric_ND" else t for n, t in weights.items()}
    model = load_model(config, schema, weights | found, where=Path("pruned"), sparsity=sparsity)
    assert isinstance(model.embed.tables, SparseTables)
    assert expanded.weights(model.embed.tables)["a"].abs().max() < 100
