"""Batch recommendation: for every user the top K items they have not seen, published whole or not at all.

In two stages, a ranking model puts the candidates that the index finds in order. Users are taken in chunks: of users
times items nothing ever exists but the pairs that one chunk is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from base.errors import DataError
from base.faults import faultpoint
from base.storage import publish
from features.columns import explained
from recsys.bundle import Bundle
from recsys.retrieval import Pairs
from recsys.towers import vectors_of
from serving.index import ItemIndex
from serving.score import VERSION

# Shape suffixes: C = users of a chunk, K = places, X = pairs of a user and an item.

KIND = "recommendations"
CHUNK = 2**18
"""Pairs of users and items that are looked up, and scored, at a time."""

PLACE, SIMILARITY, RANKING_VERSION = "place", "similarity", "ranking_model_version"
OURS = (PLACE, SIMILARITY, VERSION, RANKING_VERSION)
_USER, _ROW = "__user", "__row"


@dataclass(frozen=True)
class SecondStage:
    """A ranking model that puts candidates in order, and where its raw columns come from."""

    bundle: Bundle
    version: str
    by: str
    """The output to order by, largest first."""
    from_items: tuple[str, ...]
    """Raw columns that it reads from the item's row of the corpus."""
    from_users: tuple[str, ...]
    """Those that it reads from the user's row of the partition."""


@dataclass(frozen=True)
class Made:
    """What was published."""

    users: int
    short: int
    """Users who got fewer than K items, since they have seen the others."""
    exactly: int
    """Users who were searched exactly, since an approximate index had found too few."""


def publish_recommendations(
    bundle: Bundle,
    index: ItemIndex,
    users: pl.DataFrame,
    seen: Pairs,
    target: Path,
    *,
    user: str,
    item: str,
    k: int,
    depth: int,
    model_version: str,
    second: SecondStage | None = None,
    about: Mapping[str, Any],
    overwrite: bool = False,
    on_users: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """Publish, for each row of `users`, `k` of the `depth` items that the index finds for them.

    `users` has a row per user, with the raw columns that the query tower and the ranking read; `seen` has their items,
    by position in the index. Columns of the output: `user`, place (from 1), `item`, similarity, the ranking's outputs,
    and the versions of both models. Refuses, and leaves whatever was published before: DataError on no users, on a user
    twice, and on a number of users that is not the input's; ArtefactError if a bundle's golden rows are not reproduced.
    """
    bundle.check_golden()
    if second is not None:
        second.bundle.check_golden()
    if not users.height:
        raise DataError(f"{target}: there are no users to recommend to; check the path and the partition")
    with publish(target, KIND, overwrite=overwrite) as staging:
        short = exactly = without = 0
        size = max(1, CHUNK // depth)
        on_users(0, users.height)
        for i, start in enumerate(range(0, users.height, size)):
            chunk = users[start : start + size]
            queries_CD = np.concatenate(list(vectors_of(bundle, chunk.lazy(), "query")))
            found = index.search(queries_CD, seen.of(start, start + chunk.height), depth)
            table = _pairs(chunk, index, found.places_QK, found.similarity_QK, user, item)
            if second is not None:
                table = _ranked(table, chunk, index, second, k)
            got_C = np.bincount(table[_USER].to_numpy(), minlength=chunk.height)
            short, without = short + int((got_C < k).sum()), without + int((got_C == 0).sum())
            exactly += found.exactly
            versions = [pl.lit(model_version).alias(VERSION)]
            if second is not None:
                versions.append(pl.lit(second.version).alias(RANKING_VERSION))
            faultpoint("recommend.part")
            table.drop(_USER, _ROW).with_columns(versions).write_parquet(staging / f"part-{i:05}.parquet")
            on_users(start + chunk.height, users.height)
        rows = _check(staging / "part-*.parquet", user, k, users.height - without)
        staging.about.update(about)
        staging.about.update(
            users=users.height,
            rows=rows,
            k=k,
            depth=depth,
            fewer_than_k=short,
            without_any=without,
            searched_exactly=exactly,
            seen=len(seen.items_X),
            bundle=bundle.version,
            model_version=model_version,
            index={key: index.about[key] for key in ("kind", "items", "recall")},
        )
        if second is not None:
            staging.about["ranking"] = {
                "bundle": second.bundle.version,
                "model_version": second.version,
                "by": second.by,
                "from_items": list(second.from_items),
                "from_users": list(second.from_users),
            }
    return Made(users.height, short, exactly)


def _pairs(
    chunk: pl.DataFrame, index: ItemIndex, places_CK: np.ndarray, similarity_CK: np.ndarray, user: str, item: str
) -> pl.DataFrame:
    """A row per user and item found, by user, best first; with their positions in chunk and index."""
    user_X, place_X = np.nonzero(places_CK >= 0)
    row_X = places_CK[user_X, place_X]
    return pl.DataFrame(
        {
            _USER: user_X.astype(np.int32),
            _ROW: row_X.astype(np.int32),
            user: chunk[user].gather(user_X),
            PLACE: (place_X + 1).astype(np.int32),
            item: index.items[item].gather(row_X),
            SIMILARITY: similarity_CK[user_X, place_X],
        }
    )


def _ranked(table: pl.DataFrame, chunk: pl.DataFrame, index: ItemIndex, second: SecondStage, k: int) -> pl.DataFrame:
    """The first `k` of each user's candidates by the ranking; of equal ones the more similar."""
    columns = [chunk[c].gather(table[_USER]) for c in second.from_users]
    columns += [index.items[c].gather(table[_ROW]) for c in second.from_items]
    with explained("recommend.ranking"):
        parts = second.bundle.predict(pl.DataFrame(columns).lazy())
        scores = pl.concat([pl.DataFrame(schema={o.name: pl.Float32 for o in second.bundle.outputs}), *parts])
    order = table.hstack(scores).sort(_USER, second.by, PLACE, descending=[False, True, False])
    place = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over(_USER)
    return order.with_columns(place.alias(PLACE)).filter(pl.col(PLACE) <= k)


def _check(parts: Path, user: str, k: int, users: int) -> int:
    """The rows: every user's places are 1, 2, … once each. Raises DataError otherwise."""
    places = pl.col(PLACE)
    of_user = pl.scan_parquet(parts).group_by(user).agg(
        pl.len().alias("rows"), places.n_unique().alias("different"), places.min().alias("first"),
        places.max().alias("last"),
    )  # fmt: skip
    sound = (pl.col("first") == 1) & (pl.col("last") == pl.col("rows")) & (pl.col("different") == pl.col("rows"))
    found = of_user.select(
        pl.len(), pl.col("rows").sum(), (~sound | (pl.col("last") > k) | pl.col(user).is_null()).sum().alias("unsound")
    ).collect(engine="streaming")
    counted, rows, unsound = found.row(0)
    if counted != users or unsound:
        raise DataError(
            f"{users} users were to get items, {counted} did, {unsound} of them not at the places 1, 2, …; a user may "
            "stand among them twice; nothing is published"
        )
    return rows
