"""recommend: for every user of a partition the top items they have not seen, by one model or by two, published."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from base.config import load_config
from base.errors import ArtefactError, ConfigError, DataError, did_you_mean
from base.storage import is_published
from features.columns import explained, kind_of, require
from features.schema import carried
from features.split import ROLES, EachDay
from pipelines.config import Retrieval, Run
from pipelines.config import SecondStage as Ranking
from pipelines.examples import good_rows
from pipelines.index import first_rows, index_of, retrieval_of, with_derived
from pipelines.measure import held_out
from pipelines.tracking import model_of
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.models.two_tower import TwoTower
from recsys.registry import CHAMPION
from recsys.retrieval import Pairs
from recsys.towers import inputs_of, towers_of
from serving.index import ExactConfig, ItemIndex
from serving.recommend import OURS, Made, SecondStage, publish_recommendations

_USER, _ROW = "__user", "__row"


def recommend(
    run: Run,
    *,
    partition: str | None = None,
    model: str = CHAMPION,
    overwrite: bool = False,
    if_missing: bool = False,
    build_index: bool = False,
    on_users: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Recommend to the users of partitions (by default the test ones) by a registered version, an alias, or a bundle's
    folder, and the published index of it.

    With `if_missing` what is published stays as it is, and with `build_index` an index of another model is replaced,
    where each would be an error.
    """
    retrieval = retrieval_of(run, "recommend")
    names = held_out(run, partition)
    missing = [n for n in names if not (if_missing and is_published(run.recommendations_path(n)))]
    for name in names:
        if name not in missing:
            say(f"{name}: recommended already")
    if not missing:
        return []
    bundle, version, _ = model_of(run, model)
    towers_of(bundle)
    bundle = bundle.to(pick_device(run.device))
    # Its folder, since another run may publish the index of another model meanwhile.
    index = ItemIndex.load(index_of(run, bundle, version, say=say) if build_index else run.index_path, bundle)
    depth = _depth(run, index)
    second = None if run.recommend.ranking is None else _second_stage(run, run.recommend.ranking, retrieval, index)
    published: list[Path] = []
    for name in missing:
        started = time.perf_counter()
        users, about = _users_of(run, retrieval, bundle, index, second, name)
        earlier = _earlier(run, name)
        known = {f"in {name}": users[retrieval.user], "in the index": index.items[retrieval.item]}
        seen = _seen_by(run, known, earlier)
        target = run.recommendations_path(name)
        made = publish_recommendations(
            bundle,
            index,
            users,
            seen,
            target,
            user=retrieval.user,
            item=retrieval.item,
            k=run.recommend.k,
            depth=depth,
            model_version=version,
            second=second,
            about={**about, "partition": name, "seen_in": earlier},
            overwrite=overwrite,
            on_users=on_users,
        )
        told = _told(run, index, made, version, second)
        if without := about["rows_without_user"]:
            told += f"; rows without a user, left out: {without:,}"
        say(f"{name}: {told}; in {time.perf_counter() - started:.1f} s -> {target}")
        published.append(target)
    return published


def _told(run: Run, index: ItemIndex, made: Made, version: str, second: SecondStage | None) -> str:
    told = f"{made.users:,} users, {run.recommend.k} of {len(index):,} items each by version {version}"
    if second is not None:
        told += f", ordered by {second.by} of version {second.version}"
    if made.short:
        told += f"; {made.short:,} got fewer, having seen the others"
    if made.exactly:
        told += f"; {made.exactly:,} searched exactly, the index having found too few"
    return told


def _depth(run: Run, index: ItemIndex) -> int:
    """How many items are looked up for a user. Raises ArtefactError if the index's recall is unknown for so many."""
    depth = run.recommend.depth(len(index))
    if depth > index.about["k"] and not isinstance(index.settings, ExactConfig):
        raise ArtefactError(
            f"{run.index_path}: its recall was measured for the first {index.about['k']} items, [recommend] asks for "
            f"{depth}; build it again with `recsys index --overwrite`"
        )
    return depth


def _second_stage(run: Run, ranking: Ranking, retrieval: Retrieval, index: ItemIndex) -> SecondStage:
    """The model that puts candidates in order. Its columns of the users are looked for in each partition."""
    theirs = load_config(Run, ranking.config, remedy="correct recommend.ranking.config")
    bundle, version, _ = model_of(theirs, ranking.model)
    if isinstance(bundle.model, TwoTower):
        raise ConfigError(
            f'recommend.ranking.config = "{ranking.config}": is of a two-tower model, which finds candidates; name the '
            "run file of a model that gives probabilities"
        )
    outputs = [o.name for o in bundle.outputs]
    by = ranking.by or outputs[0]
    if by not in outputs:
        hint = did_you_mean(by, outputs, f"; its outputs are {', '.join(outputs)}")
        raise ConfigError(f"recommend.ranking.by: {by!r} is no output of {ranking.config}{hint}")
    if taken := [n for n in (retrieval.user, retrieval.item) if n in outputs]:
        raise ConfigError(f"recommend.ranking: an output of {ranking.config} is called {taken[0]!r}, as a column is")
    of_items = tuple(c for c in bundle.inputs if c in index.items.columns)
    of_users = tuple(c for c in bundle.inputs if c not in of_items)
    return SecondStage(bundle.to(pick_device(run.device)), version, by, of_items, of_users)


