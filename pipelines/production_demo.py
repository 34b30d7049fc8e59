"""production-demo: a real MLflow server and a real Airflow live through five days of a drifting log, then stop.

Two models live there: one that ranks, and one that finds candidates for it.
"""

import json
import time
from collections.abc import Callable
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path

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
"""The day of the first full trainings: they learn from the first three days of the log."""
DRIFT = 0.05
RANKING, RETRIEVAL = "production.toml", "production-retrieval.toml"
"""The run files that ship."""


def production_demo(output: Path, rows: int, days: int) -> None:
    """Start everything, live through the days, print what each brought, stop everything."""
    started = time.perf_counter()
    log = SyntheticConfig(rows_per_day=rows, drift=DRIFT)
    history = [FIRST - timedelta(days=n) for n in range(4, -1, -1)]
    _say(started, f"the log of {len(history)} days, {rows:,} impressions each; its taste drifts, its ids grow")
    generate(log, history, output / "logs", overwrite=True)
    _say(started, "starting MLflow and Airflow")
    with Deployment(
        output / "servers",
        config=str(config_of(output)),
        retrieval_config=str(config_of(output, RETRIEVAL)),
        environment={"RECSYS_RETRY_SECONDS": "10", "RECSYS_PATIENCE": "3"},
    ) as deployment:
        ranking, retrieval = run_files(output, deployment.mlflow_uri)
        print(f"MLflow   {deployment.mlflow_uri}\nAirflow  {deployment.airflow.url}", flush=True)
        airflow = deployment.airflow
        airflow.unpause(*(dag for dag in airflow.dag_ids if dag != "backfill"))
        _say(started, f"full trainings for {FIRST}: three days, gate; one of the ranking, one of the retrieval model")
        for run_id in [(dag, airflow.trigger(dag, str(FIRST))) for dag in ("full_retrain", "retrieval_full_retrain")]:
            _finish(deployment, *run_id)
        tables = ([_RANKED], [_heads(retrieval)])
        day = FIRST
        for _ in range(days):
            day += timedelta(days=1)
            generate(log, [day], output / "logs", overwrite=True)
            _say(started, f"{day}: scores and recommendations by the champions, features, training, gate")
            _finish(deployment, "scoring", airflow.trigger("scoring", str(day)))
            _finish(deployment, "features", airflow.trigger("features", str(day)))
            for dag in ("training", "retrieval"):
                _finish(deployment, dag, airflow.run_of(dag, str(day)))
            for table, row in zip(tables, (_ranked(ranking, day), _retrieved(retrieval, day)), strict=True):
                table.append([str(day), *row])
            print("\n\n".join(aligned(table, left=1) for table in tables), flush=True)
        _say(started, "stopping both servers")
        urls = f"MLflow was {deployment.mlflow_uri}, Airflow {airflow.url}; both are stopped"
    print("", *(f"{aligned(table, left=1)}\n" for table in tables), urls, sep="\n")
    print(f"reports  {ranking.on(day).report_path.absolute() / 'index.html'}")
    print(f"         {retrieval.on(day).report_path.absolute() / 'index.html'}")
    print(f"scores   {ranking.scores_path(f'day={day}').absolute()}")
    print(f"items    {retrieval.recommendations_path(f'day={day}').absolute()}")
    print(f"all in {time.perf_counter() - started:.0f} s")


def run_files(output: Path, mlflow: str, change: Callable[[str], str] = lambda text: text) -> tuple[Run, Run]:
    """Publish a deployment's run files: those that ship, with its folders and its MLflow, and any other `change` of the
    ranking model's. Returns the runs of the ranking and of the retrieval model."""
    with publish(output / "deployment", "deployment", overwrite=True, keep=1) as staging:
        for name in (RANKING, RETRIEVAL):
            text = (files("pipelines") / "runs" / name).read_text(encoding="utf-8")
            text = text.replace('"runs/production', f'"{output.absolute()}')
            text = text.replace(f'"pipelines/runs/{RANKING}"', f'"{config_of(output)}"')
            text += f'{"" if "[mlflow]" in text else "[mlflow]"}\nuri = "{mlflow}"\n'  # it stands last
            (staging / name).write_text(change(text) if name == RANKING else text, encoding="utf-8")
    return load_config(Run, config_of(output)), load_config(Run, config_of(output, RETRIEVAL))


def config_of(output: Path, name: str = RANKING) -> Path:
    """Where `run_files` publishes one of them."""
    return output.absolute() / "deployment" / name


def _finish(deployment: Deployment, dag: str, run_id: str) -> None:
    """Wait for a run. Raises SetupError naming the task that failed, and where its log is."""
    if deployment.airflow.wait(dag, run_id, seconds=900) == "failed":
        failed = [t for t, state in deployment.airflow.states(dag, run_id).items() if state == "failed"]
        raise SetupError(
            f"{dag} {run_id}: {', '.join(failed)} failed; its log is below {deployment.folder / 'airflow' / 'logs'}"
        )


_RANKED = ["day", "rows", "new ids", "AUC of yesterday's champion", "challenger", "verdict", "champion", "scored"]
_RETRIEVED = [
    "day",
    "items",
    "recall of yesterday's champion",
    "challenger",
    "verdict",
    "champion",
    "users recommended",
]


def _heads(run: Run) -> list[str]:
    recall = f"{_recall(run)} of yesterday's champion"
    return ["day", "items", recall, "challenger", "verdict", "champion", "users recommended"]


def _recall(run: Run) -> str:
    assert run.retrieval is not None
    return f"recall@{run.retrieval.k[0]}"


def _ranked(run: Run, day: date) -> list[str]:
    now, line = run.on(day), line_of(run.on(day))
    before, after = (line.features(d) for d in (run.data.day_before(day), day))
    new = sum(a.rows - b.rows for a, b in zip(after.sparse, before.sparse, strict=True))
    return [
        f"{read_manifest(resolve(line.examples_path(f'day={day}'))).about['rows']:,}",
        f"{new:,}",
        *_judged(now, "auc"),
        _made(run.scores_path(f"day={day}"), "rows"),
    ]


def _retrieved(run: Run, day: date) -> list[str]:
    target = run.recommendations_path(f"day={day}")
    items = f"{read_manifest(resolve(target)).about['index']['items']:,}" if is_published(target) else "-"
    return [items, *_judged(run.on(day), _recall(run)), _made(target, "users")]


def _judged(run: Run, metric: str) -> list[str]:
    """Of the gate: champion's and challenger's metric, the verdict; and who is champion now."""
    folder = resolve(run.gate_path(f"day={run.day}"), "verdict")
    found = json.loads((folder / "verdict.json").read_bytes())
    whole = [c for c in found["evidence"]["comparisons"] if (c["metric"], c["slice"]) == (metric, "all")]
    champion = registry_of(run).champion()
    return [
        *(f"{whole[0][which]:.4f}" if whole else "-" for which in ("champion", "candidate")),
        found["verdict"]["decision"],
        f"version {champion.version}" if champion else "none",
    ]


def _made(target: Path, what: str) -> str:
    return f"{read_manifest(resolve(target)).about[what]:,}" if is_published(target) else "-"


def _say(started: float, text: str) -> None:
    print(f"\n== {time.perf_counter() - started:4.0f} s  {text}", flush=True)
