"""The question that a retrieval model is measured by, from raw rows: the corpus, who asks, what they saw and like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from base.errors import ConfigError, DataError
from base.storage import publish, read_manifest, resolve
from features.columns import explained, kind_of, require
from features.pipeline import FittedPipeline
from features.schema import Schema, carried
from features.split import EachDay, days_of
from features.transforms import UNKNOWN
from pipelines.config import Retrieval, Run
from pipelines.examples import ROW_GROUP, examples_about, good_rows, whole
from recsys.bundle import Bundle
from recsys.models.two_tower import TwoTowerConfig
from recsys.retrieval import COUNT, ITEM, ITEMS, RELEVANT, SEEN, USER, USERS, Ranking, require_items
from recsys.towers import neutral

KIND = "ranking"
_PLACE = "__place"


@dataclass(frozen=True)
class Towers:
    """Who is asked: features, which of them describe which side, and the contract of their examples."""

    features: FittedPipeline
    config: TwoTowerConfig
    schema: Schema

    @property
    def item(self) -> list[str]:
        """Features of the item: those of its tower, and the one that tells items apart."""
        assert self.schema.item is not None
        return list(dict.fromkeys([*self.config.item, self.schema.item]))


def ranking_of(run: Run, fitted: FittedPipeline, partitions: Sequence[str]) -> Ranking:
    """The published question about `partitions`. Raises DataError if other features or settings made it."""
    return _published(run, run.ranking_path(partitions), _towers_of(run, fitted), partitions)


def _published(run: Run, target: Path, towers: Towers, partitions: Sequence[str]) -> Ranking:
    folder = resolve(target, KIND, made_by="`recsys prepare`")
    about = _about(run, towers, _seen_before(run, partitions), partitions)
    if not about.items() <= read_manifest(folder).about.items():
        raise DataError(f"{target}: made by other features, settings or files; run `recsys prepare --overwrite`")
    require_items(_settings(run).k, read_manifest(folder).about["items"])
    return Ranking(folder, towers.schema, _settings(run).cuts)


def write_ranking(
    run: Run,
    fitted: FittedPipeline,
    partitions: Sequence[str],
    *,
    overwrite: bool = False,
    may_be_empty: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Publish the question about the positive rows of `partitions`, unless it is there already.

    What has been seen are the positive rows of the `daily.window_days` days before; in a log with a split, those of
    training, and for a test those of validation as well. A user is described by their first row, an item by its row of
    the corpus. Rows whose item is not in it are set aside. Raises DataError where these are more than
    data.max_bad_share of the rows asked about, an item stands in the corpus twice, or nobody is left to ask, unless
    it `may_be_empty`.
    """
    target = run.ranking_path(partitions)
    asked = {target: _towers_of(run, fitted)}
    _write(run, asked, partitions, overwrite=overwrite, may_be_empty=may_be_empty, say=say)
    _say_lost(target, partitions, say)


def ask(
    run: Run,
    candidate: Bundle,
    champion: Bundle | None,
    partitions: Sequence[str],
    *,
    may_be_empty: bool = False,
    say: Callable[[str], None] = print,
) -> list[Ranking]:
    """The question about `partitions`, published as each bundle's own features encode it, the candidate's first.

    Users and items are the same in the same order. `say` is told of rows that are set aside. Raises DataError as
    `write_ranking` does.
    """
    bundles = {run.ranking_path(partitions): candidate}
    if champion is not None:
        bundles[run.ranking_path(partitions, of_champion=True)] = champion
    asked = {target: _towers_in(bundle) for target, bundle in bundles.items()}
    _write(run, asked, partitions, overwrite=True, may_be_empty=may_be_empty, say=lambda _: None)
    _say_lost(next(iter(asked)), partitions, say)
    return [_published(run, target, towers, partitions) for target, towers in asked.items()]


