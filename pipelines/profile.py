"""What the rows of partitions look like: those of training from their examples, a day to check from its raw rows."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import polars as pl

from base.storage import is_published, read_manifest, resolve
from features.profile import SCORE_BINS, Bins, Profile, Reference, choose_bins, count, merge, number_bins
from features.schema import carried
from pipelines.config import Run
from pipelines.examples import check_rows, examples_of, good_rows
from recsys.bundle import Bundle

_CHUNK = 2**17


def reference_of(run: Run, bundle: Bundle, path_of: Callable[[str], Path]) -> Reference:
    """Count the examples that `bundle` was trained on, and the raw rows of the validation days with its scores.

    The bins are chosen on the last training partition; then every partition is read once. `path_of` says where the
    examples of a partition lie.
    """
    training, held_out = run.source.partitions("train"), run.source.partitions("valid")
    days = int(run.data.split.by_day)

    def examples(partition: str) -> pl.LazyFrame:
        return pl.scan_parquet(examples_of(run, [partition], bundle.features, path_of))

    bins = choose_bins(examples(training[-1]), bundle.features)
    missing = {p: read_manifest(resolve(path_of(p), "examples")).about.get("missing") for p in training}
    trained = merge(count(examples(p), bins, run.labels, days=days, missing=missing[p]) for p in training)
    left_out = merge(_held_out(run, bundle, bins, p) for p in held_out)
    scores = pl.concat([frame for p in held_out for frame in _scores(bundle, _encoded(run, bundle, p))])
    score_bins = {o.name: number_bins(scores.lazy(), o.name, SCORE_BINS) for o in bundle.outputs}
    left_out = left_out.model_copy(update={"scores": count(scores.lazy(), score_bins).features})
    return Reference(bins=bins, score_bins=score_bins, training=trained, held_out=left_out)


def profile_of(run: Run, bundle: Bundle, reference: Reference, partition: str) -> Profile:
    """Count the good raw rows of a partition in the reference's bins, and its scores if `bundle` has published them.

    Raises DataError as `prepare` does: on no rows, too many bad ones, a column that is missing or of another kind.
    """
    found = _held_out(run, bundle, reference.bins, partition)
    target = run.scores_path(partition)
    if not is_published(target):
        return found
    folder = resolve(target, "scores")
    if read_manifest(folder).about.get("bundle") != bundle.version:
        return found
    scored = pl.scan_parquet(folder / "part-*.parquet")
    if run.data.where is not None or run.positive is not None:  # every row is scored; the model was trained on these
        scored = scored.join(good_rows(run, partition).select(run.data.key), on=run.data.key, how="semi")
    return found.model_copy(update={"scores": count(scored, reference.score_bins).features})


def _held_out(run: Run, bundle: Bundle, bins: Mapping[str, Bins], partition: str) -> Profile:
    """Count raw rows that the bundle's features have not taken in."""
    rows = check_rows(run, bundle.features.recipe, partition)
    days = int(run.data.split.by_day)
    return count(_encoded(run, bundle, partition), bins, run.labels, days=days, missing=rows["missing"])


def _encoded(run: Run, bundle: Bundle, partition: str) -> pl.LazyFrame:
    return bundle.features.transform(good_rows(run, partition), keep=[carried(label) for label in run.labels])


def _scores(bundle: Bundle, examples: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    columns = bundle.schema.fields
    for chunk in examples.select(columns).collect_batches(chunk_size=_CHUNK, engine="streaming"):
        yield from bundle.predict_examples(chunk, batch_size=8192)
