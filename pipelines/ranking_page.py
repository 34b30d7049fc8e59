"""The report's section on a retrieval model: full ranking, whole and by popularity of the item."""

import math
from collections.abc import Mapping, Sequence

import polars as pl

from pipelines import page, plots
from pipelines.config import Retrieval
from pipelines.page import Html
from pipelines.plots import Plot

_METRICS = {
    "recall": "share of what a user should get that is shown",
    "NDCG": "the same, with more for the first places",
    "MAP": "precision at the hits, averaged",
    "MRR": "1 / rank of the first hit, in the whole ranking",
    "coverage": "share of the items that are shown to anybody",
}


def section(table: pl.DataFrame, retrieval: Retrieval, drawn: list[Plot]) -> Html:
    """The metrics of every slice, a table for each K; the first is drawn."""
    whole = table.row(0, named=True)
    parts: list[Html] = []
    for k in retrieval.k:
        head = ["items", "number", "users", *_METRICS]
        rows = [
            [r["slice"], f"{r['items']:,}", f"{r['users']:,}", *(page.number(r[m.lower()], ".4f") for m in _METRICS)]
            for r in table.filter(pl.col("k") == k).iter_rows(named=True)
        ]
        parts += [page.tag("h3", f"The first {k}"), page.table(head, rows)]
    return page.tag(
        "section",
        page.tag("h2", "Quality of the ranking"),
        page.tag("p", f"All {whole['items']:,} items ranked for {whole['users']:,} users, without what they had seen "
                 f"before. Of what they should get, {whole['recall'] or 0:.1%} is among the first {whole['k']}."),
        page.figures(_by_popularity(table, retrieval.k[0], drawn)),
        *parts,
        page.tag("p", f"Head: the {retrieval.head:.0%} of the items in training with the most rows; torso: the next "
                 f"{retrieval.torso:.0%}; tail: the others; cold: not in training at all. A slice counts its own items "
                 "alone as what users should get, in the same ranking of all.", kind="note"),
        page.tag("p", *(f"{name}: {meaning}. " for name, meaning in _METRICS.items()), kind="note"),
    )  # fmt: skip


def _by_popularity(table: pl.DataFrame, k: int, drawn: list[Plot]) -> Html:
    """Recall of the slices that somebody should get items of."""
    shown = table.filter(pl.col("k") == k, pl.col("recall").is_not_null())
    drawing = plots.bars("recall-by-popularity", shown["slice"].to_list(), shown["recall"].to_list(), f"recall@{k}")
    return page.figure(drawn, drawing, f"Recall@{k} by popularity")


def learning(history: Sequence[Mapping[str, float]], best: int, k: int, drawn: list[Plot]) -> list[Html]:
    """Recall and NDCG on the validation users, by epoch."""
    figures: list[Html] = []
    for metric, title in (("recall", "Recall"), ("ndcg", "NDCG")):
        points = [(e["epoch"], e.get(f"{metric}_{k}", math.nan)) for e in history]
        drawing = plots.epochs(f"epochs-{metric}", f"{title}@{k}", {"validation": points}, best)
        figures.append(page.figure(drawn, drawing, f"{title}@{k}"))
    return figures
