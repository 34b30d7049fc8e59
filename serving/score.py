"""Batch scoring: every raw row of a partition gets its probabilities, once, published whole or not at all."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from base.errors import DataError
from base.faults import faultpoint
from base.storage import publish
from features.columns import explained, require
from features.schema import carried
from features.source import REASON, REJECTED, key_faults, limit_bad, rejected
from recsys.bundle import Bundle, log_odds_of
from recsys.data import IdCount, IdPolicy

CHUNK = 2**17
"""Rows read, transformed and scored at a time."""

VERSION = "model_version"

_ROW = "__row"


def score(
    bundle: Bundle,
    frame: pl.LazyFrame,
    *,
    carry: Sequence[str],
    batch_size: int = 8192,
    policy: IdPolicy = "error",
    count: IdCount | None = None,
    log_odds: bool = False,
) -> Iterator[pl.DataFrame]:
    """Scored tables, chunk by chunk in the rows' order: the columns in `carry` as they are, then one per output.

    With `log_odds` those follow, as `Bundle.predict_examples` gives them.
    Raises DataError if a column is missing or of another kind than in training.
    """
    require(carry, frame.collect_schema().names(), "score")
    kept = frame.with_columns(pl.col(c).alias(carried(c)) for c in carry)
    examples = bundle.features.transform(kept, keep=[carried(c) for c in carry])
    none = bundle.no_scores
    if log_odds:
        none = none.with_columns(pl.lit(0.0).alias(log_odds_of(o.name)) for o in bundle.outputs).clear()
    with explained("scoring"):
        for chunk in examples.collect_batches(chunk_size=CHUNK, maintain_order=True, engine="streaming"):
            parts = bundle.predict_examples(chunk, batch_size=batch_size, policy=policy, count=count, log_odds=log_odds)
            scores = pl.concat([none, *parts])
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
    max_bad_share: float = 0.0,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Score `frame` and publish keys, probabilities and the model's version as `target`; returns the rows scored.

    A row whose key is missing, or stood in an earlier row, is set aside beside the scores, in rejected.parquet. Refuses
    before anything is scored, and leaves whatever was published before: DataError if more than `max_bad_share` of the
    rows are such, or there are no others; ArtefactError if the bundle's golden rows are not reproduced. DataError as
    well where a row got lost.
    """
    bundle.check_golden()
    require(key, frame.collect_schema().names(), "score")
    frame = frame.with_row_index(_ROW)
    with explained("counting the rows to score"):
        rows, bad = pl.collect_all([frame.select(pl.len()), _bad_keys(frame, key)], engine="streaming")
    reasons = dict(bad.group_by(REASON).len().sort(REASON).iter_rows())
    total = rows.item() - bad.height
    limit_bad(target.name, bad.height, total, reasons, max_bad_share)
    if total == 0:
        raise DataError(f"{target}: there are no rows to score; check the path and the partition")
    good = frame.join(bad.lazy(), on=_ROW, how="anti", maintain_order="left") if bad.height else frame
    count = IdCount()
    with publish(target, "scores", overwrite=overwrite) as staging:
        done = 0
        for i, scored in enumerate(score(bundle, good, carry=key, policy=policy, count=count)):
            table = scored.with_columns(pl.lit(model_version).alias(VERSION))
            faultpoint("score.part")
            table.write_parquet(staging / f"part-{i:05}.parquet")
            done += table.height
            on_rows(done, total)
        if done != total:
            raise DataError(f"{target}: {total} rows came in, {done} were scored; nothing is published")
        if bad.height:
            aside = frame.join(bad.lazy(), on=_ROW, maintain_order="left").drop(_ROW)
            with explained("setting rows aside"):
                rejected(aside.collect(engine="streaming")).write_parquet(staging / REJECTED)
        staging.about.update(
            rows=total, bad=reasons, bundle=bundle.version, model_version=model_version, replaced_ids=count.replaced
        )
    return total


def _bad_keys(frame: pl.LazyFrame, key: Sequence[str]) -> pl.LazyFrame:
    """Numbers of the rows whose key is missing or repeated, and why."""
    missing, repeated = key_faults(key)
    faults = frame.select(_ROW, *key).with_columns(pl.coalesce(*missing, repeated).alias(REASON))
    return faults.filter(pl.col(REASON).is_not_null()).select(_ROW, REASON)