def _users_of(
    run: Run, retrieval: Retrieval, bundle: Bundle, index: ItemIndex, second: SecondStage | None, partition: str
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """A row per user, by user: of their first raw row what the models read; and how many rows have no user."""
    user = retrieval.user
    if taken := [n for n in (user, retrieval.item) if n in OURS]:
        raise ConfigError(f"retrieval: a column is called {taken[0]!r}, as one of the recommendations is; rename it")
    with explained(f"{run.data.path}, {partition}"):
        rows = with_derived(run, run.source.raw(partition, whole=False), [user])
        present = rows.collect_schema().names()
        columns = [user, *inputs_of(bundle, "query")]
        require(columns, present, f"the query side, {partition}")
        if second is not None:
            if lost := [c for c in second.from_users if c not in present]:
                raise DataError(
                    f"recommend.ranking: it reads column {lost[0]!r}, which is neither in the rows of {partition} nor "
                    f"in the index ({', '.join(index.items.columns)}); add it to the log, or to the corpus and "
                    "index.columns, and build the index again"
                )
            columns += second.from_users
        without = rows.select(pl.col(user).is_null().sum()).collect(engine="streaming").item()
        users = first_rows(rows, user, columns)
    if not users.height:
        raise DataError(f"{partition}: {run.data.path} has no users to recommend to; check the path and the partition")
    return users, {"rows_without_user": without}


def _earlier(run: Run, partition: str) -> list[str]:
    """The partitions whose positive rows a user has seen: those of training and validation, of a log split by day what
    the split names before `partition`, or, where days have no roles, all days of the log before it.
    """
    days = run.recommend.seen_days
    if not run.data.split.by_day:
        if days is not None:
            raise ConfigError(f"recommend.seen_days = {days}: this log is not split by day; leave it out")
        names = [*run.source.partitions("train"), *run.source.partitions("valid")]
        return names[: names.index(partition)] if partition in names else names
    try:
        day = date.fromisoformat(partition.removeprefix("day="))
    except ValueError:
        raise ConfigError(f"partition {partition!r}: this log is split by day; write day=2026-03-01") from None
    if isinstance(run.data.split, EachDay):
        return run.source.days_before(day, days)
    first = "" if days is None else f"day={day - timedelta(days=days)}"
    return [p for role in ROLES for p in run.source.partitions(role) if first <= p < partition]


def _seen_by(run: Run, known: Mapping[str, pl.Series], partitions: Sequence[str]) -> Pairs:
    """The items of the corpus in the users' positive rows, by position; of other users and items nothing is kept.

    `known` are the users and the items, by where they stand.
    """
    users, items = known.values()
    user, item = users.name, items.name
    parts: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for partition in partitions:
        with explained(f"{run.data.path}, {partition}"):
            rows = good_rows(run, partition)
            schema = rows.collect_schema()
            require((user, item), schema.names(), f"retrieval, {partition}")
            for where, ids in known.items():
                here, there = kind_of(schema[ids.name]), kind_of(ids.dtype)
                if here != there:
                    raise DataError(f"{where} {ids.name!r} holds {there}, in {partition} {here}; convert one of them")
            # An id that a narrower type cannot hold becomes null, which no row is joined to: it is not there.
            who = pl.LazyFrame({user: users.cast(schema[user], strict=False)}).with_row_index(_USER)
            what = pl.LazyFrame({item: items.cast(schema[item], strict=False)}).with_row_index(_ROW)
            positive = rows.filter(pl.col(carried(run.labels[0])) == 1).select(user, item)
            pairs = positive.join(who, on=user).join(what, on=item).select(_USER, _ROW).unique()
            found = pairs.collect(engine="streaming")
        parts.append(found[_USER].to_numpy().astype(np.int64) * len(items) + found[_ROW].to_numpy())
        if sum(map(len, parts[1:])) > len(parts[0]):  # seldom enough that many days are sorted few times
            parts = [np.unique(np.concatenate(parts))]
    keys_X = np.unique(np.concatenate(parts))
    bounds = np.searchsorted(keys_X, np.arange(len(users) + 1) * len(items))
    return Pairs(bounds, (keys_X % len(items)).astype(np.int32))
