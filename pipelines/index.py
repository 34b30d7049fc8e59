"""index: the corpus through the item tower of a registered model, published as an index to look items up in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from base.errors import ConfigError, DataError
from base.storage import is_published, read_manifest, resolve
from features.columns import explained, require, sql
from features.split import EachDay, days_of
from pipelines.config import Retrieval, Run
from pipelines.rankings import corpus_of
from pipelines.tracking import model_of
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.registry import CHAMPION
from recsys.towers import inputs_of, towers_of, vectors_of
from serving.index import KIND, QUERIES, Vectors, publish_index


def index(
    run: Run,
    *,
    model: str = CHAMPION,
    overwrite: bool = False,
    if_missing: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Index the corpus with a registered version, an alias, or a bundle's folder.

    With `if_missing` an index stays as it is if it is of that very bundle, corpus and settings; any other is replaced.
    Raises ConfigError where the run is none of retrieval, the corpus is smaller than what `recommend` asks for, or the
    index finds too little of what an exact search does.
    """
    retrieval = retrieval_of(run, "index")
    bundle, version, _ = model_of(run, model)
    towers_of(bundle)
    bundle = bundle.to(pick_device(run.device))
    partitions, asking = _known(run, bundle)
    about = _about(run, retrieval, bundle, partitions)
    if if_missing and is_published(run.index_path):
        found = read_manifest(resolve(run.index_path, KIND)).about
        if about.items() <= found.items():
            say(f"index of version {version}: there already")
            return run.index_path
    with explained("[retrieval], the corpus"):
        items = corpus_of(run, _columns(run, retrieval, bundle), partitions)
    depth = run.recommend.depth(items.height)
    made = publish_index(
        bundle,
        items,
        _sample(run, retrieval, bundle, asking),
        run.index_path,
        run.index,
        k=depth,
        about=about,
        overwrite=overwrite or if_missing,
    )
    say(
        f"index of version {version}: {made['kind']}, {made['items']:,} items, recall@{depth} {made['recall']:.4f} "
        f"of exact search on {made['queries']:,} users, built in {made['build_seconds']:.1f} s -> {run.index_path}"
    )
    return run.index_path


def retrieval_of(run: Run, step: str) -> Retrieval:
    """What the run says of users and items. Raises ConfigError if it says nothing."""
    if run.retrieval is None:
        raise ConfigError(f'recsys {step} is of two-tower models with [retrieval]; model.name is "{run.model.name}"')
    return run.retrieval


def with_derived(run: Run, frame: pl.LazyFrame, columns: list[str]) -> pl.LazyFrame:
    """Raw rows with those of `columns` that are derived. Raises DataError if one is neither raw nor derived."""
    present = frame.collect_schema().names()
    derived = {c: run.derive[c] for c in columns if c in run.derive and c not in present}
    require([c for c in columns if c not in derived], present, "retrieval")
    return frame.with_columns(sql(e, where=f"derive.{name}").alias(name) for name, e in derived.items())


def first_rows(rows: pl.LazyFrame, user: str, columns: Sequence[str]) -> pl.DataFrame:
    """The `columns` of each user's first row, by user; rows without a user do not count."""
    wanted = rows.select(list(dict.fromkeys([user, *columns]))).filter(pl.col(user).is_not_null())
    return wanted.unique(subset=user, keep="first", maintain_order=True).sort(user).collect(engine="streaming")


def _known(run: Run, bundle: Bundle) -> tuple[list[str], str]:
    """The partitions whose items are the log's corpus, and one with users to measure the index by."""
    source = run.source
    if not isinstance(run.data.split, EachDay):
        return [p for role in ("train", "valid", "test") for p in source.partitions(role)], source.partitions("valid")[
            -1
        ]
    days = [d for d in (bundle.origin.trained_to, bundle.origin.calibrated_on, bundle.origin.day) if d is not None]
    if not days:
        raise ConfigError(
            f"bundle {bundle.version} does not say which days it has seen, and data.split names none: give data.split, "
            "or name a model that was trained with --day"
        )
    last = max(days_of(d)[0] for d in days)
    return [*source.days_before(last), f"day={last}"], f"day={last}"


def _about(run: Run, retrieval: Retrieval, bundle: Bundle, partitions: list[str]) -> dict[str, Any]:
    """What decides an index."""
    about: dict[str, Any] = {
        "bundle": bundle.version,
        "index": run.index.model_dump(mode="json"),
        "recommend": run.recommend.model_dump(mode="json", include={"k", "candidates"}),
        "two_stages": run.recommend.ranking is not None,
        "retrieval": retrieval.model_dump(mode="json", include={"user", "item", "items"}),
    }
    if retrieval.items is not None:
        return about | {"items_sha256": run.source.fingerprint_of(retrieval.items)}
    return about | {"log": [run.source.fingerprint(p) for p in partitions]}


def _columns(run: Run, retrieval: Retrieval, bundle: Bundle) -> list[str]:
    """Raw columns of the corpus to keep."""
    more = run.index.columns
    if more is None and retrieval.items is not None:
        more = run.source.items(retrieval.items).collect_schema().names()
    if more is None:
        more = run.source.item_columns(retrieval.item)
    return [*inputs_of(bundle, "item"), *more]


def _sample(run: Run, retrieval: Retrieval, bundle: Bundle, partition: str) -> Vectors:
    """Vectors of users of a partition, evenly from their order."""
    user, inputs = retrieval.user, inputs_of(bundle, "query")
    with explained(f"{run.data.path}, {partition}"):
        rows = with_derived(run, run.source.raw(partition), [user])
        require(inputs, rows.collect_schema().names(), f"the query side, {partition}")
        users = first_rows(rows, user, inputs)
    if not users.height:
        raise DataError(
            f"{partition}: {run.data.path} has no users to measure the index by; check the path and the day"
        )
    chosen = users[np.unique(np.linspace(0, users.height - 1, QUERIES).astype(np.int64))]
    return np.concatenate(list(vectors_of(bundle, chosen.lazy(), "query")))
