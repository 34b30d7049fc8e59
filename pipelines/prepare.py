"""prepare: raw partitions in, fitted features and partitions of examples out."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from base.errors import ArtefactError, DataError
from base.storage import Staging, dump_json, is_published, publish, read_manifest, resolve, verify
from features.columns import explained, require
from features.pipeline import FeaturePipeline, FittedPipeline
from features.profile import missing_in
from features.schema import carried
from features.source import REASON
from pipelines.config import Run
from pipelines.measure import check_outputs

ROW_GROUP = 2**17


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
    counts = {p: check_rows(run, run.pipeline, p) for p in [*training, *source.partitions("valid")]}
    good = sum(c["good"] for p, c in counts.items() if p in training)
    for role in ("train", "valid"):
        for label in run.labels:
            if all(counts[p]["unknown"][label] == counts[p]["good"] for p in source.partitions(role)):
                raise DataError(
                    f"label {label!r} is not known of any {role} row by {run.data.observed_until}, where it matures "
                    f"after {run.data.matures_after_days.get(label)} days: let data.split.{role} end earlier"
                )
    _limit(run, "data.time", undated, good, {"time is missing": undated})
    identity = {p: source.fingerprint(p)["sha256"] for p in counts}
    fitted = _fit(run, training, identity, overwrite=overwrite, say=say)
    for partition in counts:
        target = run.examples_path(partition)
        raw = source.fingerprint(partition)
        about = {"partition": partition, "pipeline": fitted.version, "raw": raw, "log": _log_of(run, partition)}
        folder = _whole(target, "examples", overwrite=overwrite)
        if folder and _about(folder) == about:
            say(f"{partition}: examples are there already")
            continue
        with publish(target, "examples", overwrite=overwrite) as staging:
            found = counts[partition]
            staging.about.update(about, rows=found["good"], bad=found["bad"], missing=found["missing"])
            _write(run, fitted, partition, staging)
        reasons = "".join(f"; set aside {n} x {r}" for r, n in counts[partition]["bad"].items())
        reasons += f" -> {target}/rejected.parquet" if reasons else ""
        unknown = "".join(f"; {label} not known yet of {n:,}" for label, n in counts[partition]["unknown"].items() if n)
        say(f"{partition}: {counts[partition]['good']:,} examples{unknown}{reasons}")
    return fitted


def examples_of(run: Run, partitions: list[str], fitted: FittedPipeline) -> list[Path]:
    """The example files of partitions, in order.

    Raises ArtefactError if one is damaged, DataError if their ids mean something else to `fitted`.
    """
    files: list[Path] = []
    for partition in partitions:
        folder = resolve(run.examples_path(partition), "examples")
        about = verify(folder).about
        version = about["pipeline"]
        if about.get("log") != _log_of(run, partition):
            raise DataError(
                f"{run.examples_path(partition)}: made with other [data], [[tables]] or [derive] settings, so its "
                "rows or labels may differ; run `recsys prepare --overwrite`"
            )
        if version not in fitted.accepts:
            raise DataError(
                f"{run.examples_path(partition)}: made by features {version}, the fitted ones are {fitted.version}; "
                "run `recsys prepare --overwrite`"
            )
        files += sorted(folder.glob("part-*.parquet"))
    return files


def _fit(
    run: Run, training: list[str], identity: dict[str, str], *, overwrite: bool, say: Callable[[str], None]
) -> FittedPipeline:
    target = run.features_path
    about: dict[str, Any] = {
        "fitted_on": {p: {"sha256": identity[p], "log": _log_of(run, p, labels=False)} for p in training},
    }
    if folder := _whole(target, "features", overwrite=overwrite):
        stored = FittedPipeline.load(folder)
        if stored.recipe == run.pipeline and read_manifest(folder).about == about:
            say(f"features {stored.version}: fitted already")
            return stored
    with publish(target, "features", overwrite=overwrite) as staging:
        with explained("fitting features"):
            fitted = run.pipeline.fit(_good(run, p) for p in training)
        fitted.save(staging)
        staging.about.update(about)
    sizes = ", ".join(f"{f.name} {f.rows:,}" for f in fitted.sparse)
    say(f"features {fitted.version}: fitted on {len(training)} partitions; rows per table: {sizes}")
    return fitted


def _good(run: Run, partition: str) -> pl.LazyFrame:
    return run.source.checked(partition).filter(pl.col(REASON).is_null())


def _log_of(run: Run, partition: str, *, labels: bool = True) -> str:
    """Hash of the settings, beside the files, that decide a partition's rows and, unless told not to, its labels."""
    recipe = run.data.recipe(partition)
    settings = {
        "data": recipe if labels else {k: v for k, v in recipe.items() if k != "immature"},
        "tables": [table.model_dump(mode="json", exclude={"path"}) for table in run.tables],
        "derive": run.derive,
    }
    return hashlib.sha256(dump_json(settings)).hexdigest()[:16]


