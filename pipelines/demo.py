"""demo: the main job on the synthetic log, seven days in, published scores and a report out."""

import time
from importlib.resources import files
from pathlib import Path

import polars as pl

from base.config import load_config
from features.readers.synthetic import SyntheticConfig
from features.split import days_of
from pipelines.config import Run
from pipelines.evaluate import evaluate, evaluation_of
from pipelines.generate import generate
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from pipelines.promote import promote
from pipelines.report import report
from pipelines.score import score
from pipelines.text import aligned
from pipelines.train import train
from recsys.metrics import headline

DAYS = "2026-03-01..2026-03-07"
HELD_OUT, SCORED = "day=2026-03-06", "day=2026-03-07"
BASELINES = {"lr": 0.02, "fm": 0.05}
"""Each with its own learning rate for the tables: the best of 0.02, 0.05 and 0.1, chosen on day 6 of this log."""


def demo(output: Path, rows: int) -> None:
    """Generate, prepare, train two baselines and AutoInt, evaluate, promote, score, report; print what came out."""
    started = time.perf_counter()
    file = Path(str(files("pipelines") / "runs" / "demo.toml"))
    settings = [f'output="{output}"', f'data.path="{output}/logs/day=*/*.parquet"']
    main_run = load_config(Run, file, settings)
    runs = [
        load_config(Run, file, [*settings, f'model={{ name = "{name}" }}', f"train.table_learning_rate={rate}"])
        for name, rate in BASELINES.items()
    ]
    runs.append(main_run)

    _step("generate", "seven days of impressions whose click probabilities are known")
    generate(SyntheticConfig(rows_per_day=rows), days_of(DAYS), output / "logs", overwrite=True)
    _step("prepare", "vocabularies and scales from days 1 to 5; examples of days 1 to 6")
    prepare(main_run, overwrite=True)
    speeds: list[float] = []
    for run in runs:
        _step("train", f"{run.model.name}, on days 1 to 5")
        ticker = Ticker(run.model.name)
        speeds.append(train(run, on_step=ticker.on_step).rows_per_second)
        ticker.close()
        evaluate(run, partition=HELD_OUT)
        _step("promote", f"{run.model.name} against the champion, on the raw rows of day 6")
        verdict = promote(run, partition=HELD_OUT)
        print(verdict.decision, *verdict.reasons, sep="\n  ")
    _step("score", "day 7 by the champion")
    ticker = Ticker("score")
    scoring = time.perf_counter()
    published = score(main_run, partition=SCORED, overwrite=True, on_rows=ticker.on_rows)
    scoring = time.perf_counter() - scoring
    ticker.close()
    _step("report", "what was learned, as one page")
    page = report(main_run, partition=HELD_OUT)

    print(f"\n{_table(runs, speeds)}\n")
    scored = sum(pl.scan_parquet(p / "part-*.parquet").select(pl.len()).collect().item() for p in published)
    print(f"scores   {published[-1]}  ({scored:,} rows, {scored / scoring:,.0f} rows/s)")
    print(f"report   {page.absolute()}")
    print(f"MLflow   .venv/bin/mlflow ui --backend-store-uri {main_run.tracking_uri}")
    print(f"all in {time.perf_counter() - started:.0f} s")


def _table(runs: list[Run], speeds: list[float]) -> str:
    """Day 6, raw rows. The learning rates were chosen on this day, so it flatters all three models a little."""
    rows = [["model", "measured on", "AUC", "log loss", "NE", "training rows/s"]]
    for run, speed in zip(runs, speeds, strict=True):
        metrics = evaluation_of(run, HELD_OUT)[1]
        for label in run.labels:
            rows.append([run.model.name, "day 6", *_figures(headline(metrics, f"p_{label}")), f"{speed:,.0f}"])
    for output, column in runs[-1].evaluate.truth.items():
        floor = headline(evaluation_of(runs[-1], HELD_OUT)[1], column)
        rows.append([f"noise floor ({output})", "day 6", *_figures(floor), ""])
    return aligned(rows)


def _figures(metrics: dict[str, float]) -> list[str]:
    return [f"{metrics[name]:.4f}" for name in ("auc", "log_loss", "normalized_entropy")]


def _step(verb: str, what: str) -> None:
    print(f"\n== {verb}: {what}", flush=True)