def _write(
    run: Run,
    asked: Mapping[Path, Towers],
    partitions: Sequence[str],
    *,
    overwrite: bool,
    may_be_empty: bool,
    say: Callable[[str], None],
) -> None:
    """Publish one question as each of the towers reads it; the raw rows are read once."""
    seen_in, name = _seen_before(run, partitions), ", ".join(partitions)
    about = {target: _about(run, towers, seen_in, partitions) for target, towers in asked.items()}
    missing: list[Path] = []
    for target in asked:
        folder = whole(target, KIND, overwrite=overwrite)
        if folder and about[target].items() <= read_manifest(folder).about.items():
            _limit_lost(run, read_manifest(folder).about, name)
            _require_somebody(read_manifest(folder).about["users"], name, may_be_empty=may_be_empty)
            say(f"{name}: its ranking is there already")
        else:
            missing.append(target)
    if not missing:
        return
    with explained(f"[retrieval], {name}"):
        corpus, users, lost = _question(run, [asked[target] for target in missing], seen_in, partitions)
        _limit_lost(run, lost, name)
        _require_somebody(users.height, name, may_be_empty=may_be_empty)
        require_items(_settings(run).k, corpus.height)
        encoded = {target: _encoded(run, asked[target], corpus, users) for target in missing}
    for target, (items, described) in encoded.items():
        features = asked[target].features
        if nameless := _without_features(features, items, asked[target].config):
            say(f"corpus: {len(nameless)} items have no known feature (as {nameless[0]!r}): they all have one vector")
        with publish(target, KIND, overwrite=overwrite, keep=3) as staging:
            sizes = {"users": users.height, "items": items.height, "without_features": len(nameless)}
            staging.about.update(about[target], **sizes, **lost)
            for file, table in ((ITEMS, items), (USERS, described)):
                rows = neutral(features, table)
                rows.write_parquet(staging / file, row_group_size=ROW_GROUP, compression="lz4", statistics=False)
        cold = int((items[COUNT] == 0).sum())
        say(f"{name}: {users.height:,} users to rank {items.height:,} items for, {cold:,} of them cold")


def _limit_lost(run: Run, about: Mapping[str, Any], name: str) -> None:
    """Raise DataError if more rows are without an item in the corpus than data.max_bad_share allows."""
    lost, rows, most = about["lost"], about["positive"], run.data.max_bad_share
    if lost > most * rows:
        item, items = _settings(run).item, about["lost_items"]
        raise DataError(
            f"{name}: {items} items of {lost} of {rows} positive rows are not in the corpus, as {item} "
            f"{about['lost_item']}: {lost / rows:.2%}, where {most:.2%} is allowed; add them to retrieval.items, take "
            "the log's own items by leaving retrieval.items out, or raise data.max_bad_share to set such rows aside"
        )


def _say_lost(target: Path, partitions: Sequence[str], say: Callable[[str], None]) -> None:
    about = read_manifest(resolve(target, KIND)).about
    if lost := about["lost"]:
        which = f"set aside {lost:,} of {about['positive']:,} positive rows"
        say(f"{', '.join(partitions)}: {which}, whose item is not in the corpus, as {about['lost_item']}")
    if gone := about["gone"]:
        say(f"{gone:,} positive rows before are of items outside the corpus: learned from, recommended to nobody")


def _require_somebody(users: int, name: str, *, may_be_empty: bool) -> None:
    if not users and not may_be_empty:
        raise DataError(f"{name}: nobody has a positive row whose item they have not seen before; check data.split")


def _question(
    run: Run, towers: Sequence[Towers], seen_in: Sequence[str], partitions: Sequence[str]
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Any]]:
    """Raw rows of the corpus, raw rows of who asks, and what is known of rows whose item is not in the corpus.

    The raw rows have the columns that any of the towers reads.
    """
    described = [column for t in towers for column in t.features.only(t.item).recipe.inputs]
    corpus = corpus_of(run, described, [*seen_in, *partitions])
    read = [column for t in towers for column in t.features.only(t.config.query).recipe.inputs]
    seen, gone = _placed(run, corpus, seen_in)  # what has gone from the corpus cannot be shown again
    asked, lost = _placed(run, corpus, partitions, read)
    names = lost[_settings(run).item].unique().sort()
    about = {
        "positive": lost.height + asked.height,
        "lost": lost.height,
        "lost_items": names.len(),
        "lost_item": repr(names[0]) if names.len() else "",
        "gone": gone.height,
    }
    return corpus, _users(asked, seen), about


