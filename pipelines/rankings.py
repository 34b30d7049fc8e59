"""The question that a retrieval model is measured by, from raw rows: the corpus, who asks, what they saw and like."""

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from base.errors import DataError
from base.storage import publish, read_manifest, resolve
from features.columns import explained, kind_of, require
from features.pipeline import FittedPipeline
from features.schema import carried
from features.transforms import UNKNOWN
from pipelines.config import Retrieval, Run
from pipelines.examples import ROW_GROUP, examples_about, good_rows, whole
from recsys.models.two_tower import TwoTowerConfig
from recsys.retrieval import COUNT, ITEM, ITEMS, RELEVANT, SEEN, USER, USERS, Ranking
from recsys.towers import neutral

KIND = "ranking"
_PLACE = "__place"


def ranking_of(run: Run, fitted: FittedPipeline, partitions: Sequence[str]) -> Ranking:
    """The published question about `partitions`. Raises DataError if other features or settings made it."""
    target = run.ranking_path(partitions)
    folder = resolve(target, KIND, made_by="`recsys prepare`")
    about = _about(run, fitted, _seen_before(run, partitions), partitions)
    if not about.items() <= read_manifest(folder).about.items():
        raise DataError(f"{target}: made by other features, settings or files; run `recsys prepare --overwrite`")
    retrieval, _ = _sides(run)
    return Ranking(folder, run.schema_of(fitted), retrieval.cuts)


