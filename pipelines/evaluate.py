"""evaluate: raw held-out rows through a bundle; every metric, whole and by slice."""

from pathlib import Path

import mlflow
import polars as pl

from base.storage import publish, resolve
from features.schema import Output
from pipelines.config import Run
from pipelines.measure import check_outputs, held_out, measure, scored_table
from pipelines.tracking import registry_of
from recsys import metrics
from recsys.bundle import Bundle
from recsys.device import pick_device


def evaluate(run: Run, *, partition: str | None = None) -> pl.DataFrame:
    """Measure the run's bundle on held-out raw rows; publish the scored table and the metrics, log them to MLflow."""
    check_outputs(run)
    bundle = Bundle.load(run.bundle_path).to(pick_device(run.device))
    return record(run, bundle, scored_table(run, bundle, held_out(run, partition)), partition or "test")


def record(run: Run, bundle: Bundle, scored: pl.DataFrame, name: str) -> pl.DataFrame:
    """Publish a scored table and its metrics as the evaluation `name`, log them to MLflow."""
    table = measure(run, bundle.outputs, scored)
    with publish(run.evaluation_path(name), "evaluation", overwrite=True, keep=3) as staging:
        scored.write_parquet(staging / "scored.parquet")
        table.write_parquet(staging / "metrics.parquet")
        staging.about.update(bundle=bundle.version, partition=name, rows=scored.height)
    registry = registry_of(run)
    with registry.run(registry.run_of_training(bundle.version)):
        for output in bundle.outputs:
            for space in table.filter(pl.col("output") == output.name)["space"].unique(maintain_order=True):
                found = metrics.headline(table, output.name, space)
                prefix = ".".join([name.replace("=", "_"), output.name, *_named(output, space)])
                mlflow.log_metrics({f"{prefix}.{k}": v for k, v in found.items()})
        mlflow.log_artifact(str(resolve(run.evaluation_path(name)) / "metrics.parquet"), "evaluation")
    return table


def _named(output: Output, space: str) -> list[str]:
    """A metric of a conditional probability says of which rows it speaks."""
    return [] if output.given is None else [space.replace(" ", "_")]


def evaluation_of(run: Run, partition: str | None = None) -> tuple[pl.DataFrame, pl.DataFrame, Path]:
    """The published scored table and metrics of a run."""
    folder = resolve(run.evaluation_path(partition or "test"), "evaluation")
    return pl.read_parquet(folder / "scored.parquet"), pl.read_parquet(folder / "metrics.parquet"), folder
