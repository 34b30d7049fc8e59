"""What the rows of partitions look like: those of training from their examples, a day to check from its raw rows."""

from collections.abc import Iterator, Sequence

import polars as pl

from base.storage import is_published, read_manifest, resolve
from features.profile import SCORE_BINS, Profile, Reference, choose_bins, count, merge, number_bins
from features.schema import carried
from features.source import REASON
from pipelines.config import Run
from pipelines.prepare import check_rows, examples_of
from recsys.bundle import Bundle

_CHUNK = 2**17


def reference_of(run: Run, bundle: Bundle, training: Sequence[str], held_out: Sequence[str]) -> Reference:
    """Count the prepared examples of partitions that `bundle` was trained on, and of held-out ones with its scores.

    The bins are chosen on the last training partition; then every partition is read once.
    """
    bins = choose_bins(_examples(run, bundle, training[-1]), bundle.features)
    trained, left_out = (
        merge(
            count(
                _examples(run, bundle, p),
                bins,
                run.labels,
                days=int(run.data.split.by_day),
                missing=read_manifest(resolve(run.examples_path(p), "examples")).about.get("missing"),
            )
            for p in partitions
        )
        for partitions in (training, held_out)
    )
    scores = pl.concat([frame for p in held_out for frame in _scores(bundle, _examples(run, bundle, p))])
    score_bins = {o.name: number_bins(scores.lazy(), o.name, SCORE_BINS) for o in bundle.outputs}
    left_out = left_out.model_copy(update={"scores": count(scores.lazy(), score_bins).features})
    return Reference(bins=bins, score_bins=score_bins, training=trained, held_out=left_out)


def profile_of(run: Run, bundle: Bundle, reference: Reference, partition: str) -> Profile:
    """Count the good raw rows of a partition in the reference's bins, and its scores if `bundle` has published them.

    Raises DataError as `prepare` does: on no rows, too many bad ones, a column that is missing or of another kind.
    """
    rows = check_rows(run, bundle.features.recipe, partition)
    good = run.source.checked(partition).filter(pl.col(REASON).is_null())
    examples = bundle.features.transform(good, keep=[carried(label) for label in run.labels])
    days = int(run.data.split.by_day)
    found = count(examples, reference.bins, run.labels, days=days, missing=rows["missing"])
    target = run.scores_path(partition)
    if not is_published(target):
        return found
    folder = resolve(target, "scores")
    if read_manifest(folder).about.get("bundle") != bundle.version:
        return found
    scored = pl.scan_parquet(folder / "part-*.parquet")
    if run.data.where is not None:  # every row is scored, but the model was trained on these
        scored = scored.join(good.select(run.data.key), on=run.data.key, how="semi")
    return found.model_copy(update={"scores": count(scored, reference.score_bins).features})


def _examples(run: Run, bundle: Bundle, partition: str) -> pl.LazyFrame:
    return pl.scan_parquet(examples_of(run, [partition], bundle.features))


def _scores(bundle: Bundle, examples: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    columns = bundle.schema.fields
    for chunk in examples.select(columns).collect_batches(chunk_size=_CHUNK, engine="streaming"):
        yield from bundle.predict_examples(chunk, batch_size=8192)
