"""The DAG `ctr`: what its file may import, what a run must be given, the command lines, and one real run.

Airflow lives in child processes with a home of their own: its settings and warnings are global.
"""

import json
import os
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from base.storage import read_manifest, resolve

REPO = Path(__file__).resolve().parents[2]
VERBS = ["prepare", "train", "evaluate", "promote", "score", "report"]
SKIPPED, FAILED, BEHIND = "skipped", "failed", "upstream_failed"

IMPORT = """
import importlib.util, json, sys, time
import airflow.sdk, airflow.providers.standard.operators.bash
before, started = set(sys.modules), time.perf_counter()
spec = importlib.util.spec_from_file_location("ctr", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
seconds = time.perf_counter() - started
json.dump({"seconds": seconds, "new": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}, sys.stdout)
"""

DESCRIBE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
dag = bag.dags["ctr"]
json.dump({
    "errors": bag.import_errors,
    "downstream": {t.task_id: sorted(t.downstream_task_ids) for t in dag.topological_sort()},
    "unlimited": [t.task_id for t in dag.tasks if t.execution_timeout is None],
    "unretried": [t.task_id for t in dag.tasks if not t.retries],
    "schedule": dag.schedule, "catchup": dag.catchup, "runs": dag.max_active_runs,
    "day": {"default": dag.params.get_param("day").has_value, **dag.params.get_param("day").schema},
}, open(sys.argv[2], "w"))
"""

TRIGGER = """
import json, os, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError
dags, runs, out = sys.argv[1:]
found = {}
for name, run in json.loads(runs).items():
    os.environ |= run.get("environment", {})
    dag = DagBag(dags).dags["ctr"]  # anew, as a worker does: a run leaves its parameters in the object
    for task in dag.tasks:
        task.retries = 0
    try:
        done = dag.test(run_conf=run["conf"])
        states = {ti.task_id: str(ti.state) for ti in done.get_task_instances()}
        found[name] = {"run": str(done.state), "states": states}
    except ParamValidationError as error:
        found[name] = {"refused": str(error)}
json.dump(found, open(out, "w"))
"""

STUB = f"""#!{sys.executable} -IS
import json, os, sys
verb = sys.argv[4]
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps({{"verb": verb, "argv": sys.argv[1:], "cwd": os.getcwd()}}) + "\\n")
sys.exit(json.loads(os.environ["STUB_EXITS"]).get(verb, 0))
"""

RUN_FILE = """
output = "out"

[data]
path = "logs/day=*/*.parquet"
key = ["impression_id"]
labels = ["click"]
time = "day"
split = { train = "2026-01-01", valid = "2026-01-02", test = "2026-01-03" }

[[features]]
kind = "vocabulary"
column = "device"

[[features]]
kind = "vocabulary"
column = "category"

[[features]]
kind = "log"
column = "price"

[model]
name = "lr"

[train]
batch_size = 512
epochs = 1
threads = 1

[gate]
min_auc = 0.0
max_normalized_entropy = 10.0
"""


def child(code: str, *arguments: str, environment: dict[str, str]) -> str:
    """Standard output of a Python program."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a new Airflow with an empty database."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "RECSYS", "MLFLOW"))}
    environment = inherited | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPO / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], env=environment, check=True, capture_output=True)
    return environment


def trigger(environment: dict[str, str], runs: dict[str, Any], folder: Path, *, python: Path | None = None) -> Any:
    """Run the DAG once per entry of `runs`; `python` stands in for the interpreter the tasks use."""
    code = TRIGGER if python is None else f"import sys; sys.executable = {str(python)!r}\n{TRIGGER}"
    out = folder / "runs.json"
    child(code, environment["AIRFLOW__CORE__DAGS_FOLDER"], json.dumps(runs), str(out), environment=environment)
    return json.loads(out.read_text())