def check_rows(run: Run, pipeline: FeaturePipeline, partition: str) -> dict[str, Any]:
    """Rows to learn from, and bad ones by reason; of the former, how many have an unknown label, or no value.

    Raises DataError if there are none, too many are bad, or `pipeline` misses a column or cannot read one.
    """
    with explained(f"{run.data.path}, {partition}"):
        marked = run.source.checked(partition)
        pipeline.kinds(marked)
        unknown = (pl.col(carried(label)).is_null().sum().alias(carried(label)) for label in run.labels)
        missing = [n.alias(f"__missing_{c}") for c, n in missing_in(marked, pipeline.inputs).items()]
        found = marked.group_by(REASON).agg(pl.len(), *unknown, *missing).sort(REASON).collect(engine="streaming")
    reasons = dict(found.select(REASON, "len").iter_rows())
    good = reasons.pop(None, 0)
    _limit(run, partition, sum(reasons.values()), good, reasons)
    if good == 0:
        raise DataError(f"{partition}: {run.data.path} has no rows for it; check the path, data.where and data.split")
    kept = found.filter(pl.col(REASON).is_null())
    return {
        "good": good,
        "bad": reasons,
        "unknown": {label: kept[carried(label)].item() for label in run.labels},
        "missing": {column: kept[f"__missing_{column}"].item() for column in pipeline.inputs},
    }


def _limit(run: Run, where: str, bad: int, good: int, reasons: dict[str, int]) -> None:
    if bad > run.data.max_bad_share * (bad + good):
        worst = sorted(reasons.items(), key=lambda item: -item[1])[:5]
        listed = "; ".join(f"{rows} x {reason}" for reason, rows in worst)
        raise DataError(
            f"{where}: {bad} of {bad + good} rows are bad, {bad / (bad + good):.2%} where "
            f"{run.data.max_bad_share:.2%} is allowed: {listed}. "
            "Mend the log, or raise data.max_bad_share to set them aside"
        )


def _write(run: Run, fitted: FittedPipeline, partition: str, staging: Staging) -> None:
    labels = [carried(label) for label in run.labels]
    with explained(f"{run.data.path}, {partition}"):
        examples = fitted.transform(_good(run, partition), keep=labels)
        examples.sink_parquet(
            staging / "part-00000.parquet", row_group_size=ROW_GROUP, compression="lz4", statistics=False
        )
        bad = (
            run.source.checked(partition).filter(pl.col(REASON).is_not_null()).drop(labels).collect(engine="streaming")
        )
    if bad.height:
        bad.rename({REASON: "reason"}).write_parquet(staging / "rejected.parquet")


def _whole(target: Path, kind: str, *, overwrite: bool) -> Path | None:
    """What is published there, checked; None if nothing is, or it is damaged and may be replaced."""
    if not is_published(target):
        return None
    try:
        folder = resolve(target, kind)
        verify(folder)
    except ArtefactError:
        if not overwrite:
            raise
        return None
    return folder


def _about(folder: Path) -> dict[str, Any]:
    about = read_manifest(folder).about
    return {key: about.get(key) for key in ("partition", "pipeline", "raw", "log")}
