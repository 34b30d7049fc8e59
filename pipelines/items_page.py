"""The report's section on items: some of them, each with those that its tower puts nearest, to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipelines import page
from pipelines.config import Retrieval, Run
from pipelines.examples import good_rows
from pipelines.page import Html
from recsys.bundle import Bundle
from recsys.models.two_tower import TwoTower
from recsys.retrieval import COUNT, ITEM, ITEMS, SLICES, Ranking
from recsys.trainer import passed

# Shape suffixes: I = items, X = items shown, K = neighbours of each, D = dimension.

NEAREST = 5
SHOWN = {"head": 2, "tail": 2, "cold": 2}
"""Items of each slice whose neighbours are shown."""
COLUMNS = 8
"""Raw columns beside them."""
_CHUNK = 2**16


@dataclass(frozen=True)
class Neighbours:
    """Places of items in the corpus, and of those nearest to each of them."""

    items_X: NDArray[np.int64]
    nearest_XK: NDArray[np.int64]
    cosine_XK: NDArray[np.float64]


def section(run: Run, bundle: Bundle, ranking: Ranking, partitions: Sequence[str]) -> Html:
    """Items of the head, of the tail and cold ones with their nearest neighbours and a few raw columns."""
    assert run.retrieval is not None
    corpus = pl.read_parquet(ranking.folder / ITEMS, columns=[ITEM, COUNT])
    slices_I = ranking.slices()
    chosen_X = chosen(slices_I, corpus[COUNT].to_numpy())
    found = neighbours(item_vectors(bundle, ranking), chosen_X)
    named = corpus.with_columns(pl.Series("slice", SLICES).gather(pl.Series(slices_I)))
    places = np.unique(np.concatenate([found.items_X, found.nearest_XK.ravel()]))
    columns = shown_columns(bundle, run.retrieval)
    known = raw_columns(run, run.retrieval, named[places][ITEM], columns, partitions)
    parts: list[Html] = []
    for i, place in enumerate(found.items_X.tolist()):
        own = named.row(place, named=True)
        rows = [(place, None), *zip(found.nearest_XK[i].tolist(), found.cosine_XK[i].tolist(), strict=True)]
        title = f"{run.retrieval.item} {own[ITEM]}: {own['slice']}, training rows: {own[COUNT]:,}"
        parts += [page.tag("h3", title), _table(named, known, rows, columns, run.retrieval.item)]
    return page.tag(
        "section",
        page.tag("h2", "Items and their neighbours"),
        page.tag("p", f"Items of the head, of the tail and cold ones, each with the {NEAREST} items whose vectors are "
                 "nearest to its own by cosine. What a neighbour has in common with it is bold: these should make "
                 "sense to somebody who knows the items, above all those of cold ones, of which features alone are "
                 "known."),
        *parts,
    )  # fmt: skip


def item_vectors(bundle: Bundle, ranking: Ranking) -> Tensor:
    """vectors_ID of the corpus of a ranking, of length 1."""
    model = bundle.model
    assert isinstance(model, TwoTower)
    model.eval()
    parts = [model.items(logits_BL) for logits_BL, _ in passed(model, ranking.items, bundle.device)]
    return functional.normalize(torch.cat(parts).cpu(), dim=1)


def chosen(slices_I: NDArray[np.int64], counts_I: NDArray[np.int64]) -> NDArray[np.int64]:
    """Items evenly spread over each slice of SHOWN in the order of their training rows, the most popular first."""
    order_I = np.argsort(-counts_I, kind="stable")
    places: list[int] = []
    for name, number in SHOWN.items():
        own = order_I[slices_I[order_I] == SLICES.index(name)]
        places += own[np.arange(min(number, len(own))) * len(own) // number].tolist()
    return np.array(places, dtype=np.int64)


def neighbours(vectors_ID: Tensor, items_X: NDArray[np.int64]) -> Neighbours:
    """The nearest other items by cosine, from vectors of length 1; fewer than NEAREST in a smaller corpus."""
    own_XD = vectors_ID[torch.from_numpy(items_X)]
    number = min(NEAREST, len(vectors_ID) - 1)
    best_XK, which_XK = torch.empty(len(items_X), 0), torch.empty(len(items_X), 0, dtype=torch.int64)
    for start in range(0, len(vectors_ID), _CHUNK):
        cosine_XC = own_XD @ vectors_ID[start : start + _CHUNK].T
        at_X = torch.from_numpy(items_X) - start
        inside_X = (at_X >= 0) & (at_X < cosine_XC.shape[1])
        cosine_XC[inside_X, at_X[inside_X]] = -torch.inf  # an item is no neighbour of itself
        places_C = torch.arange(start, start + cosine_XC.shape[1]).expand(len(items_X), -1)
        best_XK, top = torch.cat([best_XK, cosine_XC], 1).topk(min(number, best_XK.shape[1] + cosine_XC.shape[1]))
        which_XK = torch.cat([which_XK, places_C], 1).gather(1, top)
    return Neighbours(items_X, which_XK.numpy(), best_XK.double().numpy())


def shown_columns(bundle: Bundle, retrieval: Retrieval) -> list[str]:
    """The first raw columns that the item's features are made of, but for its id."""
    model = bundle.model
    assert isinstance(model, TwoTower)
    columns: list[str] = []
    for name in model.config.item:
        columns += bundle.features.only([name]).recipe.inputs
    return [c for c in dict.fromkeys(columns) if c != retrieval.item][:COLUMNS]


def raw_columns(
    run: Run, retrieval: Retrieval, items: pl.Series, columns: Sequence[str], partitions: Sequence[str]
) -> dict[Any, dict[str, Any]]:
    """By item, its raw columns: from the table of items, or else from its first row in the log."""
    if retrieval.items is not None:
        frame = run.source.items(retrieval.items)
    else:
        logs = dict.fromkeys([*run.source.partitions("train"), *run.source.partitions("valid"), *partitions])
        frame = pl.concat([good_rows(run, p).select(retrieval.item, *columns) for p in logs])
    rows = frame.select(retrieval.item, *columns).filter(pl.col(retrieval.item).is_in(items.implode()))
    found = rows.unique(subset=retrieval.item, keep="first", maintain_order=True).collect(engine="streaming")
    return {row[retrieval.item]: row for row in found.iter_rows(named=True)}


def _table(
    named: pl.DataFrame,
    known: dict[Any, dict[str, Any]],
    rows: Sequence[tuple[int, float | None]],
    columns: Sequence[str],
    item: str,
) -> Html:
    """The item itself, and below it its neighbours."""
    own = known.get(named[rows[0][0], ITEM], {})
    lines: list[list[str]] = []
    for place, cosine in rows:
        facts = named.row(place, named=True)
        raw = known.get(facts[ITEM], {})
        cells = [str(facts[ITEM]), facts["slice"], *(_cell(raw.get(c), own.get(c), cosine is None) for c in columns)]
        lines.append([*cells, f"{facts[COUNT]:,}", page.number(cosine, ".3f")])
    return page.table([item, "slice", *columns, "training rows", "cosine"], lines, left=2 + len(columns))


def _cell(value: Any, own: Any, is_own: bool) -> str:
    """A raw value as text, what it shares with the item's own in bold."""
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        shared = set(own or ()) if not is_own else set()
        pieces: list[str] = []
        for i, v in enumerate(value):
            text = page.tag("b", str(v)) if v in shared else page.tag("span", str(v))
            pieces += [", ", text] if i else [text]
        return page.tag("span", *pieces)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return page.tag("b", text) if not is_own and value == own else text
