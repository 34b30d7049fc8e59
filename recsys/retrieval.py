"""Full ranking: every item for everyone who asks, what they have seen removed; exact metrics by popularity of the item.

Metrics are per query, over those with at least one relevant item, then averaged. Recall and NDCG are those of
LightGCN's evaluation (He et al., SIGIR 2020): |hits| / |relevant|, and DCG over that of min(K, |relevant|) hits at the
top. MAP is that of Manning et al. 2008, chapter 8.4, cut at K: the mean over min(K, |relevant|) of the precision at
each hit. MRR (Voorhees 1999) is of the whole ranking: 1 / rank of the best relevant item, with ties counted against it.
Coverage is the share of the items that are among the first K of anybody. A slice of the items counts its own items
alone as relevant, in the same ranking of all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional

from base.config import Config
from base.errors import ConfigError
from features.schema import Schema, carried
from recsys.data import ExampleStream
from recsys.models.two_tower import TwoTower

# Shape suffixes: I = items, Q = queries, C = queries of a chunk, K = places in a ranking, D = dimension, X = pairs.

ITEMS, USERS = "items.parquet", "users.parquet"
ITEM, COUNT, USER, SEEN, RELEVANT = (carried(name) for name in ("item", "count", "user", "seen", "relevant"))
"""Columns beside the features: of an item its raw value and training rows; of a user theirs, and places of items."""

Places = NDArray[np.signedinteger[Any]]
"""Positions; for very many 32 bits each."""
SLICES = ("all", "head", "torso", "tail", "cold")
_CHUNK = 2**22
"""Scores computed at a time."""
_BATCH = 4096
_BLOCK = 16
"""Items of which only the best is looked at, until it is known which blocks may hold one of the first K."""


class Cuts(Config):
    """Where rankings and items are cut."""

    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (20, 50)
    """How many items a user is shown; the first decides which weights are best."""
    head: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the items, of those with training rows, that are its head: the ones with the most."""
    torso: Annotated[float, Field(ge=0, le=1)] = 0.3
    """The share after that; the rest is the tail. Items without training rows are cold, and in none of the three."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.head + self.torso > 1 + 1e-9:
            raise ValueError(f"head and torso add up to {self.head + self.torso:g}; they may not exceed 1")
        return self


@dataclass(frozen=True)
class Ranking:
    """A published question: which items there are, who asks, what they have seen, and what they should get."""

    folder: Path
    schema: Schema
    cuts: Cuts
    rank: int = 0
    world: int = 1

    def rows(self) -> int:
        """How many ask."""
        return self._stream(USERS).rows()

    @property
    def items(self) -> ExampleStream:
        """The items as examples, in their order."""
        return self._stream(ITEMS)

    @property
    def users(self) -> ExampleStream:
        """Who asks, as examples."""
        return self._stream(USERS)

    def counts(self) -> NDArray[np.int64]:
        """By item, its training rows."""
        return pl.read_parquet(self.folder / ITEMS, columns=[COUNT])[COUNT].to_numpy()

    def slices(self) -> NDArray[np.int64]:
        """By item, its place in SLICES."""
        return popularity(self.counts(), self.cuts)

    def pairs(self, column: str) -> "Pairs":
        """Items of each user, from a column of lists."""
        lists = pl.read_parquet(self.folder / USERS, columns=[column])[column]
        bounds = np.zeros(lists.len() + 1, dtype=np.int64)
        np.cumsum(lists.list.len().to_numpy(), out=bounds[1:])
        flat = lists.explode(empty_as_null=False, keep_nulls=False).cast(pl.Int64)
        return Pairs(bounds, flat.to_numpy(writable=True))

    def _stream(self, name: str) -> ExampleStream:
        bare = self.schema.model_copy(update={"labels": ()})
        return ExampleStream((self.folder / name,), bare, _BATCH, rank=self.rank, world=self.world)


@dataclass(frozen=True)
class Pairs:
    """Items by query, ascending for each: those of query q are items_X[bounds[q] : bounds[q + 1]]."""

    bounds: NDArray[np.int64]
    items_X: Places

    def of(self, start: int, stop: int) -> tuple[Places, Places]:
        """Row numbers, from 0, and items of the queries in [start, stop)."""
        bounds = self.bounds[start : stop + 1]
        return np.repeat(np.arange(stop - start), np.diff(bounds)), self.items_X[bounds[0] : bounds[-1]]


def popularity(counts_I: NDArray[np.int64], cuts: Cuts) -> NDArray[np.int64]:
    """By item, its place in SLICES: head, torso or tail by its number of training rows, cold without any."""
    warm = int((counts_I > 0).sum())
    place_I = np.empty(len(counts_I), dtype=np.int64)
    place_I[np.argsort(-counts_I, kind="stable")] = np.arange(len(counts_I))
    ends = [round(warm * cuts.head), round(warm * (cuts.head + cuts.torso)), warm]
    return 1 + np.searchsorted(ends, place_I, side="right")


Forward = Callable[[ExampleStream], Iterable[Tensor]]
"""logits_BL of each batch of a stream, in order."""


def require_items(k: Sequence[int], items: int) -> None:
    """Raises ConfigError where more items are to be shown than there are."""
    if max(k) > items:
        raise ConfigError(f"retrieval.k = {list(k)}: the corpus has {items} items; ask for fewer")


@dataclass(frozen=True)
class Ranked:
    """What full ranking finds."""

    table: pl.DataFrame
    """The metrics, as `rank_items` gives them."""
    recall_QS: NDArray[np.float64]
    """Of each query at the first K, by slice; NaN where nothing of the slice is relevant."""


def rank_items(forward: Forward, model: TwoTower, ranking: Ranking, *, brief: bool = False) -> pl.DataFrame:
    """The metrics of a model: a row per slice and K. Empty on other ranks than the first, whose help it needs.

    Columns: slice, k, users (with a relevant item in the slice), items, recall, ndcg, map, mrr, coverage; null where
    nobody is measured. In `brief` only of all items, and without MRR, which is a third of the work.
    Raises ConfigError where K is larger than the corpus.
    """
    items_ID = torch.cat([model.items(logits_BL) for logits_BL in forward(ranking.items)])
    queries = (model.queries(logits_BL) for logits_BL in forward(ranking.users))
    if ranking.rank:
        for _ in queries:
            pass
        return pl.DataFrame()
    seen, relevant, slices_I = ranking.pairs(SEEN), ranking.pairs(RELEVANT), ranking.slices()
    return measure(queries, items_ID, seen, relevant, slices_I, ranking.cuts.k, brief=brief).table


def rank_users(forward: Forward, model: TwoTower, ranking: Ranking, slices_I: NDArray[np.int64]) -> Ranked:
    """The metrics of a model and the recall of every user, the items sliced as `slices_I` says; on one process."""
    items_ID = torch.cat([model.items(logits_BL) for logits_BL in forward(ranking.items)])
    queries = (model.queries(logits_BL) for logits_BL in forward(ranking.users))
    return measure(queries, items_ID, ranking.pairs(SEEN), ranking.pairs(RELEVANT), slices_I, ranking.cuts.k)


def recall_by_chance(ranking: Ranking) -> float:
    """What a random order of the items may expect for recall at the first K."""
    unseen_Q = len(ranking.counts()) - np.diff(ranking.pairs(SEEN).bounds)
    return float(np.minimum(1.0, ranking.cuts.k[0] / unseen_Q).mean()) if len(unseen_Q) else 0.0


def recall_by_popularity(ranking: Ranking) -> float:
    """Recall at the first K of the items in the order of their training rows, without what each user has seen."""
    counts_I = ranking.counts()
    queries = torch.ones(ranking.rows(), 1).split(_BATCH)
    items_ID = torch.from_numpy(counts_I.astype(np.float32))[:, None]
    seen, relevant = ranking.pairs(SEEN), ranking.pairs(RELEVANT)
    found = measure(queries, items_ID, seen, relevant, counts_I, ranking.cuts.k[:1], brief=True)
    return found.table["recall"][0] or 0.0


def measure(
    queries: Iterable[Tensor],
    items_ID: Tensor,
    seen: Pairs,
    relevant: Pairs,
    slices_I: NDArray[np.int64],
    k: tuple[int, ...],
    *,
    brief: bool = False,
) -> Ranked:
    """What full ranking finds, from vectors_CD of queries in parts of any size, in the order of the pairs.

    A query's relevant items may not be among those it has seen. In `brief` of all items alone.
    """
    return measure_scores(_products(queries, items_ID), seen, relevant, slices_I, k, brief=brief)


def _products(queries: Iterable[Tensor], items_ID: Tensor) -> Iterator[Tensor]:
    """Scores of all items and padding, a chunk of queries at a time, each in the memory of the one before."""
    items = len(items_ID)
    padding = -items % _BLOCK
    transposed_DI = torch.cat([items_ID, items_ID.new_zeros(padding, items_ID.shape[1])]).T.contiguous()
    scores = torch.empty(0)
    for part in queries:
        for queries_CD in part.split(max(1, _CHUNK // items)):
            if scores.shape[0] != len(queries_CD):
                # Used again for the next chunk: fresh memory costs as much as the products.
                scores = items_ID.new_empty(len(queries_CD), items + padding)
            torch.mm(queries_CD, transposed_DI, out=scores)
            yield scores


def measure_scores(
    chunks: Iterable[Tensor],
    seen: Pairs,
    relevant: Pairs,
    slices_I: NDArray[np.int64],
    k: tuple[int, ...],
    *,
    brief: bool = False,
) -> Ranked:
    """What `measure` gives, from scores_CI of parts of the queries, which are overwritten.

    Columns beyond the items are padding.
    """
    items, deepest = len(slices_I), max(k)
    require_items(k, items)
    tallies = {name: _Tally(k, items) for name in (SLICES[:1] if brief else SLICES)}
    start = 0
    for scores in chunks:
        if padding := -scores.shape[1] % _BLOCK:
            scores = functional.pad(scores, (0, padding))
        stop = start + len(scores)
        scores[:, items:] = -torch.inf
        rows_X, seen_X = (torch.from_numpy(x).to(scores.device) for x in seen.of(start, stop))
        scores[rows_X, seen_X] = -torch.inf
        _count(tallies, scores, relevant.of(start, stop), slices_I, deepest, brief=brief)
        start = stop
    rows = [row for name, tally in tallies.items() for row in tally.rows(name, slices_I)]
    types = {"slice": pl.String, "k": pl.Int64, "users": pl.Int64, "items": pl.Int64}
    types |= dict.fromkeys(("recall", "ndcg", "map", "mrr", "coverage"), pl.Float64)
    recall_QS = np.stack([np.concatenate([*tally.recalls, np.empty(0)]) for tally in tallies.values()], axis=1)
    return Ranked(pl.DataFrame(rows, schema=types), recall_QS)


def _count(
    tallies: "dict[str, _Tally]",
    scores_CI: Tensor,
    relevant: tuple[Places, Places],
    slices_I: NDArray[np.int64],
    deepest: int,
    *,
    brief: bool,
) -> None:
    """Add a chunk's rankings to the tallies."""
    rows_X, items_X = relevant
    queries, items = scores_CI.shape
    best_CK, top_CK = (x.cpu().numpy() for x in _top(scores_CI, deepest))
    shown_CK = np.isfinite(best_CK)  # the rest has been seen
    top_CK = np.where(shown_CK, top_CK, 0)
    hit_CK = shown_CK & np.isin(np.arange(queries)[:, None] * items + top_CK, rows_X * items + items_X)
    index = (torch.from_numpy(rows_X).to(scores_CI.device), torch.from_numpy(items_X).to(scores_CI.device))
    scores_X = scores_CI[index].cpu().numpy()
    for name, tally in tallies.items():
        inside_X = np.ones(len(items_X), np.bool_) if name == "all" else slices_I[items_X] == SLICES.index(name)
        within_CK = hit_CK if name == "all" else hit_CK & (slices_I[top_CK] == SLICES.index(name))
        number_C = np.bincount(rows_X[inside_X], minlength=queries)
        top_C = np.full(queries, -np.inf, dtype=best_CK.dtype)
        np.maximum.at(top_C, rows_X[inside_X], scores_X[inside_X])
        asked = np.flatnonzero(number_C)
        ranks = None if brief else _ranks(scores_CI, best_CK, top_C, asked)
        recall_C = np.full(queries, np.nan)
        recall_C[asked] = tally.add(within_CK[asked], number_C[asked], ranks)
        tally.recalls.append(recall_C)
        tally.cover(top_CK, shown_CK)