def write_ranking(
    run: Run,
    fitted: FittedPipeline,
    partitions: Sequence[str],
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Publish the question about the positive rows of `partitions`, unless it is there already.

    Those of training, and for a test those of validation as well, have been seen. A user is described by their first
    row, an item by its row of the corpus. Raises DataError where an item of the log is not in the corpus, one of the
    corpus stands there twice, or nobody is left to ask.
    """
    retrieval, model = _sides(run)
    seen_in = _seen_before(run, partitions)
    target, about = run.ranking_path(partitions), _about(run, fitted, seen_in, partitions)
    name = ", ".join(partitions)
    folder = whole(target, KIND, overwrite=overwrite)
    if folder and about.items() <= read_manifest(folder).about.items():
        say(f"{name}: its ranking is there already")
        return
    with explained(f"[retrieval], {name}"):
        columns = fitted.only(_item_features(run, model)).recipe.inputs
        corpus = corpus_of(run, columns, [*seen_in, *partitions])
        queries = fitted.only(model.query).recipe.inputs
        seen = _placed(run, retrieval, corpus, seen_in)
        asked = _placed(run, retrieval, corpus, partitions, queries)
        users = _users(asked, seen)
        if not users.height:
            raise DataError(f"{name}: nobody has a positive row whose item they have not seen before; check data.split")
        described = fitted_side(fitted, users.lazy(), model.query, (USER, SEEN, RELEVANT))
        raw_items = corpus.lazy().with_columns(pl.col(retrieval.item).alias(ITEM))
        items = fitted_side(fitted, raw_items, _item_features(run, model), (ITEM,))
    counts = fitted.counts_of(run.item_feature)
    counts[UNKNOWN] = 0
    items = items.with_columns(pl.Series(COUNT, counts[items[run.item_feature].to_numpy()]))
    if nameless := _without_features(fitted, items, model):
        say(f"corpus: {len(nameless)} items have no known feature (as {nameless[0]!r}): they all have one vector")
    with publish(target, KIND, overwrite=overwrite) as staging:
        staging.about.update(about, users=users.height, items=items.height, without_features=len(nameless))
        for file, table in ((ITEMS, items), (USERS, described)):
            whole_table = neutral(fitted, table)
            whole_table.write_parquet(staging / file, row_group_size=ROW_GROUP, compression="lz4", statistics=False)
    cold = int((items[COUNT] == 0).sum())
    say(f"{name}: {users.height:,} users to rank {items.height:,} items for, {cold:,} of them cold")


def fitted_side(fitted: FittedPipeline, raw: pl.LazyFrame, names: Sequence[str], keep: Sequence[str]) -> pl.DataFrame:
    """The features of one side, from rows that have the columns of that side alone; and the columns in `keep`."""
    return fitted.only(names).transform(raw, keep=keep).collect(engine="streaming")


def _sides(run: Run) -> tuple[Retrieval, TwoTowerConfig]:
    assert run.retrieval is not None
    assert isinstance(run.model, TwoTowerConfig)
    return run.retrieval, run.model


def _seen_before(run: Run, partitions: Sequence[str]) -> list[str]:
    """What a user had seen when asked: training rows, and validation rows unless these are what is asked."""
    earlier = [*run.source.partitions("train"), *run.source.partitions("valid")]
    return [p for p in earlier if p not in partitions]


def _about(run: Run, fitted: FittedPipeline, seen: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    retrieval, model = _sides(run)
    about: dict[str, Any] = {
        "seen": [examples_about(run, fitted.version, p) for p in seen],
        "asked": [examples_about(run, fitted.version, p) for p in asked],
        "sides": {"query": list(model.query), "item": list(model.item)},
        "retrieval": retrieval.model_dump(mode="json", include={"user", "item", "items"}),
    }
    if retrieval.items is not None:
        about["items_sha256"] = run.source.fingerprint_of(retrieval.items)
    return about


def _item_features(run: Run, model: TwoTowerConfig) -> list[str]:
    return list(dict.fromkeys([*model.item, run.item_feature]))


def corpus_of(run: Run, columns: Sequence[str], partitions: Sequence[str]) -> pl.DataFrame:
    """Raw `columns` of every item, in the order of the items: of the table named, or else of the log's partitions.

    Raises DataError if one of the columns is missing, or an item stands in the table twice.
    """
    retrieval = run.retrieval
    assert retrieval is not None
    item = retrieval.item
    columns = list(dict.fromkeys([item, *columns]))
    if retrieval.items is not None:
        frame = run.source.items(retrieval.items)
        require(columns, frame.collect_schema().names(), f"retrieval.items, {retrieval.items.path}")
        found = frame.select(columns).filter(pl.col(item).is_not_null()).sort(item).collect()
        if found[item].n_unique() < found.height:
            first = found.filter(pl.col(item).is_duplicated())[item][0]
            raise DataError(f"{retrieval.items.path}: {item} {first!r} stands there twice; keep one row of each")
        return found
    rows = [good_rows(run, p) for p in partitions]
    require(columns, rows[0].collect_schema().names(), "retrieval, the items of the log")
    frame = pl.concat([part.select(columns) for part in rows])
    distinct = frame.filter(pl.col(item).is_not_null()).unique(subset=item, keep="first", maintain_order=True)
    return distinct.sort(item).collect(engine="streaming")


def _placed(
    run: Run, retrieval: Retrieval, corpus: pl.DataFrame, partitions: Sequence[str], columns: Sequence[str] = ()
) -> pl.DataFrame:
    """Positive rows: `@user`, the item's place in the corpus, and raw columns."""
    user, item = retrieval.user, retrieval.item
    parts: list[pl.LazyFrame] = []
    for partition in partitions:
        rows = good_rows(run, partition)
        require((user, item), rows.collect_schema().names(), "retrieval")
        positive = rows.filter(pl.col(carried(run.labels[0])) == 1)
        parts.append(positive.select(pl.col(user).alias(USER), *dict.fromkeys([item, *columns])))
    rows = pl.concat(parts).collect(engine="streaming")
    if kind_of(rows.schema[item]) != kind_of(corpus.schema[item]):
        raise DataError(
            f"retrieval.item: {item!r} holds {kind_of(rows.schema[item])} in the log and "
            f"{kind_of(corpus.schema[item])} in retrieval.items; convert one of them"
        )
    places = corpus.select(pl.col(item).cast(rows.schema[item]), pl.int_range(pl.len(), dtype=pl.Int32).alias(_PLACE))
    placed = rows.join(places, on=item, how="left", maintain_order="left")
    lost = placed.filter(pl.col(_PLACE).is_null())
    if lost.height:
        names = lost[item].unique().sort()
        raise DataError(
            f"{', '.join(partitions)}: {names.len()} items of {lost.height} rows are not in the corpus, as "
            f"{item} {names[0]!r}; add them to retrieval.items, or leave it out to take the log's own items"
        )
    if no_user := placed[USER].null_count():
        raise DataError(f"{', '.join(partitions)}: {user!r} is missing in {no_user} rows; exclude them in data.where")
    return placed


def _users(asked: pl.DataFrame, seen: pl.DataFrame) -> pl.DataFrame:
    """A row per user who asks: their first row's columns, and the places of what they saw and should get, ascending."""
    pairs = asked.select(USER, _PLACE).unique()
    before = seen.select(USER, _PLACE).unique()
    left = pairs.join(before, on=[USER, _PLACE], how="anti")
    lists = left.group_by(USER).agg(pl.col(_PLACE).sort().alias(RELEVANT))
    behind = before.group_by(USER).agg(pl.col(_PLACE).sort().alias(SEEN))
    users = asked.unique(subset=USER, keep="first", maintain_order=True).drop(_PLACE).join(lists, on=USER)
    nothing = pl.lit([], dtype=pl.List(pl.Int32))
    return users.join(behind, on=USER, how="left").with_columns(pl.col(SEEN).fill_null(nothing)).sort(USER)


def _without_features(fitted: FittedPipeline, items: pl.DataFrame, model: TwoTowerConfig) -> list[Any]:
    """Items of which the item side knows nothing: no id, no value in a bag, every number at its mean."""
    bags = {f.name for f in fitted.sparse if f.multi}
    known = [
        pl.col(name).list.eval(pl.element() != 0).list.any() if name in bags else pl.col(name) != 0
        for name in model.item
    ]
    return items.filter(~pl.any_horizontal(known))[ITEM].to_list()
