"""Mutual information between the features of items: which of them say the same.

Counted in Polars, whole numbers only; floats are summed in an order of their own, so that a corpus has one answer.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.schema import Dense, Sparse

# Shape suffixes: S = features of the item. n(x) is a number of items, N that of all, g(n) = n log n.

BINS = 16
"""A number counts as one of so many parts of the corpus, each with as many items, up to ties."""


def mutual_information(frame: pl.DataFrame, fields: Sequence[Sparse | Dense]) -> NDArray[np.float64]:
    """I_SS between the fields of items, a row each, in nats; 0 on the diagonal.

    Of a field with many values it is that of each value's presence, averaged over the values (over pairs of values,
    if both fields have many); 0 where no item has a value.
    """
    found_SS = np.zeros((len(fields), len(fields)))
    frame = frame.select(pl.col(f.name).alias(str(i)) for i, f in enumerate(fields))
    fields = [f.model_copy(update={"name": str(i)}) for i, f in enumerate(fields)]  # unlike any column of counts
    values = frame.select(_discrete(f, frame.height) for f in fields)
    counts = {f.name: _one_each(values.select(f.name)).group_by(f.name).len() for f in fields}
    for (i, a), (j, b) in combinations(enumerate(fields), 2):
        first, second = (b, a) if _multi(b) else (a, b)  # many values come first
        found_SS[i, j] = found_SS[j, i] = max(0.0, _information(values, first, second, counts))
    return found_SS


def _multi(field: Sparse | Dense) -> bool:
    return isinstance(field, Sparse) and field.multi


def _discrete(field: Sparse | Dense, rows: int) -> pl.Expr:
    column = pl.col(field.name)
    if isinstance(field, Dense):
        return (column.rank("min").cast(pl.Int64) - 1) * BINS // rows
    return column.list.unique() if field.multi else column


def _one_each(table: pl.DataFrame) -> pl.DataFrame:
    """A row for each value, or pair of values."""
    for name, kind in table.schema.items():
        if isinstance(kind, pl.List):
            table = table.explode(name, empty_as_null=False, keep_nulls=False)
    return table


def _information(values: pl.DataFrame, a: Sparse | Dense, b: Sparse | Dense, counts: dict[str, pl.DataFrame]) -> float:
    """Of two fields, from the cells of their contingency tables; I = log N + (Σ g(n_ab) - Σ g(n_a) - Σ g(n_b)) / N.

    With many values there is a table for each value v, or pair v, w. What most cells would hold if no item had both is
    counted once for all; what the pairs that some item has change in it, is added.
    """
    rows, of_a, of_b = values.height, counts[a.name], counts[b.name]
    if not (of_a.height and of_b.height):
        return 0.0
    joint = _one_each(values.select(a.name, b.name)).group_by(a.name, b.name).len("both")
    joint = joint.join(of_a.rename({"len": "a"}), on=a.name).join(of_b.rename({"len": "b"}), on=b.name)
    joint = joint.select(pl.col("both", "a", "b").cast(pl.Int64))
    both, n_a, n_b = pl.col("both"), pl.col("a"), pl.col("b")
    if not _multi(a):
        found = _sum(joint, both) - _sum(of_a, _LEN) - _sum(of_b, _LEN)
        return float(np.log(rows) + found / rows)
    of_each_a = _sum(of_a, _LEN) + _sum(of_a, rows - _LEN)
    if not _multi(b):
        found = _sum(joint, both) + _sum(joint, n_b - both) - _sum(joint, n_b) - of_each_a
        return float(np.log(rows) + found / of_a.height / rows)
    of_each_b = _sum(of_b, _LEN) + _sum(of_b, rows - _LEN)
    cells = of_b.height * _sum(of_a, _LEN) + of_a.height * _sum(of_b, _LEN) + _sum_of_neither(of_a, of_b, rows)
    changed = _sum(joint, both) + _sum(joint, n_a - both) + _sum(joint, n_b - both)
    changed += _sum(joint, rows - n_a - n_b + both)
    changed -= _sum(joint, n_a) + _sum(joint, n_b) + _sum(joint, rows - n_a - n_b)
    found = cells + changed - of_b.height * of_each_a - of_a.height * of_each_b
    return float(np.log(rows) + found / of_a.height / of_b.height / rows)


_LEN = pl.col("len").cast(pl.Int64)


def _sum(table: pl.DataFrame, count: pl.Expr) -> float:
    """Σ g(count) over the rows, 0 where it is not above 0."""
    found = table.group_by(count.alias("n")).len("times").filter(pl.col("n") > 0).sort("n")
    n, times = (found[name].to_numpy().astype(np.float64) for name in ("n", "times"))
    return float((times * n * np.log(n)).sum())


def _sum_of_neither(of_a: pl.DataFrame, of_b: pl.DataFrame, rows: int) -> float:
    """Σ g(N - n_v - n_w) over all pairs of values, by the numbers that occur: these are few."""
    a, b = (t.group_by(_LEN.alias("n")).len("times").sort("n") for t in (of_a, of_b))
    n = rows - a["n"].to_numpy()[:, None] - b["n"].to_numpy()[None].astype(np.float64)
    times = a["times"].to_numpy().astype(np.float64)[:, None] * b["times"].to_numpy()[None]
    return float((times * n * np.log(n, where=n > 0, out=np.zeros_like(n)))[n > 0].sum())