def test_importing_the_file_is_quick_and_brings_in_nothing_of_ours(airflow: dict[str, str]) -> None:
    found = json.loads(child(IMPORT, str(REPO / "dags" / "ctr.py"), environment=airflow))
    heavy = {"torch", "torchrec", "fbgemm_gpu", "polars", "mlflow", "numpy", "pandas", "sklearn"}
    ours = {"base", "features", "recsys", "pipelines", "serving", "bench"}
    assert not {name.partition(".")[0] for name in found["all"]} & (heavy | ours)
    assert found["seconds"] < 1


def test_the_dag_is_one_chain_with_limits_and_retries(airflow: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "dag.json"
    child(DESCRIBE, str(REPO / "dags"), str(out), environment=airflow)
    found = json.loads(out.read_text())
    assert found["errors"] == {}
    assert found["downstream"] == {a: [b] for a, b in pairwise(VERBS)} | {"report": []}
    assert list(found["downstream"]) == VERBS
    assert found["unlimited"] == found["unretried"] == []
    assert (found["schedule"], found["catchup"], found["runs"]) == (None, False, 1)
    assert found["day"] == {"default": False, "type": "string", "format": "date"}


@pytest.fixture(scope="module")
def stubbed(airflow: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, list[Any]]]:
    """Outcomes and command lines of several runs in which a stub stands in for the command line."""
    folder = tmp_path_factory.mktemp("stub")
    home = folder / "it's a $(touch home) folder"
    home.mkdir()
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    good = {"day": "2026-03-07", "train_days": 4, "home": str(home)}
    hostile = "x'; touch config #$(touch dollar)`touch tick`\"{{ 7 * 7 }}.toml"

    def run(name: str, conf: dict[str, Any], **exits: int) -> dict[str, Any]:
        log = str(folder / f"{name}.jsonl")
        return {"conf": conf, "environment": {"STUB_LOG": log, "STUB_EXITS": json.dumps(exits)}}

    runs = {
        "good": run("good", good),
        "hostile": run("hostile", {"day": "2024-03-01", "config": hostile, "home": str(home)}),
        "refused": run("refused", {**good, "train_days": 1}, promote=99),
        "promote_fails": run("promote_fails", good, promote=2),
        "evaluate_99": run("evaluate_99", good, evaluate=99),
        "no_day": run("no_day", {"train_days": 4}),
        "empty_day": run("empty_day", {**good, "day": ""}),
        "malformed_day": run("malformed_day", {**good, "day": "2026-3-7"}),
        "impossible_day": run("impossible_day", {**good, "day": "2026-02-30"}),
        "injected_day": run("injected_day", {**good, "day": "2026-03-07; touch day"}),
        "no_training": run("no_training", {**good, "train_days": 0}),
    }
    outcomes = trigger(airflow, runs, folder, python=stub)
    logs = {
        name: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for name, log in ((name, Path(run["environment"]["STUB_LOG"])) for name, run in runs.items())
    }
    assert list(home.iterdir()) == [], "a parameter reached the shell"
    return outcomes, logs


def test_each_task_is_one_command_line(stubbed: tuple[Any, dict[str, list[Any]]]) -> None:
    outcomes, logs = stubbed
    assert outcomes["good"] == {"run": "success", "states": dict.fromkeys(VERBS, "success")}
    split = 'data.split={train="2026-03-01..2026-03-04", valid="2026-03-05", test="2026-03-06"}'
    own = {"prepare": ["--overwrite"], "score": ["--partition", "day=2026-03-07", "--overwrite"]}
    common = ["--config", "pipelines/runs/demo.toml", "--set", split]
    for verb, called in zip(VERBS, logs["good"], strict=True):
        assert called["argv"] == ["-P", "-m", "pipelines.cli", verb, *common, *own.get(verb, [])]
        assert Path(called["cwd"]).name == "it's a $(touch home) folder"


