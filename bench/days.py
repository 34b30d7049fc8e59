"""A warm-started model over 30 days of a drifting log: what the decay of Adagrad's sums and the start of new rows do.

    python -m bench.days                 every configuration, 5 seeds, about 20 minutes on two cores
    python -m bench.days --quick         one seed, 8 days, a tenth of the rows
    python -m bench.days --table         print the table from the records

Each day's model has learned, one pass a day, from the days to two before it, and is measured on the raw rows of the
day. A seed has a log of its own.
"""

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from base.config import load_config
from bench import records
from bench.quality import predict
from features.pipeline import FittedPipeline, changed_rows
from features.readers.synthetic import SyntheticConfig, day_frame
from features.schema import carried
from pipelines.config import Run
from recsys import trainer
from recsys.checkpoint import WarmStart
from recsys.data import ROW_GROUP, ExampleStream
from recsys.metrics import log_loss, roc_auc
from recsys.trainer import Trained

RECORDS = records.FOLDER / "days.jsonl"
SEEDS, DAYS, ROWS, DRIFT = 5, 30, 30_000, 0.03
LAG = 2
SETTLED = 10
"""Days that are left out of the means, while the model is young."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "accumulator_decay = 1": {"accumulator_decay": 1.0, "new_rows": "mean"},
    "accumulator_decay = 0.9": {"accumulator_decay": 0.9, "new_rows": "mean"},
    "accumulator_decay = 0.7": {"accumulator_decay": 0.7, "new_rows": "mean"},
    'accumulator_decay = 0.9, new_rows = "hash"': {"accumulator_decay": 0.9, "new_rows": "hash"},
}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/days"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", default="2h", help="e.g. 90m or 2h")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    file = options.work / "quick.jsonl" if options.quick else RECORDS
    if not options.table:
        records.run_jobs(file, _jobs(quick=options.quick), budget_seconds=records.seconds(options.budget))
    print(table(file))


def table(file: Path = RECORDS) -> str:
    """The README's table, from the records."""
    lines = ["| | AUC, days 11 to 30 | AUC, last 5 days | log loss, days 11 to 30 | seeds |", "|---|---|---|---|---|"]
    keys = ["auc", "auc_last", "log_loss"]
    for row in records.summary(file, list(CONFIGURATIONS), keys):
        figures = [f"{row[k]:.4f}" + (f" ± {row[k + '_sd']:.4f}" if row["n"] > 1 else "") for k in keys]
        lines.append(f"| `{row['name']}` | {' | '.join(figures)} | {row['n']} |")
    paired = _paired(file)
    return "\n".join(lines) + (f"\n\n{paired}" if paired else "")


def _paired(file: Path) -> str:
    """Differences within a seed, which share the log."""
    first, *others = CONFIGURATIONS
    told: list[str] = []
    for name in others:
        (gains,) = records.differences(file, name, first, ["auc"])
        if len(gains) > 1:
            told.append(f"`{name}`: {np.mean(gains):+.4f} ± {np.std(gains, ddof=1):.4f} in {len(gains)} seeds")
    return f"Gain of AUC over `{first}` within a seed: {'; '.join(told)}." if told else ""


def _jobs(*, quick: bool) -> list[records.Job]:
    days, rows = (8, ROWS // 10) if quick else (DAYS, ROWS)
    run = load_config(
        Run,
        Path(str(files("pipelines") / "runs" / "production.toml")),
        ['model={name="fm", dim=16}', "train.threads=1", "train.table_learning_rate=0.05"],
    )
    shared = {
        "days": days,
        "rows": rows,
        "drift": DRIFT,
        "features": hashlib.sha256(json.dumps(run.model_dump(mode="json")["features"]).encode()).hexdigest()[:12],
        "model": run.model.model_dump(),
        "train": records.settings_of(run.train),
    }
    logs: dict[int, list[pl.DataFrame]] = {}

    def job(name: str, daily: dict[str, Any]) -> records.Job:
        def measure(seed: int) -> Mapping[str, Any]:
            if seed not in logs:
                logs.clear()
                config = SyntheticConfig(rows_per_day=rows, seed=seed, drift=DRIFT, users=20_000, items=5_000)
                logs[seed] = [day_frame(config, config.start + timedelta(days=n)) for n in range(days)]
            return _live(run, logs[seed], seed, daily)

        return records.Job(name, {**shared, **daily}, 1 if quick else SEEDS, measure)

    return [job(name, daily) for name, daily in CONFIGURATIONS.items()]


def _live(run: Run, log: list[pl.DataFrame], seed: int, daily: dict[str, Any]) -> Mapping[str, Any]:
    """Train day by day; measure every model two days later."""
    fitted: FittedPipeline | None = None
    trained: Trained | None = None
    aucs: list[float] = []
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, rows in enumerate(log[:-LAG]):
            day = rows["day"][0]
            before = fitted
            fitted = run.pipeline.fit(rows.lazy(), day=day) if before is None else before.extend(rows.lazy(), day=day)
            warm = None
            if trained is not None and before is not None:
                warm = WarmStart(trained.state, changed_rows(before, fitted), **daily)
            trained = _pass_over(run, fitted, rows, folder, seed, number, warm)
            later = folder / "later.parquet"
            _encoded(fitted, log[number + LAG]).write_parquet(later)
            labels, p = predict(run.model, trained.weights, later, fitted, run)
            aucs.append(roc_auc(labels, p))
            losses.append(log_loss(labels, p))
    settled = slice(min(SETTLED - LAG, len(aucs) // 2), None)
    return {
        "auc": float(np.mean(aucs[settled])),
        "auc_last": float(np.mean(aucs[-5:])),
        "log_loss": float(np.mean(losses[settled])),
        "aucs": [round(a, 5) for a in aucs],
    }


def _pass_over(
    run: Run,
    fitted: FittedPipeline,
    rows: pl.DataFrame,
    folder: Path,
    seed: int,
    number: int,
    warm: WarmStart | None,
) -> Trained:
    schema = run.schema_of(fitted)
    path = folder / "day.parquet"
    _encoded(fitted, rows).write_parquet(path, row_group_size=ROW_GROUP)
    fit = ExampleStream((path,), schema, run.train.batch_size, shuffle=True, seed=seed + number)
    config = run.train.model_copy(update={"epochs": 1, "seed": seed})
    return trainer.train(run.model, schema, fit, None, config, folder / "training", identity=str(number), warm=warm)


def _encoded(fitted: FittedPipeline, rows: pl.DataFrame) -> pl.DataFrame:
    label = carried("click")
    return fitted.transform(rows.lazy().with_columns(pl.col("click").alias(label)), keep=[label]).collect()


if __name__ == "__main__":
    main()
