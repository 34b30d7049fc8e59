"""index: the corpus through the item tower of a registered model, published as an index to look items up in."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from base.errors import ConfigError, DataError
from base.storage import exclusive, is_published, read_manifest, resolve
from features.columns import explained, require, sql
from features.split import ROLES, EachDay, days_of
from pipelines.config import Retrieval, Run
from pipelines.rankings import corpus_of, window_before
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
    with _alone(run, say):
        _build(run, retrieval, bundle, version, overwrite=overwrite, if_missing=if_missing, say=say)
    return run.index_path


def index_of(run: Run, bundle: Bundle, version: str, *, say: Callable[[str], None] = print) -> Path:
    """The folder of an index of this very bundle, built first if there is none.

    It is built as well if the published one is of other settings, of other days, or of another table of items; the
    days' logs are not read to compare them. The folder outlasts what is published next, of which the last three are
    kept.
    """
    retrieval = retrieval_of(run, "index")
    with _alone(run, say):
        if not _is_there(run, _settings(run, retrieval, bundle, _known(run, bundle)[0])):
            _build(run, retrieval, bundle, version, overwrite=True, if_missing=False, say=say)
        return resolve(run.index_path, KIND)


def _alone(run: Run, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Runs of several days may want the same index at once: the first builds it, the others find it there."""
    return exclusive(run.folder / "indexing", say)


def _build(
    run: Run,
    retrieval: Retrieval,
    bundle: Bundle,
    version: str,
    *,
    overwrite: bool,
    if_missing: bool,
    say: Callable[[str], None],
) -> None:
    towers_of(bundle)
    bundle = bundle.to(pick_device(run.device))
    partitions, asking = _known(run, bundle)
    about = _about(run, retrieval, bundle, partitions)
    if if_missing and _is_there(run, about):
        say(f"index of version {version}: there already")
        return
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
    """The partitions whose items are the log's corpus, and one with users to measure the index by.

    Where days have no roles: the last day that the bundle has seen, and those of the `daily.window_days` days before
    it that are in the log, as the gate's question about that day has them.
    """
    source = run.source
    if not isinstance(run.data.split, EachDay):
        return [p for role in ROLES for p in source.partitions(role)], source.partitions("valid")[-1]
    days = [d for d in (bundle.origin.trained_to, bundle.origin.calibrated_on, bundle.origin.day) if d is not None]
    if not days:
        raise ConfigError(
            f"bundle {bundle.version} does not say which days it has seen, and data.split names none: give data.split, "
            "or name a model that was trained with --day"
        )
    last = max(days_of(d)[0] for d in days)
    logged = set(source.days_before(last))
    return [*(p for p in window_before(run, last) if p in logged), f"day={last}"], f"day={last}"


def _is_there(run: Run, about: dict[str, Any]) -> bool:
    """Whether an index is published of which all that is true."""
    if not is_published(run.index_path):
        return False
    return about.items() <= read_manifest(resolve(run.index_path, KIND)).about.items()


def _about(run: Run, retrieval: Retrieval, bundle: Bundle, partitions: list[str]) -> dict[str, Any]:
    """What decides an index."""
    about = _settings(run, retrieval, bundle, partitions)
    return about if retrieval.items is not None else about | {"log": [run.source.fingerprint(p) for p in partitions]}


def _settings(run: Run, retrieval: Retrieval, bundle: Bundle, partitions: list[str]) -> dict[str, Any]:
    """What decides an index, but for the files of the log."""
    about: dict[str, Any] = {
        "bundle": bundle.version,
        "index": run.index.model_dump(mode="json"),
        "recommend": run.recommend.model_dump(mode="json", include={"k", "candidates"}),
        "two_stages": run.recommend.ranking is not None,
        "retrieval": retrieval.model_dump(mode="json", include={"user", "item", "items"}),
    }
    if retrieval.items is not None:
        return about | {"items_sha256": run.source.fingerprint_of(retrieval.items)}
    return about | {"partitions": partitions}


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