def _encoded(run: Run, towers: Towers, corpus: pl.DataFrame, users: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items and users as features, each of its own side."""
    described = fitted_side(towers.features, users.lazy(), towers.config.query, (USER, SEEN, RELEVANT))
    raw_items = corpus.lazy().with_columns(pl.col(_settings(run).item).alias(ITEM))
    try:
        items = fitted_side(towers.features, raw_items, towers.item, (ITEM,))
    except DataError as error:
        if (table := _settings(run).items) is None:
            raise
        raise DataError(f"retrieval.items, {table.path}: {error}; or store it there as the log does") from None
    assert towers.schema.item is not None
    counts = towers.features.counts_of(towers.schema.item)
    counts[UNKNOWN] = 0
    return items.with_columns(pl.Series(COUNT, counts[items[towers.schema.item].to_numpy()])), described


def fitted_side(fitted: FittedPipeline, raw: pl.LazyFrame, names: Sequence[str], keep: Sequence[str]) -> pl.DataFrame:
    """The features of one side, from rows that have the columns of that side alone; and the columns in `keep`."""
    return fitted.only(names).transform(raw, keep=keep).collect(engine="streaming")


def _settings(run: Run) -> Retrieval:
    assert run.retrieval is not None
    return run.retrieval


def _towers_of(run: Run, fitted: FittedPipeline) -> Towers:
    """Those that the run file says."""
    assert isinstance(run.model, TwoTowerConfig)
    return Towers(fitted, run.model, run.schema_of(fitted))


def _towers_in(bundle: Bundle) -> Towers:
    assert isinstance(bundle.model_config, TwoTowerConfig)
    return Towers(bundle.features, bundle.model_config, bundle.schema)


def _seen_before(run: Run, partitions: Sequence[str]) -> list[str]:
    """What a user had seen when asked.

    Where days have no roles, the `daily.window_days` days before: a full training reads as many, so the same question
    is asked of whichever model. Otherwise training rows, and validation rows unless these are what is asked.
    """
    if run.day is not None or isinstance(run.data.split, EachDay):
        try:
            (first,) = days_of(partitions[0].removeprefix("day="))
        except ValueError:
            raise ConfigError(f"partition {partitions[0]!r}: this log is split by day; write day=2026-03-01") from None
        return window_before(run, first)
    earlier = [*run.source.partitions("train"), *run.source.partitions("valid")]
    return [p for p in earlier if p not in partitions]


def window_before(run: Run, day: date) -> list[str]:
    """Partitions of the `daily.window_days` days before one; with it, whose items are the log's corpus."""
    days = run.data.days(run.data.day_before(day, run.daily.window_days), run.data.day_before(day))
    return [f"day={day}" for day in days]


def _about(run: Run, towers: Towers, seen: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    retrieval = _settings(run)
    about: dict[str, Any] = {
        "layout": 2,
        "seen": [examples_about(run, towers.features.version, p) for p in seen],
        "asked": [examples_about(run, towers.features.version, p) for p in asked],
        "sides": {"query": list(towers.config.query), "item": list(towers.config.item)},
        "retrieval": retrieval.model_dump(mode="json", include={"user", "item", "items"}),
    }
    if retrieval.items is not None:
        about["items_sha256"] = run.source.fingerprint_of(retrieval.items)
    return about


def corpus_of(run: Run, columns: Sequence[str], partitions: Sequence[str]) -> pl.DataFrame:
    """Raw `columns` of every item, in the order of the items: of the table named, or else of the log's partitions.

    Raises DataError if one of the columns is missing, an item stands in the table twice, or a row has none.
    """
    retrieval = _settings(run)
    item = retrieval.item
    columns = list(dict.fromkeys([item, *columns]))
    if retrieval.items is not None:
        frame = run.source.items(retrieval.items)
        require(columns, frame.collect_schema().names(), f"retrieval.items, {retrieval.items.path}")
        found = frame.select(columns).sort(item).collect()
        if nameless := found[item].null_count():
            raise DataError(f"{retrieval.items.path}: {item!r} is missing in {nameless} rows; remove them")
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
    run: Run, corpus: pl.DataFrame, partitions: Sequence[str], columns: Sequence[str] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Positive rows: `@user`, the item's place in the corpus, and raw columns; and those whose item is not there."""
    user, item = _settings(run).user, _settings(run).item
    parts: list[pl.LazyFrame] = []
    for partition in partitions:
        rows = good_rows(run, partition)
        require((user, item, *columns), rows.collect_schema().names(), "retrieval")
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
    if no_user := placed[USER].null_count():
        raise DataError(f"{', '.join(partitions)}: {user!r} is missing in {no_user} rows; exclude them in data.where")
    is_lost = pl.col(_PLACE).is_null()
    return placed.filter(~is_lost), placed.filter(is_lost)


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
