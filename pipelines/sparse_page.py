"""The report's section on sparse tables: where their weights are, what they take, how much each field counts."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines import page, plots
from pipelines.plots import Plot
from pipelines.sparse_tables import described, size_of
from recsys.bundle import Bundle
from recsys.sparsity.describe import TENTHS, Bytes, Description, Table

DRAWN = 40
"""Tables and fields that are drawn, the largest; all stand in the list."""


def section(bundle: Bundle, drawn: list[Plot]) -> page.Html:
    """What a bundle's sparse tables say about themselves; nothing where its tables are dense."""
    found = described(bundle)
    if found is None or bundle.sparsity is None:
        return page.Html()
    kept_dense = found.active - found.budget
    return page.tag(
        "section",
        page.tag("h2", "Sparse tables"),
        page.tag("p", f"{found.budget:,} of {found.cells:,} weights exist, {found.budget / found.cells:.1%}; the run "
             f"asks for {bundle.sparsity.density:.1%}. Of all {found.network + found.active:,} parameters that exist, "
             f"{found.share_not_sparse:.1%} are not sparse at all: {found.network:,} outside the tables and "
             f"{kept_dense:,} in tables that are kept dense."),
        page.table(["", "sparse", "dense", "share"], list(_bytes(found.sparse, found.dense))),
        page.tag("p", "Dense: the same tables with every weight, trained by row-wise Adagrad.", kind="note"),
        page.tag("h3", "Where the weights are"),
        page.figures(*_by_popularity(bundle, found, drawn), *_over_time(bundle, found, drawn)),
        *_tables(found),
        *_strengths(found, drawn),
    )  # fmt: skip


def _bytes(sparse: Bytes, dense: Bytes) -> list[list[str]]:
    def row(what: str, note: str, first: int, second: int) -> list[str]:
        named = page.tag("span", what, page.tag("span", f" {note}", kind="note"))
        return [named, size_of(first), size_of(second), f"{first / second:.1%}" if second else ""]

    return [
        row("weights", "", sparse.weights, dense.weights),
        row("positions", "a byte for each weight", sparse.positions, dense.positions),
        row("padding", "slots that only fill up rows", sparse.padding, dense.padding),
        row("sizes", "how many weights each row has", sparse.sizes, dense.sizes),
        row("places", "where each row is, in memory", sparse.places, dense.places),
        row("optimizer's sums", "in training", sparse.state, dense.state),
        row("tables in training", "all of these", sparse.training, dense.training),
        row("tables in scoring", "without the sums", sparse.scoring, dense.scoring),
        row("Bundle", "tables and the other parameters on disk", sparse.bundle, dense.bundle),
        row("checkpoint", "both, and the optimizers' states", sparse.checkpoint, dense.checkpoint),
    ]


def _by_popularity(bundle: Bundle, found: Description, drawn: list[Plot]) -> list[page.Html]:
    """Density of the tenths of each table's rows, where rows may differ."""
    shown = [t for t in _largest(found.tables) if t.sparse and t.tenths]
    if not shown or bundle.sparsity is None or not bundle.sparsity.unequal:
        return []
    density_TX = np.array([[x.active / (x.rows * found.dim) for x in t.tenths] for t in shown])
    drawing = _heat(
        "sparse-by-popularity", "Density by popularity", density_TX, ("", [t.name for t in shown]), ("tenth", _PLACES)
    )
    caption = "Percent. Tenths of a table's rows by how often training looks them up: 1 is the most popular."
    return [page.figure(drawn, drawing, "By popularity", caption)]


def _over_time(bundle: Bundle, found: Description, drawn: list[Plot]) -> list[page.Html]:
    """How densities moved from epoch to epoch, where they did."""
    history = bundle.metrics.get("history", [])
    epochs = [f"{e['epoch']:.0f}" for e in history]
    tables = [t.name for t in _largest(found.tables) if t.sparse]
    figures: list[page.Html] = []
    for name, title, labels, keys in (
        ("sparse-over-time", "Tables over time", tables, [f"density.{t}" for t in tables]),
        ("sparse-tenths-over-time", "Tenths over time", _PLACES, [f"density_tenth.{i}" for i in _PLACES]),
    ):
        density_XE = np.array([[e.get(key, math.nan) for e in history] for key in keys])
        if len(epochs) > 1 and np.isfinite(density_XE).any() and np.nanmax(np.ptp(density_XE, axis=1)) > _STILL:
            what = "" if labels is tables else " Of the tenths of all tables, 1 being the most popular."
            drawing = _heat(name, title, density_XE, ("", labels), ("epoch", epochs))
            figures.append(page.figure(drawn, drawing, title, f"Percent, at the end of each epoch.{what}"))
    return figures


_PLACES = [str(i + 1) for i in range(TENTHS)]

_STILL = 1e-4
"""Densities that move by less do not move."""


def _heat(
    name: str, text: str, density: NDArray[np.float64], rows: tuple[str, list[str]], columns: tuple[str, list[str]]
) -> Plot:
    span = (0.0, float(np.nanmax(density)))
    return plots.heat(name, text, density, rows, columns, span=span, quantity="density", written=_percent)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.1f}"


def _largest(tables: Sequence[Table]) -> list[Table]:
    return sorted(tables, key=lambda t: t.rows, reverse=True)[:DRAWN]


def _tables(found: Description) -> list[page.Html]:
    head = ["table", "rows", "weights", "density", "sum of magnitudes", "spread"]
    rows = [
        [t.name, f"{t.rows:,}", f"{t.active:,}", f"{t.density:.1%}" if t.sparse else "kept dense",
         f"{t.magnitude:,.1f}", page.number(t.spread, ".3f")]
        for t in sorted(found.tables, key=lambda t: t.spread or 0.0, reverse=True)
    ]  # fmt: skip
    return [page.table(head, rows)]


def _strengths(found: Description, drawn: list[Plot]) -> list[page.Html]:
    strengths = [s for s in found.strengths() if s.spread is not None][:DRAWN]
    if not strengths:
        return []
    names, values = [s.field for s in strengths], [s.spread or 0.0 for s in strengths]
    drawing = plots.bars("sparse-fields", names, values, "spread")
    return [
        page.tag("h3", "How much each field counts"),
        page.tag("p", "Spread is how far apart a field's rows lie, each weighted by its lookups in training: what it "
                 "matters which id an example has. It is never 0, for rows keep some noise that they were drawn and "
                 "trained with, most where each is looked up seldom: so a field of many rare ids stands higher than "
                 "it deserves. To be sure of one, train with a copy of its column in shuffled order beside it, and "
                 "compare the two. The sum of magnitudes grows with the rows; it compares fields of about as many. "
                 "Numbers have no table and no rank."),
        page.figures(page.figure(drawn, drawing, "Fields by spread")),
    ]  # fmt: skip
