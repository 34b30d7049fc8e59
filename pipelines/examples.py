"""Examples: a partition's good rows, encoded and published with what decided them."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from base.errors import ArtefactError, DataError
from base.storage import Staging, dump_json, is_published, publish, read_manifest, resolve, verify
from features.columns import explained
from features.pipeline import FeaturePipeline, FittedPipeline
from features.profile import missing_in
from features.schema import carried
from features.source import REASON, REJECTED, limit_bad, rejected
from pipelines.settings import FeatureRun

ROW_GROUP = 2**17


def write_examples(
    run: FeatureRun,
    fitted: FittedPipeline,
    partition: str,
    target: Path,
    counts: Mapping[str, Any],
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Publish one partition's examples, unless they are there already. `counts`: what `check_rows` found."""
    about = examples_about(run, fitted.version, partition)
    folder = whole(target, "examples", overwrite=overwrite)
    if folder and about.items() <= read_manifest(folder).about.items():
        say(f"{partition}: examples are there already")
        return
    with publish(target, "examples", overwrite=overwrite) as staging:
        staging.about.update(about, rows=counts["good"], bad=counts["bad"], missing=counts["missing"])
        _write(run, fitted, partition, staging)
    reasons = "".join(f"; set aside {n} x {r}" for r, n in counts["bad"].items())
    reasons += f" -> {target}/rejected.parquet" if reasons else ""
    unknown = "".join(f"; {label} not known yet of {n:,}" for label, n in counts["unknown"].items() if n)
    say(f"{partition}: {counts['good']:,} examples{unknown}{reasons}")


def examples_about(run: FeatureRun, features: str, partition: str) -> dict[str, Any]:
    """What decides a partition's examples: if it is the same, so are they."""
    seen = run.data.recipe(partition)["immature"]
    return {
        "partition": partition,
        "pipeline": features,
        "raw": run.source.fingerprint(partition),
        "log": log_of(run, partition),
        "immature": list(seen) if isinstance(seen, tuple) else seen,
    }


def examples_of(
    run: FeatureRun, partitions: list[str], fitted: FittedPipeline, path_of: Callable[[str], Path] | None = None
) -> list[Path]:
    """The example files of partitions, in order.

    Raises ArtefactError if one is damaged, DataError if their ids mean something else to `fitted`.
    """
    files: list[Path] = []
    for partition in partitions:
        path = (path_of or run.examples_path)(partition)
        folder = resolve(path, "examples")
        about = verify(folder).about
        version = about["pipeline"]
        if about.get("log") != log_of(run, partition) or not _as_mature(run, partition, about.get("immature")):
            raise DataError(
                f"{path}: made with other [data], [[tables]] or [derive] settings, so its "
                "rows or labels may differ; run `recsys prepare --overwrite`"
            )
        if version not in fitted.accepts:
            raise DataError(f"{path}: {fitted.explain(version)}; run `recsys prepare --overwrite`")
        files += sorted(folder.glob("part-*.parquet"))
    return files


def good_rows(run: FeatureRun, partition: str) -> pl.LazyFrame:
    """A partition's rows to learn from; of a retrieval run the positive ones."""
    return run.source.checked(partition).filter(pl.col(REASON).is_null())


def log_of(run: FeatureRun, partition: str) -> str:
    """Hash of the settings, beside the files and what is observed by now, that decide a partition's rows and labels."""
    settings = {
        "data": {k: v for k, v in run.data.recipe(partition).items() if k != "immature"},
        "tables": [table.model_dump(mode="json", exclude={"path"}) for table in run.tables],
        "derive": run.derive,
    }
    if run.positive is not None:
        settings["positive"] = run.positive
    return hashlib.sha256(dump_json(settings)).hexdigest()[:16]


def _as_mature(run: FeatureRun, partition: str, immature: Any) -> bool:
    """Whether examples know all labels that this run knows; those of a daily run may know more."""
    seen = run.data.recipe(partition)["immature"]
    if run.day is None or not isinstance(seen, tuple):
        return immature == (list(seen) if isinstance(seen, tuple) else seen)
    return set(immature) <= set(seen)


def check_rows(run: FeatureRun, pipeline: FeaturePipeline, partition: str) -> dict[str, Any]:
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
    limit_bad(partition, sum(reasons.values()), good, reasons, run.data.max_bad_share)
    if good == 0 and run.positive is not None:
        remedy = "mend the log, or name the day in data.without_log" if run.data.split.by_day else "check data.split"
        raise DataError(
            f"{partition}: {run.data.path} has no rows whose label {run.positive!r} is 1, and a retrieval model learns "
            f"from no others; {remedy}"
        )
    if good == 0:
        raise DataError(f"{partition}: {run.data.path} has no rows for it; check the path, data.where and data.split")
    kept = found.filter(pl.col(REASON).is_null())
    return {
        "good": good,
        "bad": reasons,
        "unknown": {label: kept[carried(label)].item() for label in run.labels},
        "missing": {column: kept[f"__missing_{column}"].item() for column in pipeline.inputs},
    }


def _write(run: FeatureRun, fitted: FittedPipeline, partition: str, staging: Staging) -> None:
    labels = [carried(label) for label in run.labels]
    with explained(f"{run.data.path}, {partition}"):
        examples = fitted.transform(good_rows(run, partition), keep=labels)
        examples.sink_parquet(
            staging / "part-00000.parquet", row_group_size=ROW_GROUP, compression="lz4", statistics=False
        )
        bad = (
            run.source.checked(partition).filter(pl.col(REASON).is_not_null()).drop(labels).collect(engine="streaming")
        )
    if bad.height:
        rejected(bad).write_parquet(staging / REJECTED)


def whole(target: Path, kind: str, *, overwrite: bool) -> Path | None:
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
