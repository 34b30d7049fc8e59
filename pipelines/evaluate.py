"""evaluate: raw held-out rows through a bundle; every metric, whole and by slice."""

from pathlib import Path

import mlflow
import numpy as np
import polars as pl
from numpy.typing import NDArray

from base.storage import publish, resolve, version_name
from features.schema import Output
from pipelines.config import Run
from pipelines.measure import check_day, check_outputs, held_out, measure, scored_table
from pipelines.rankings import ask
from pipelines.tracking import registry_of
from recsys import metrics
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.models.two_tower import TwoTower
from recsys.retrieval import Ranked, Ranking, rank_users
from recsys.trainer import passed


def evaluate(run: Run, *, partition: str | None = None) -> pl.DataFrame:
    """Measure the run's bundle on held-out raw rows; publish the scored table and the metrics, log them to MLflow."""
    check_day(run)
    check_outputs(run)
    bundle = Bundle.load(run.bundle_path).to(pick_device(run.device))
    partition = partition or (f"day={run.day}" if run.day else None)
    partitions = held_out(run, partition)
    if run.retrieval is None:
        return record(run, bundle, scored_table(run, bundle, partitions), partition or "test")
    (ranking,) = ask(run, bundle, None, partitions)
    return record_ranking(run, bundle, ranking, rank_with(bundle, ranking), partition or "test")


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


def record_ranking(run: Run, bundle: Bundle, ranking: Ranking, table: pl.DataFrame, name: str) -> pl.DataFrame:
    """The same of a retrieval model: what full ranking has found."""
    with publish(run.evaluation_path(name), "evaluation", overwrite=True, keep=3) as staging:
        table.write_parquet(staging / "metrics.parquet")
        staging.about.update(bundle=bundle.version, partition=name, ranking=version_name(ranking.folder))
    registry = registry_of(run)
    with registry.run(registry.run_of_training(bundle.version)):
        for row in table.iter_rows(named=True):
            prefix = f"{name.replace('=', '_')}.{row['slice']}"
            values = {f"{prefix}.{m}_{row['k']}": row[m] for m in ("recall", "ndcg", "map", "coverage")}
            values[f"{prefix}.mrr"] = row["mrr"]
            mlflow.log_metrics({key: value for key, value in values.items() if value is not None})
        mlflow.log_artifact(str(resolve(run.evaluation_path(name)) / "metrics.parquet"), "evaluation")
    return table


def rank_with(bundle: Bundle, ranking: Ranking) -> pl.DataFrame:
    """The metrics of a bundle's model, as `recsys.retrieval.rank_items` gives them."""
    return rank_each(bundle, ranking, ranking.slices()).table


def rank_each(bundle: Bundle, ranking: Ranking, slices_I: NDArray[np.int64]) -> Ranked:
    """The same, and the recall of each user, the items sliced as `slices_I` says."""
    assert isinstance(bundle.model, TwoTower)
    bundle.model.eval()
    return rank_users(lambda s: (x for x, _ in passed(bundle.model, s, bundle.device)), bundle.model, ranking, slices_I)


def _named(output: Output, space: str) -> list[str]:
    """A metric of a conditional probability says of which rows it speaks."""
    return [] if output.given is None else [space.replace(" ", "_")]


def evaluation_of(run: Run, partition: str | None = None) -> tuple[pl.DataFrame, pl.DataFrame, Path]:
    """The published scored table, which a retrieval model has not, and metrics of a run."""
    folder = resolve(run.evaluation_path(partition or "test"), "evaluation")
    scored = pl.read_parquet(folder / "scored.parquet") if run.retrieval is None else pl.DataFrame()
    return scored, pl.read_parquet(folder / "metrics.parquet"), folder