def _top(scores_CI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each row and their places, best first; on long rows 3 times as fast as `topk`."""
    blocks = scores_CI.shape[1] // _BLOCK
    if blocks < 4 * k:
        return scores_CI.topk(k)
    # One of the first k lies in a block that is one of the first k by its best.
    scores_CXB = scores_CI.view(len(scores_CI), _BLOCK, blocks)
    which_CK = scores_CXB.amax(1).topk(k).indices
    within = scores_CXB.gather(2, which_CK[:, None].expand(-1, _BLOCK, -1)).flatten(1)
    best_CK, places = within.topk(k)
    return best_CK, places // k * blocks + which_CK.gather(1, places % k)


def _ranks(
    scores_CI: Tensor, best_CK: NDArray[np.floating], score_C: NDArray[np.floating], asked: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many items have at least the score given for each of the rows `asked`."""
    found = (best_CK[asked] >= score_C[asked, None]).sum(1)
    deep = np.flatnonzero(best_CK[asked, -1] >= score_C[asked])  # beyond what is listed, or tied with its end
    for i in deep:
        found[i] = int((scores_CI[asked[i]] >= float(score_C[asked[i]])).count_nonzero())
    return found


class _Tally:
    """Sums over queries of one slice's metrics."""

    def __init__(self, k: tuple[int, ...], items: int) -> None:
        self.k = k
        self.users = 0
        self.reciprocal: float | None = None
        self.sums = {name: np.zeros(len(k)) for name in ("recall", "ndcg", "map")}
        self.covered = np.zeros((len(k), items), dtype=np.bool_)
        self.recalls: list[NDArray[np.float64]] = []
        """Of all queries, by chunk."""

    def add(
        self, hit_QK: NDArray[np.bool_], number_Q: NDArray[np.int64], ranks_Q: NDArray[np.int64] | None
    ) -> NDArray[np.float64]:
        """Queries with `number_Q` relevant items, of which `hit_QK` says where they stand; recall at the first K."""
        place_K = np.arange(1, hit_QK.shape[1] + 1)
        gain_K = 1 / np.log2(place_K + 1)
        ideal_K = np.cumsum(gain_K)
        hits_QK = np.cumsum(hit_QK, axis=1)
        gains_QK = np.cumsum(hit_QK * gain_K, axis=1)
        precision_QK = np.cumsum(hit_QK * hits_QK / place_K, axis=1)
        self.users += len(number_Q)
        if ranks_Q is not None:
            self.reciprocal = (self.reciprocal or 0.0) + float((1 / ranks_Q).sum())
        for i, k in enumerate(self.k):
            reach_Q = np.minimum(number_Q, k)
            self.sums["recall"][i] += (hits_QK[:, k - 1] / number_Q).sum()
            self.sums["ndcg"][i] += (gains_QK[:, k - 1] / ideal_K[reach_Q - 1]).sum()
            self.sums["map"][i] += (precision_QK[:, k - 1] / reach_Q).sum()
        return hits_QK[:, self.k[0] - 1] / number_Q

    def cover(self, top_CK: NDArray[np.int64], shown_CK: NDArray[np.bool_]) -> None:
        """Note what was shown to anybody."""
        for i, k in enumerate(self.k):
            self.covered[i, top_CK[:, :k][shown_CK[:, :k]]] = True

    def rows(self, name: str, slices_I: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """The metrics, by k."""
        own_I = np.ones(len(slices_I), np.bool_) if name == "all" else slices_I == SLICES.index(name)
        items = int(own_I.sum())
        for i, k in enumerate(self.k):
            means = {m: float(s[i] / self.users) if self.users else None for m, s in self.sums.items()}
            yield {
                "slice": name,
                "k": k,
                "users": self.users,
                "items": items,
                **means,
                "mrr": self.reciprocal / self.users if self.users and self.reciprocal is not None else None,
                "coverage": float(self.covered[i, own_I].mean()) if items else None,
            }
