"""check: a day beside what the model has seen, before it is scored; with its scores, after. Warns, or stops."""

import re
from collections.abc import Callable, Sequence
from datetime import date

import mlflow

from base.errors import DataError
from base.storage import dump_json, publish, resolve
from pipelines.config import Run
from pipelines.measure import held_out
from pipelines.profile import profile_of
from pipelines.text import findings_table
from pipelines.tracking import model_of, registry_of
from recsys.bundle import Bundle
from recsys.registry import CHAMPION, ModelRegistry
from serving.drift import Finding, compare


def check(
    run: Run, *, partition: str | None = None, model: str = CHAMPION, say: Callable[[str], None] = print
) -> dict[str, list[Finding]]:
    """Compare partitions (by default the test ones) with what a model has seen; publish and log what was found.

    `model` is a registered version, an alias, or a bundle's folder. Nothing is compared if there is no champion yet,
    or the bundle keeps no profile. Raises DataError if a finding stops a partition, after all are published, or if it
    cannot be read as training data are.
    """
    partitions = held_out(run, partition)
    registry = registry_of(run)
    if model == CHAMPION and registry.champion() is None:
        say(f"model {registry.name!r} has no champion yet: there is nothing to compare with")
        return {}
    bundle, version, run_id = model_of(run, model)
    run_id = run_id or registry.run_of_training(bundle.version)
    if bundle.profile is None:
        say(f"version {version} keeps no profile of its training rows: train again to compare with them")
        return {}
    checked: dict[str, list[Finding]] = {}
    for name in partitions:
        found = checked[name] = findings_of(run.at(name), bundle, name)
        say(f"{name} beside what version {version} has seen\n\n{findings_table(found)}\n")
        _publish(run, name, found, bundle, version)
        _log(run, registry, run_id, name, found)
    stopped = [f"{name}, {f.sentence}" for name, found in checked.items() for f in found if f.verdict == "stop"]
    if stopped:
        raise DataError(f"{'; '.join(stopped)}: mend the log, or allow it in [checks]")
    return checked


def findings_of(run: Run, bundle: Bundle, partition: str) -> list[Finding]:
    """What there is to say of a partition; nothing if the bundle keeps no profile. Raises DataError as `check` does."""
    if bundle.profile is None:
        return []
    return compare(bundle.profile, profile_of(run, bundle, bundle.profile, partition), run.checks)


def _publish(run: Run, partition: str, found: Sequence[Finding], bundle: Bundle, version: str) -> None:
    with publish(run.checks_path(partition), "check", overwrite=True, keep=3) as staging:
        (staging / "findings.json").write_bytes(dump_json([f.model_dump(mode="json") for f in found]))
        (staging / "findings.txt").write_text(f"{findings_table(found)}\n", encoding="utf-8")
        stopped = [f.sentence for f in found if f.verdict == "stop"]
        staging.about.update(bundle=bundle.version, model_version=version, partition=partition, stopped=stopped)


def _log(run: Run, registry: ModelRegistry, run_id: str | None, partition: str, found: Sequence[Finding]) -> None:
    """Metrics `drift.NAME.WHAT`, of a day at the step 20260307, and the table."""
    if run_id is None:  # trained elsewhere
        return
    step = int(date.fromisoformat(partition.partition("=")[2]).strftime("%Y%m%d")) if run.data.split.by_day else 0
    with registry.run(run_id):
        mlflow.log_metrics({f"drift.{_metric_name(f.name)}.{f.what}": f.found for f in found}, step=step)
        mlflow.log_artifacts(str(resolve(run.checks_path(partition), "check")), f"drift/{partition}")


def _metric_name(name: str) -> str:
    """MLflow allows few characters."""
    return re.sub(r"[^\w\- ]", "_", name)
