"""Batch scoring: every raw row of a partition gets its probabilities, once, published whole or not at all."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from base.errors import DataError
from base.faults import faultpoint
from base.storage import publish
from features.columns import explained, require
from features.schema import carried
from recsys.bundle import Bundle
from recsys.data import IdCount, IdPolicy

CHUNK = 2**17
"""Rows read, transformed and scored at a time."""

VERSION = "model_version"


def score(
    bundle: Bundle,
    frame: pl.LazyFrame,
    *,
    carry: Sequence[str],
    batch_size: int = 8192,
    policy: IdPolicy = "error",
    count: IdCount | None = None,
) -> Iterator[pl.DataFrame]:
    """Scored tables, chunk by chunk in the rows' order: the columns in `carry` as they are, then one per output.

    Raises DataError if a column is missing or of another kind than in training.
    """
    require(carry, frame.collect_schema().names(), "score")
    kept = frame.with_columns(pl.col(c).alias(carried(c)) for c in carry)
    examples = bundle.features.transform(kept, keep=[carried(c) for c in carry])
    with explained("scoring"):
        for chunk in examples.collect_batches(chunk_size=CHUNK, maintain_order=True, engine="streaming"):
            parts = bundle.predict_examples(chunk, batch_size=batch_size, policy=policy, count=count)
            scores = pl.concat([bundle.no_scores, *parts])
            yield chunk.select(pl.col(carried(c)).alias(c) for c in carry).hstack(scores)


def publish_scores(
    bundle: Bundle,
    frame: pl.LazyFrame,
    target: Path,
    *,
    key: Sequence[str],
    model_version: str,
    overwrite: bool = False,
    policy: IdPolicy = "error",
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Score `frame` and publish keys, probabilities and the model's version as `target`; returns the rows.

    Refuses, and leaves whatever was published before: DataError on an empty input, on a key that is missing or
    repeated, and on a row count that is not the input's; ArtefactError if the bundle's golden rows are not reproduced.
    """
    bundle.check_golden()
    with explained("counting the rows to score"):
        total = frame.select(pl.len()).collect(engine="streaming").item()
    if total == 0:
        raise DataError(f"{target}: there are no rows to score; check the path and the partition")
    count = IdCount()
    with publish(target, "scores", overwrite=overwrite) as staging:
        done = 0
        for i, scored in enumerate(score(bundle, frame, carry=key, policy=policy, count=count)):
            table = scored.with_columns(pl.lit(model_version).alias(VERSION))
            faultpoint("score.part")
            table.write_parquet(staging / f"part-{i:05}.parquet")
            done += table.height
            on_rows(done, total)
        if done != total:
            raise DataError(f"{target}: {total} rows came in, {done} were scored; nothing is published")
        _check_keys(staging / "part-*.parquet", key, total)
        staging.about.update(
            rows=total, bundle=bundle.version, model_version=model_version, replaced_ids=count.replaced
        )
    return total


def _check_keys(parts: Path, key: Sequence[str], total: int) -> None:
    """Each key once. Raises DataError showing one that is missing or stands twice."""
    scored = pl.scan_parquet(parts).select(key)
    missing = scored.select(pl.any_horizontal(pl.col(key).is_null()).sum()).collect(engine="streaming").item()
    if missing:
        raise DataError(f"key {', '.join(key)}: missing in {missing} of {total} rows; every row to score needs its key")
    groups = scored.group_by(key).len()
    repeated = groups.filter(pl.col("len") > 1).head(1).collect(engine="streaming")
    if repeated.height:
        values = repeated.row(0, named=True)
        times = values.pop("len")
        raise DataError(f"key {values} stands {times} times in the rows to score; each row needs a key of its own")
