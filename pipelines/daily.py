"""The features of a day: count its rows, extend the features of the day before, encode it; or fit on a window anew.

`plan` says what is missing, so that machines can share the work: `count` and `encode` are for one partition each, `fit`
lies between them. `prepare_day` does all in turn. Each may be repeated: what is there already is left alone.
"""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from base.config import Config
from base.errors import ArtefactError, DataError, Superseded
from base.storage import exclusive, is_published, publish, read_manifest, resolve
from features.columns import explained
from features.pipeline import Counts, FittedPipeline
from pipelines.examples import check_rows, good_rows, log_of, write_examples
from pipelines.line import Line, line_of
from pipelines.settings import FeatureRun

Say = Callable[[str], None]


class Plan(Config):
    """What is to be done for a day."""

    count: tuple[str, ...]
    """Partitions whose rows the features have not taken in."""
    encode: tuple[str, ...]
    """Partitions without examples, or whose labels have matured since."""


def plan(run: FeatureRun) -> Plan:
    """What `prepare_day` would do. Days that were missed are made up for, in order.

    Raises DataError if there is no line to go on with, or the day lies before it.
    """
    line = line_of(run)
    days = line.days("features")
    if run.full and days and days[-1] > run.trained_to:
        return Plan(count=(), encode=())  # the line has gone on from it
    if run.full:
        wanted = run.source.partitions("train")
        return Plan(count=tuple(wanted), encode=(*wanted, *run.source.partitions("valid")))
    if not days:
        raise DataError(
            f"line {line.name}: its full training is not finished; run `recsys prepare --day {line.name} --full`"
        )
    if run.on_day < days[0]:
        raise Superseded(
            f"{run.on_day}: line {line.name} begins with the features of {days[0]}; there is nothing to add"
        )
    missing = [d for d in run.data.days(days[-1], run.on_day) if d > days[-1]]
    first = run.data.day_before(run.on_day, run.daily.window_days)
    encoded = [d for d in run.data.days(first, run.on_day) if _is_stale(run, line, d, days[0])]
    return Plan(count=_names(missing), encode=_names(sorted({*missing, *encoded})))


def count(run: FeatureRun, partition: str, *, say: Say = print) -> Counts:
    """The integer statistics of one partition, published for whoever fits. Raises DataError on bad or missing rows."""
    _refuse_stopped(run, partition)
    target = run.counts_path(partition)
    about = {"raw": run.source.fingerprint(partition), "log": log_of(run, partition)}
    stored = _counts(target)
    if stored and stored.recipe == run.pipeline and read_manifest(resolve(target)).about == about:
        say(f"{partition}: counted already")
        return stored
    found = check_rows(run, run.pipeline, partition)
    with publish(target, "counts", overwrite=True, keep=1) as staging:
        with explained(f"{run.data.path}, {partition}"):
            counts = run.pipeline.count(good_rows(run, partition))
        counts.save(staging)
        staging.about.update(about)
    say(f"{partition}: counted {found['good']:,} rows")
    return counts


def fit(run: FeatureRun, *, say: Say = print) -> FittedPipeline:
    """The features of the run's day: those of the day before, extended by what was counted; or, in full, a new fit.

    Raises ArtefactError if a day is not counted, DataError if its files are those of the day before.
    """
    line = line_of(run)
    with exclusive(line.folder, say):  # of two days at once the second finds the first one's features
        work = plan(run)
        return _fit_window(run, line, work, say) if run.full and work.count else _extend(run, line, work, say)


def _extend(run: FeatureRun, line: Line, work: Plan, say: Say) -> FittedPipeline:
    last = line.days("features")[-1]
    fitted = line.features(last)
    if fitted.recipe != run.pipeline:
        raise DataError(
            f"{line.features_path(last)}: fitted from other [[features]] or [derive], and ids must keep their meaning; "
            + ("train a later day with --full" if run.full else "train anew with --full, or restore the settings")
        )
    for partition in work.count:
        day = date.fromisoformat(partition.removeprefix("day="))
        _refuse_repeated(run, partition, f"day={run.data.day_before(day)}")
        before = {f.name: f.rows for f in fitted.sparse}
        with publish(line.features_path(day), "features") as staging:
            fitted = fitted.extend(_require_counts(run, partition), day=day, recycle_after_days=run.daily.window_days)
            fitted.save(staging)
            staging.about.update(version=fitted.version)
        new = ", ".join(f"{f.name} +{f.rows - before[f.name]:,}" for f in fitted.sparse if f.rows > before[f.name])
        say(f"{partition}: features {fitted.version}; new rows: {new or 'none'}")
    if not work.count:
        say(f"day={run.on_day}: features {fitted.version} have taken it in already")
    return fitted


