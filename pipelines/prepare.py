"""prepare: raw partitions in, fitted features and partitions of examples out."""

from collections.abc import Callable
from typing import Any

from base.errors import DataError
from base.storage import publish, read_manifest
from features.columns import explained, require
from features.pipeline import FittedPipeline
from features.source import limit_bad
from pipelines.config import Run
from pipelines.examples import check_rows, good_rows, log_of, whole, write_examples
from pipelines.measure import check_outputs
from pipelines.rankings import write_ranking


def prepare(run: Run, *, overwrite: bool = False, say: Callable[[str], None] = print) -> FittedPipeline:
    """Fit the features on the training partitions, then write the examples of training and validation.

    Partitions that are there already, made by the same features from the same files, are left alone.
    Raises DataError if a partition is empty, holds too many bad rows, or a column is missing or of a wrong type.
    """
    check_outputs(run)
    source = run.source
    training = source.partitions("train")
    with explained(f"{run.data.path}, {training[0]}"):
        present = source.checked(training[0]).collect_schema().names()
    require(run.evaluate.columns, present, "evaluate")  # before hours of training, not after
    undated = source.undated()
    counts = {
        partition: check_rows(run, run.pipeline, partition) for partition in [*training, *source.partitions("valid")]
    }
    good = sum(c["good"] for p, c in counts.items() if p in training)
    for role in ("train", "valid"):
        for label in run.labels:
            if all(counts[p]["unknown"][label] == counts[p]["good"] for p in source.partitions(role)):
                raise DataError(
                    f"label {label!r} is not known of any {role} row by {run.data.observed_until}, where it matures "
                    f"after {run.data.matures_after_days.get(label)} days: let data.split.{role} end earlier"
                )
    limit_bad("data.time", undated, good, {"time is missing": undated}, run.data.max_bad_share)
    identity = {p: source.fingerprint(p)["sha256"] for p in counts}
    fitted = _fit(run, training, identity, overwrite=overwrite, say=say)
    if run.retrieval is not None:  # first, since a corpus may be wrong, and examples take longer
        write_ranking(run, fitted, source.partitions("valid"), overwrite=overwrite, say=say)
    for partition in counts:
        target = run.examples_path(partition)
        write_examples(run, fitted, partition, target, counts[partition], overwrite=overwrite, say=say)
    return fitted


def _fit(
    run: Run, training: list[str], identity: dict[str, str], *, overwrite: bool, say: Callable[[str], None]
) -> FittedPipeline:
    target = run.features_path
    about: dict[str, Any] = {
        "fitted_on": {p: {"sha256": identity[p], "log": log_of(run, p)} for p in training},
    }
    if folder := whole(target, "features", overwrite=overwrite):
        stored = FittedPipeline.load(folder)
        if stored.recipe == run.pipeline and read_manifest(folder).about == about:
            say(f"features {stored.version}: fitted already")
            return stored
    with publish(target, "features", overwrite=overwrite) as staging:
        with explained("fitting features"):
            fitted = run.pipeline.fit(good_rows(run, p) for p in training)
        fitted.save(staging)
        staging.about.update(about)
    sizes = ", ".join(f"{f.name} {f.rows:,}" for f in fitted.sparse)
    say(f"features {fitted.version}: fitted on {len(training)} partitions; rows per table: {sizes}")
    return fitted