@pytest.mark.parametrize(
    ("run", "split"),
    [
        ("hostile", '{train="2024-02-23..2024-02-27", valid="2024-02-28", test="2024-02-29"}'),
        ("refused", '{train="2026-03-04..2026-03-04", valid="2026-03-05", test="2026-03-06"}'),
    ],
)
def test_the_day_decides_the_split(stubbed: tuple[Any, dict[str, list[Any]]], run: str, split: str) -> None:
    assert {tuple(called["argv"][6:8]) for called in stubbed[1][run]} == {("--set", f"data.split={split}")}


def test_a_parameter_never_becomes_a_command(stubbed: tuple[Any, dict[str, list[Any]]]) -> None:
    outcomes, logs = stubbed
    assert outcomes["hostile"]["run"] == "success"
    for called in logs["hostile"]:
        assert called["argv"][5] == "x'; touch config #$(touch dollar)`touch tick`\"{{ 7 * 7 }}.toml"


def test_a_refused_promotion_is_skipped_and_the_champion_scores(stubbed: tuple[Any, dict[str, list[Any]]]) -> None:
    outcomes, _ = stubbed
    assert outcomes["refused"] == {"run": "success", "states": dict.fromkeys(VERBS, "success") | {"promote": SKIPPED}}


@pytest.mark.parametrize(("run", "failed"), [("promote_fails", "promote"), ("evaluate_99", "evaluate")])
def test_nothing_follows_a_failure(stubbed: tuple[Any, dict[str, list[Any]]], run: str, failed: str) -> None:
    outcomes, logs = stubbed
    at = VERBS.index(failed)
    states = dict.fromkeys(VERBS[:at], "success") | {failed: FAILED} | dict.fromkeys(VERBS[at + 1 :], BEHIND)
    assert outcomes[run] == {"run": "failed", "states": states}
    assert [called["verb"] for called in logs[run]] == VERBS[: at + 1]


@pytest.mark.parametrize("run", ["no_day", "empty_day", "malformed_day", "impossible_day", "injected_day"])
def test_a_run_needs_a_day(stubbed: tuple[Any, dict[str, list[Any]]], run: str) -> None:
    outcomes, logs = stubbed
    assert "param day" in outcomes[run]["refused"]
    assert logs[run] == []


def test_a_run_needs_days_to_train_on(stubbed: tuple[Any, dict[str, list[Any]]]) -> None:
    assert "param train_days" in stubbed[0]["no_training"]["refused"]


def test_a_real_run_promotes_scores_and_reports(airflow: dict[str, str], tmp_path: Path) -> None:
    logs = ["--out", "logs", "--days", "2026-03-01..2026-03-07", "--rows", "3000"]
    generate = [sys.executable, "-m", "pipelines.cli", "generate", *logs]
    subprocess.run(generate, cwd=tmp_path, env=airflow, check=True, capture_output=True)
    (tmp_path / "small.toml").write_text(RUN_FILE)
    conf = {"day": "2026-03-07", "train_days": 4, "config": "small.toml", "home": str(tmp_path)}

    found = trigger(airflow, {"run": {"conf": conf}}, tmp_path)["run"]

    assert found == {"run": "success", "states": dict.fromkeys(VERBS, "success")}
    examples = sorted(p.name for p in (tmp_path / "out" / "examples").glob("day=*"))
    assert examples == [f"day=2026-03-0{day}" for day in range(1, 6)]
    scores = resolve(tmp_path / "out" / "scores" / "day=2026-03-07", "scores")
    assert pl.read_parquet(scores / "part-*.parquet").height == 3000
    with sqlite3.connect(tmp_path / "out" / "mlflow.db") as database:
        aliases = dict(database.execute("SELECT alias, version FROM registered_model_aliases"))
    assert aliases == {"challenger": 1, "champion": 1}
    assert read_manifest(scores).about["model_version"] == "1"
    assert resolve(tmp_path / "out" / "models" / "lr" / "report")
