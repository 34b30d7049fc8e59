"""production-demo: a real MLflow server and a real Airflow live through five days of a drifting log, then stop."""

import json
import time
from collections.abc import Callable
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from base.config import load_config
from base.errors import SetupError
from base.storage import is_published, publish, read_manifest, resolve
from features.readers.synthetic import SyntheticConfig
from pipelines.config import Run
from pipelines.deployment import Deployment
from pipelines.generate import generate
from pipelines.line import line_of
from pipelines.text import aligned
from pipelines.tracking import registry_of

FIRST = date(2026, 3, 5)
"""The day of the first full training: it learns from the first three days of the log."""
DRIFT = 0.05


def production_demo(output: Path, rows: int, days: int) -> None:
    """Start everything, live through the days, print what each brought, stop everything."""
    started = time.perf_counter()
    log = SyntheticConfig(rows_per_day=rows, drift=DRIFT)
    history = [FIRST - timedelta(days=n) for n in range(4, -1, -1)]
    _say(started, f"the log of {len(history)} days, {rows:,} impressions each; its taste drifts, its ids grow")
    generate(log, history, output / "logs", overwrite=True)
    _say(started, "starting MLflow and Airflow")
    patience = {"RECSYS_RETRY_SECONDS": "10", "RECSYS_PATIENCE": "3"}
    with Deployment(output / "servers", config=str(config_of(output)), environment=patience) as deployment:
        run = run_file(output, deployment.mlflow_uri)
        print(f"MLflow   {deployment.mlflow_uri}\nAirflow  {deployment.airflow.url}", flush=True)
        airflow = deployment.airflow
        airflow.unpause("features", "training", "full_retrain", "scoring")
        _say(started, f"full training for {FIRST}: three days, gate")
        _finish(deployment, "full_retrain", airflow.trigger("full_retrain", str(FIRST)))
        table = [
            ["day", "rows", "new ids", "AUC of yesterday's champion", "challenger", "verdict", "champion", "scored"]
        ]
        day = FIRST
        for _ in range(days):
            day += timedelta(days=1)
            generate(log, [day], output / "logs", overwrite=True)
            _say(started, f"{day}: scoring by the champion, features, training, gate")
            _finish(deployment, "scoring", airflow.trigger("scoring", str(day)))
            _finish(deployment, "features", airflow.trigger("features", str(day)))
            _finish(deployment, "training", airflow.run_of("training", str(day)))
            table.append(_row(run, day))
            print(aligned(table, left=1), flush=True)
        _say(started, "stopping both servers")
        urls = f"MLflow was {deployment.mlflow_uri}, Airflow {airflow.url}; both are stopped"
    print(f"\n{aligned(table, left=1)}\n\n{urls}")
    print(f"report   {run.on(day).report_path.absolute() / 'index.html'}")
    print(f"scores   {run.scores_path(f'day={day}').absolute()}")
    print(f"all in {time.perf_counter() - started:.0f} s")


def run_file(output: Path, mlflow: str, change: Callable[[str], str] = lambda text: text) -> Run:
    """Publish the run file of a deployment: the one that ships, with its folders, its MLflow and any other `change`."""
    text = (files("pipelines") / "runs" / "production.toml").read_text(encoding="utf-8")
    text = text.replace('"runs/production', f'"{output.absolute()}') + f'\n[mlflow]\nuri = "{mlflow}"\n'
    with publish(output / "deployment", "deployment", overwrite=True, keep=1) as staging:
        (staging / "run.toml").write_text(change(text), encoding="utf-8")
    return load_config(Run, config_of(output))


def config_of(output: Path) -> Path:
    """Where `run_file` publishes it."""
    return output.absolute() / "deployment" / "run.toml"


def _finish(deployment: Deployment, dag: str, run_id: str) -> None:
    """Wait for a run. Raises SetupError naming the task that failed, and where its log is."""
    if deployment.airflow.wait(dag, run_id, seconds=900) == "failed":
        failed = [t for t, state in deployment.airflow.states(dag, run_id).items() if state == "failed"]
        raise SetupError(
            f"{dag} {run_id}: {', '.join(failed)} failed; its log is below {deployment.folder / 'airflow' / 'logs'}"
        )


def _row(run: Run, day: date) -> list[str]:
    now, line = run.on(day), line_of(run.on(day))
    before, after = (line.features(d) for d in (run.data.day_before(day), day))
    new = sum(a.rows - b.rows for a, b in zip(after.sparse, before.sparse, strict=True))
    verdict = _verdict(now)
    aucs = [c for c in verdict["evidence"]["comparisons"] if (c["metric"], c["slice"]) == ("auc", "all")]
    champion = registry_of(run).champion()
    scores = run.scores_path(f"day={day}")
    return [
        str(day),
        f"{read_manifest(resolve(line.examples_path(f'day={day}'))).about['rows']:,}",
        f"{new:,}",
        f"{aucs[0]['champion']:.4f}" if aucs else "-",
        f"{aucs[0]['candidate']:.4f}" if aucs else "-",
        verdict["verdict"]["decision"],
        f"version {champion.version}" if champion else "none",
        f"{read_manifest(resolve(scores)).about['rows']:,}" if is_published(scores) else "-",
    ]


def _verdict(run: Run) -> dict[str, Any]:
    folder = resolve(run.gate_path(f"day={run.day}"), "verdict")
    return json.loads((folder / "verdict.json").read_bytes())


def _say(started: float, text: str) -> None:
    print(f"\n== {time.perf_counter() - started:4.0f} s  {text}", flush=True)