def encode(run: FeatureRun, partition: str, *, say: Say = print) -> None:
    """The examples of one partition, by the features of its own day."""
    line = line_of(run)
    fitted = line.features(run.trained_to if run.full else date.fromisoformat(partition.removeprefix("day=")))
    target = line.examples_path(partition)
    write_examples(run, fitted, partition, target, check_rows(run, run.pipeline, partition), overwrite=True, say=say)


def prepare_day(run: FeatureRun, *, say: Say = print) -> FittedPipeline:
    """All steps in turn, on one machine."""
    work = plan(run)
    for partition in work.count:
        count(run, partition, say=say)
    fitted = fit(run, say=say)
    for partition in work.encode:
        encode(run, partition, say=say)
    return fitted


def _fit_window(run: FeatureRun, line: Line, work: Plan, say: Say) -> FittedPipeline:
    target = line.features_path(run.trained_to)
    about = {
        "fitted_on": {
            p: read_manifest(resolve(run.counts_path(p), "counts", made_by="`recsys count`")).about["raw"]
            for p in work.count
        }
    }
    if is_published(target) and about.items() <= read_manifest(resolve(target, "features")).about.items():
        stored = FittedPipeline.load(resolve(target, "features"))
        if stored.recipe == run.pipeline:
            say(f"features {stored.version}: fitted already")
            return stored
    with publish(target, "features", overwrite=True) as staging:
        fitted = run.pipeline.settle((_require_counts(run, p) for p in work.count), day=run.trained_to)
        fitted.save(staging)
        staging.about.update(about, version=fitted.version)
    sizes = ", ".join(f"{f.name} {f.rows:,}" for f in fitted.sparse)
    say(f"features {fitted.version}: fitted on {len(work.count)} days; rows per table: {sizes}")
    return fitted


def _counts(target: Path) -> Counts | None:
    """What is published there; None if nothing is, or it is damaged: it can be counted again."""
    if not is_published(target):
        return None
    try:
        return Counts.load(resolve(target, "counts"))
    except ArtefactError:
        return None


def _require_counts(run: FeatureRun, partition: str) -> Counts:
    return Counts.load(resolve(run.counts_path(partition), "counts", made_by=f"`recsys count --partition {partition}`"))


def _refuse_stopped(run: FeatureRun, partition: str) -> None:
    """What a data check has stopped is not learned from, neither by its own day's run nor by a later one."""
    target = run.checks_path(partition)
    stopped = read_manifest(resolve(target, "check")).about["stopped"] if is_published(target) else []
    if stopped:
        raise DataError(
            f"{partition}: its data check said stop: {'; '.join(stopped)}: mend the log or allow it in [checks], then "
            f"run `recsys check --partition {partition}` again"
        )


def _refuse_repeated(run: FeatureRun, partition: str, before: str) -> None:
    """Yesterday's files under today's name would count every id twice."""
    if not is_published(run.counts_path(before)) or not run.source.has_own_files(partition):
        return
    raw: dict[str, Any] = read_manifest(resolve(run.counts_path(before), "counts")).about["raw"]
    if raw["sha256"] == run.source.fingerprint(partition)["sha256"]:
        raise DataError(
            f"{partition}: its files are, byte for byte, those of {before}; put the day's own log there, or name the "
            "day in data.without_log"
        )


def _is_stale(run: FeatureRun, line: Line, day: date, first: date) -> bool:
    """Whether a day has no examples though it has features, or such that knew fewer labels than are known by now."""
    target = line.examples_path(f"day={day}")
    if not is_published(target):
        return first < day
    about = read_manifest(resolve(target, "examples")).about
    return bool(set(about["immature"]) - set(run.data.immature(f"day={day}")))


def _names(days: list[date]) -> tuple[str, ...]:
    return tuple(f"day={day}" for day in days)
