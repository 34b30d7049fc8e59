"""evaluate: raw held-out rows through a bundle; every metric, whole and by slice."""

from collections.abc import Sequence
from pathlib import Path

import mlflow
import polars as pl

from base.errors import ConfigError, DataError
from base.storage import publish, resolve
from features.schema import Output, carried
from features.source import REASON
from pipelines.config import Run
from pipelines.train import registry_of
from recsys import metrics
from recsys.bundle import Bundle
from recsys.device import pick_device
from serving.score import score


def evaluate(run: Run, *, partition: str | None = None) -> pl.DataFrame:
    """Measure the run's bundle on held-out raw rows; publish the scored table and the metrics, log them to MLflow."""
    bundle = Bundle.load(run.bundle_path).to(pick_device(run.device))
    scored = scored_table(run, bundle, held_out(run, partition))
    table = measure(run, bundle.outputs, scored)
    name = partition or "test"
    with publish(run.evaluation_path(name), "evaluation", overwrite=True, keep=3) as staging:
        scored.write_parquet(staging / "scored.parquet")
        table.write_parquet(staging / "metrics.parquet")
        staging.about.update(bundle=bundle.version, partition=name, rows=scored.height)
    registry = registry_of(run)
    with registry.run(registry.run_of_training(bundle.version)):
        for output in bundle.outputs:
            found = metrics.headline(table, output.name)
            mlflow.log_metrics({f"{name.replace('=', '_')}.{output.name}.{k}": v for k, v in found.items()})
        mlflow.log_artifact(str(resolve(run.evaluation_path(name)) / "metrics.parquet"), "evaluation")
    return table


def held_out(run: Run, partition: str | None) -> list[str]:
    """The partition asked for, or all test partitions. Raises ConfigError if there are none."""
    partitions = [partition] if partition else run.source.partitions("test")
    if not partitions:
        raise ConfigError("data.split has no test rows; name a test day or share, or pass --partition")
    return partitions


def scored_table(run: Run, bundle: Bundle, partitions: Sequence[str]) -> pl.DataFrame:
    """Keys, labels, slices, known truth and probabilities of the good rows of raw partitions."""
    labels = {carried(label): label for label in run.labels}
    carry = list(dict.fromkeys([*run.data.key, *labels, *run.evaluate.columns]))
    parts: list[pl.DataFrame] = []
    for partition in partitions:
        good = run.source.checked(partition).filter(pl.col(REASON).is_null())
        parts += list(score(bundle, good, carry=carry))
    if not parts or not sum(p.height for p in parts):
        raise DataError(
            f"{', '.join(partitions)}: {run.data.path} has no rows to measure on; check the path and data.split"
        )
    # A label may be called like a raw column that is carried too: then the label is meant.
    table = pl.concat(parts)
    return table.drop([name for name in labels.values() if name in table.columns]).rename(labels)


def measure(run: Run, outputs: Sequence[Output], scored: pl.DataFrame) -> pl.DataFrame:
    """The metrics of every output and, where the truth is known, of the truth itself: the noise floor."""
    truth = [Output(name=column, label=label) for label, column in run.evaluate.truth.items()]
    return metrics.evaluate(scored, [*outputs, *truth], by=run.evaluate.slices, user=run.evaluate.user)


def evaluation_of(run: Run, partition: str | None = None) -> tuple[pl.DataFrame, pl.DataFrame, Path]:
    """The published scored table and metrics of a run."""
    folder = resolve(run.evaluation_path(partition or "test"), "evaluation")
    return pl.read_parquet(folder / "scored.parquet"), pl.read_parquet(folder / "metrics.parquet"), folder
