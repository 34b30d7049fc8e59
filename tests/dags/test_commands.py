"""The DAG files: what they may import, their shape, and the command line of every task for a given partition key.

Airflow lives in child processes with a home of their own: its settings and warnings are global.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import children

REPO = Path(__file__).resolve().parents[2]
DAGS = ["backfill", "features", "full_retrain", "scoring", "training"]
OF_RETRIEVAL = ["retrieval", "retrieval_full_retrain"]
RETRIEVAL = {"RECSYS_RETRIEVAL_CONFIG": "retrieval.toml"}
DAY = "2026-03-07"
Child = Callable[..., str]

IMPORT = """
import importlib.util, json, sys, time
import airflow.sdk, airflow.providers.standard.operators.bash, airflow.providers.standard.operators.empty
import airflow.providers.standard.sensors.date_time
started = time.process_time()
for name in sys.argv[1].split(","):
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[2]}/{name}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
json.dump({"seconds": time.process_time() - started, "all": sorted(sys.modules)}, sys.stdout)
"""

DESCRIBE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.definitions.mappedoperator import MappedOperator
bag = DagBag(sys.argv[1])
def of(task, name):
    return task.partial_kwargs.get(name) if isinstance(task, MappedOperator) else getattr(task, name)
def is_step(task):
    return getattr(task, "operator_class", type(task)).__name__ == "Step"
json.dump({"errors": bag.import_errors, "dags": {dag.dag_id: {
    "downstream": {t.task_id: sorted(t.downstream_task_ids) for t in dag.topological_sort()},
    "unlimited": sorted(t.task_id for t in dag.tasks if is_step(t) and of(t, "execution_timeout") is None),
    "unretried": sorted(t.task_id for t in dag.tasks if not of(t, "retries")),
    "silent": sorted(t.task_id for t in dag.tasks if not of(t, "on_failure_callback")),
    "mapped": sorted(t.task_id for t in dag.tasks if isinstance(t, MappedOperator)),
    "rules": {t.task_id: getattr(of(t, "trigger_rule"), "value", None) for t in dag.tasks},
    "outlets": sorted(t.task_id for t in dag.tasks if of(t, "outlets")),
    "schedule": type(dag.timetable).__name__, "catchup": dag.catchup, "runs": dag.max_active_runs,
    "start": str(dag.start_date),
    "deadline": [d.callback.path for d in dag.deadline],
    "queues": {t.task_id: of(t, "queue") for t in dag.tasks if of(t, "queue") not in (None, "default")},
    "hours": [d.interval.total_seconds() / 3600 for d in dag.deadline],
    "params": {name: [dag.params[name], dag.params.get_param(name).schema["type"]] for name in dag.params},
} for dag in bag.dags.values()}}, open(sys.argv[2], "w"))
"""

# Renders every command line as a worker does, and runs it by the shell; a stub stands in for the interpreter.
RUN = """
import json, os, subprocess, sys
from types import SimpleNamespace
stub, dags, given, out = sys.argv[1:]
given = json.loads(given)
sys.executable = stub
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.definitions.mappedoperator import MappedOperator
found = {}
for dag in DagBag(dags).dags.values():
    for task in dag.tasks:
        if getattr(task, "operator_class", type(task)).__name__ != "Step":
            continue
        if isinstance(task, MappedOperator):
            task = task.unmap({"day" if dag.dag_id == "backfill" else "partition": given["mapped"]})
        run = SimpleNamespace(partition_key=given["key"], conf=given["conf"])
        context = {"dag_run": run, "params": {**dag.params.dump(), **given["conf"]}, "task": task, "dag": dag}
        mapped = {name: getattr(task, name) for name in ("day", "partition")}
        task.render_template_fields(context)
        if dag.dag_id == "backfill":
            task.day = mapped["day"]  # a worker renders no mapped value
        log = f"{out}.{dag.dag_id}.{task.task_id}"
        env = {**task.get_env(context), "STUB_LOG": log}
        subprocess.run(["bash", "-c", task.bash_command], env=env, cwd=task.cwd, check=True)
        found[f"{dag.dag_id}.{task.task_id}"] = json.load(open(log))
json.dump(found, open(out, "w"))
"""

STUB = f"""#!{sys.executable} -IS
import json, os, sys
json.dump({{"argv": sys.argv[1:], "cwd": os.getcwd()}}, open(os.environ["STUB_LOG"], "w"))
"""

CONFIG = ["--config", "run.toml"]
OF_DAY = ["--day", DAY]
OF_PARTITION = [*OF_DAY, "--partition", "day=2026-03-05"]
COMMANDS = {
    "features.check": ["check", *CONFIG, "--partition", f"day={DAY}"],
    "features.plan": ["plan", *CONFIG, *OF_DAY],
    "features.count": ["count", *CONFIG, *OF_PARTITION],
    "features.fit": ["fit", *CONFIG, *OF_DAY],
    "features.encode": ["encode", *CONFIG, *OF_PARTITION],
    "training.train": ["train", *CONFIG, *OF_DAY],
    "training.promote": ["promote", *CONFIG, *OF_DAY],
    "training.report": ["report", *CONFIG, *OF_DAY],
    "full_retrain.check": ["check", *CONFIG, "--partition", f"day={DAY}"],
    "full_retrain.plan": ["plan", *CONFIG, *OF_DAY, "--full"],
    "full_retrain.count": ["count", *CONFIG, *OF_PARTITION, "--full"],
    "full_retrain.fit": ["fit", *CONFIG, *OF_DAY, "--full"],
    "full_retrain.encode": ["encode", *CONFIG, *OF_PARTITION, "--full"],
    "full_retrain.train": ["train", *CONFIG, *OF_DAY, "--full"],
    "full_retrain.promote": ["promote", *CONFIG, *OF_DAY, "--full"],
    "full_retrain.report": ["report", *CONFIG, *OF_DAY, "--full"],
    "full_retrain.clean": ["clean", *CONFIG, "--keep", "14"],
    "scoring.score": ["score", *CONFIG, "--partition", f"day={DAY}", "--if-missing"],
    "backfill.prepare": ["prepare", *CONFIG, "--day", "2026-03-05"],
    "backfill.score": ["score", *CONFIG, "--partition", "day=2026-03-05", "--if-missing"],
}
CANDIDATES = ["--config", "retrieval.toml"]
WITH_RETRIEVAL = {
    **COMMANDS,
    "retrieval.check": ["check", *CANDIDATES, "--partition", f"day={DAY}"],
    "retrieval.prepare": ["prepare", *CANDIDATES, *OF_DAY],
    "retrieval.train": ["train", *CANDIDATES, *OF_DAY],
    "retrieval.promote": ["promote", *CANDIDATES, *OF_DAY],
    "retrieval.report": ["report", *CANDIDATES, *OF_DAY],
    **{
        name.replace("full_retrain", "retrieval_full_retrain"): [command[0], *CANDIDATES, *command[3:]]
        for name, command in COMMANDS.items()
        if name.startswith("full_retrain.")
    },
    "scoring.index": ["index", *CANDIDATES, "--if-missing"],
    "scoring.recommend": ["recommend", *CANDIDATES, "--partition", f"day={DAY}", "--build-index", "--if-missing"],
    "backfill.recommend": [
        *("recommend", *CANDIDATES),
        *("--partition", "day=2026-03-05", "--build-index", "--if-missing"),
    ],
}


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of an Airflow of its own; nothing of these tests needs its database."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "RECSYS", "MLFLOW"))}
    return inherited | {
        "PYTHONPATH": str(REPO),
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }


@pytest.fixture(scope="module")
def child(airflow: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """What a Python program says that is forked where Airflow has been imported, and nothing of ours."""
    modules = [
        *("airflow.dag_processing.dagbag", "airflow.sdk.definitions.mappedoperator"),
        *("airflow.providers.standard.operators.bash", "airflow.providers.standard.operators.empty"),
        "airflow.providers.standard.sensors.date_time",
    ]
    with children(tmp_path_factory.mktemp("children"), modules, airflow) as order:

        def child(code: str, *arguments: str, environment: Mapping[str, str] = {}) -> str:
            done = order("program", environment, code=code, arguments=arguments)
            assert done.status == 0, done.output[-8000:]
            return done.output

        yield child


def describe(child: Child, environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    out = folder / "dags.json"
    child(DESCRIBE, str(REPO / "dags"), str(out), environment=environment)
    found = json.loads(out.read_text())
    assert found["errors"] == {}
    return found["dags"]


@pytest.fixture(scope="module")
def described(child: Child, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return describe(child, {}, tmp_path_factory.mktemp("described"))


@pytest.fixture(scope="module")
def with_retrieval(child: Child, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return describe(child, RETRIEVAL, tmp_path_factory.mktemp("with_retrieval"))


def run(
    child: Child, environment: Mapping[str, str], folder: Path, *, key: str | None, mapped: str, conf: dict[str, Any]
) -> dict[str, Any]:
    """What the stub saw, by DAG and task."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    given = json.dumps({"key": key, "mapped": mapped, "conf": conf})
    out = folder / "seen"
    child(RUN, str(stub), str(REPO / "dags"), given, str(out), environment=environment)
    return json.loads(out.read_text())


def test_importing_the_files_is_quick_and_brings_in_nothing_of_ours(airflow: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, ",".join([*DAGS, "retrieval"]), str(REPO / "dags")],
        env=airflow | RETRIEVAL, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    found = json.loads(done.stdout)
    heavy = {"torch", "torchrec", "fbgemm_gpu", "polars", "mlflow", "numpy", "pandas", "sklearn"}
    ours = {"base", "features", "recsys", "pipelines", "serving", "bench"}
    assert not {name.partition(".")[0] for name in found["all"]} & (heavy | ours)
    assert found["seconds"] < 2


def test_every_dag_has_limits_retries_and_alarms(described: dict[str, Any], with_retrieval: dict[str, Any]) -> None:
    assert sorted(described) == DAGS
    assert sorted(with_retrieval) == sorted([*DAGS, *OF_RETRIEVAL])
    for dag in [*described.values(), *(dag for name, dag in with_retrieval.items() if name not in OF_RETRIEVAL)]:
        assert dag["params"]["config"] == ["run.toml", "string"]
    for name in OF_RETRIEVAL:
        assert with_retrieval[name]["params"]["config"] == ["retrieval.toml", "string"]
    for dag in [*described.values(), *with_retrieval.values()]:
        assert dag["unlimited"] == dag["unretried"] == dag["silent"] == []
        assert dag["deadline"] == ["dags.steps.alarm_late"]
        assert (dag["start"], dag["catchup"]) == ("None", False)
        assert dag["params"]["home"] == [str(REPO), "string"]


def test_who_starts_what(described: dict[str, Any]) -> None:
    assert {name: dag["schedule"] for name, dag in described.items()} == {
        "features": "CronPartitionTimetable",
        "training": "PartitionedAssetTimetable",
        "full_retrain": "CronPartitionTimetable",
        "scoring": "CronPartitionTimetable",
        "backfill": "PartitionedAtRuntime",
    }
    assert {name: dag["outlets"] for name, dag in described.items() if dag["outlets"]} == {
        "features": ["published"],
        "backfill": ["published"],
    }
    one_at_a_time = {name for name, dag in described.items() if dag["runs"] == 1}
    assert one_at_a_time == {"training", "full_retrain", "backfill"}


def test_a_retrieval_model_lives_beside_the_other(described: dict[str, Any], with_retrieval: dict[str, Any]) -> None:
    """Without its run file, nothing is different; with it, two DAGs more, and two tasks beside `score`."""
    for name in set(DAGS) - {"scoring", "backfill"}:
        assert with_retrieval[name] == described[name]
    daily, weekly = (with_retrieval[name] for name in OF_RETRIEVAL)
    assert (daily["schedule"], daily["runs"]) == ("PartitionedAssetTimetable", 1)
    assert (daily["downstream"]["check"], daily["downstream"]["prepare"]) == (["prepare"], ["train"])
    assert daily["rules"]["train"] == "none_failed"
    same = ("downstream", "schedule", "rules", "mapped", "runs", "hours")
    assert [weekly[what] for what in same] == [described["full_retrain"][what] for what in same]
    assert described["scoring"]["downstream"] == {"score": []}
    assert with_retrieval["scoring"]["downstream"] == {"score": [], "index": ["recommend"], "recommend": []}
    assert with_retrieval["scoring"]["params"]["retrieval_config"] == ["retrieval.toml", "string"]
    assert "retrieval_config" not in described["scoring"]["params"]
    backfill = with_retrieval["backfill"]
    assert backfill["downstream"]["prepare"] == ["published", "recommend", "score"]
    assert backfill["mapped"] == ["prepare", "recommend", "score"]
    assert backfill["rules"]["recommend"] == backfill["rules"]["score"] == "none_failed"


def test_feature_building_is_a_map_over_partitions(described: dict[str, Any]) -> None:
    for name in ("features", "full_retrain"):
        dag = described[name]
        assert dag["mapped"] == ["count", "encode"]
        down = dag["downstream"]
        assert set(down["plan"]) == {"count", "to_count", "to_encode"}
        assert (down["count"], down["fit"]) == (["fit"], ["encode"])
        assert dag["rules"]["fit"] == "none_failed"  # nothing to count: `count` is skipped, and that is all
    assert described["features"]["rules"]["published"] == "none_failed"
    assert described["full_retrain"]["rules"]["train"] == "none_failed"


def test_the_first_day_makes_the_schedule_catch_up(child: Child, tmp_path: Path) -> None:
    found = describe(child, {"RECSYS_START": "2026-03-01"}, tmp_path)
    assert [name for name, dag in found.items() if dag["catchup"]] == ["features"]
    # The tick that starts the run of a day is the midnight after it.
    assert found["features"]["start"] == "2026-03-02 00:00:00+00:00"
    assert found["scoring"]["start"] == "2026-03-01 00:00:00+00:00"


def test_settings_come_from_the_environment(child: Child, tmp_path: Path) -> None:
    given = {"RECSYS_CONFIG": "conf/mine.toml", "RECSYS_HOME": "/srv/recsys", "RECSYS_DEADLINE_HOURS": "0.5"}
    found = describe(child, given | {"RECSYS_TRAINING_QUEUE": "gpu"}, tmp_path)
    queues = {name: dag["queues"] for name, dag in found.items() if dag["queues"]}
    assert queues == {"training": {"train": "gpu"}, "full_retrain": {"train": "gpu"}}
    for dag in found.values():
        assert (dag["params"]["config"][0], dag["params"]["home"][0]) == ("conf/mine.toml", "/srv/recsys")
        assert dag["hours"] == [0.5]


def test_each_task_is_one_command_line(child: Child, tmp_path: Path) -> None:
    home = tmp_path / "it's a home"
    home.mkdir()
    for given, commands in ({}, COMMANDS), (RETRIEVAL, WITH_RETRIEVAL):
        seen = run(child, given, tmp_path, key=DAY, mapped="day=2026-03-05", conf={"home": str(home)})
        days = run(child, given, tmp_path, key="2026-03-01..2026-03-09", mapped="2026-03-05", conf={"home": str(home)})
        seen |= {name: called for name, called in days.items() if name.startswith("backfill.")}
        assert {name: called["argv"] for name, called in seen.items()} == {
            name: ["-P", "-m", "pipelines.cli", *command] for name, command in commands.items()
        }
        assert {Path(called["cwd"]).name for called in seen.values()} == {"it's a home"}


def test_what_is_given_never_becomes_a_command(child: Child, tmp_path: Path) -> None:
    home = tmp_path / "it's a $(touch home) folder"
    home.mkdir()
    hostile = "x'; touch a #$(touch b)`touch c`\"{{ 7 * 7 }}"
    conf = {"home": str(home), "keep": hostile, "overwrite": hostile}
    conf |= {"config": hostile, "retrieval_config": hostile}
    seen = run(child, RETRIEVAL, tmp_path, key=hostile, mapped=hostile, conf=conf)
    assert seen.keys() == WITH_RETRIEVAL.keys()
    for called in seen.values():
        assert called["argv"][5] == hostile
    assert seen["features.plan"]["argv"][6:] == ["--day", hostile]
    assert seen["features.count"]["argv"][6:] == ["--day", hostile, "--partition", hostile]
    assert seen["backfill.prepare"]["argv"][6:] == ["--day", hostile]
    assert seen["full_retrain.clean"]["argv"][6:] == ["--keep", hostile]
    assert seen["scoring.score"]["argv"][6:] == ["--partition", f"day={hostile}", "--overwrite"]
    recommended = ["--partition", f"day={hostile}", "--build-index", "--overwrite"]
    assert seen["scoring.recommend"]["argv"][6:] == seen["backfill.recommend"]["argv"][6:] == recommended
    assert list(home.iterdir()) == [], "something given reached the shell"


KEYS = """
import json, sys
from airflow.sdk.exceptions import AirflowFailException
from dags.steps import days_of, require_day
found = {}
for function in (require_day, days_of):
    for key in json.loads(sys.argv[1]):
        try:
            found[f"{function.__name__} {key}"] = str(function(key))
        except AirflowFailException as error:
            found[f"{function.__name__} {key}"] = f"refused: {error}"
print("\\n" + json.dumps(found))
"""


def test_only_days_are_partition_keys(child: Child) -> None:
    keys = [None, "", "None", "2026-3-7", "20260307", "2026-W10-6", "2026-02-30", "2026-03-07; touch x", DAY]
    ranges = ["2026-02-27..2026-03-01", f"{DAY}..{DAY}", "2026-03-07..2026-03-06", "..2026-03-07", "2026-03-07..x"]
    found = json.loads(child(KEYS, json.dumps([*keys, *ranges])).splitlines()[-1])
    accepted = {key: value for key, value in found.items() if not value.startswith("refused: partition key ")}
    assert accepted == {
        f"require_day {DAY}": DAY,
        f"days_of {DAY}": f"['{DAY}']",
        "days_of 2026-02-27..2026-03-01": "['2026-02-27', '2026-02-28', '2026-03-01']",
        f"days_of {DAY}..{DAY}": f"['{DAY}']",
    }
    assert "2026-3-7" in found["require_day 2026-3-7"]


ALARM = """
from dags.steps import alarm
alarm("failed", dag="training", partition="2026-03-07")
"""


@pytest.mark.parametrize("command", ["false", "no-such-command", "sleep 'unclosed"])
def test_a_broken_alarm_command_breaks_nothing(child: Child, command: str) -> None:
    child(ALARM, environment={"RECSYS_ALARM": command})


def test_an_alarm_is_one_line_of_json_for_the_command(child: Child, tmp_path: Path) -> None:
    file = tmp_path / "it's alarms"
    for _ in range(2):
        child(ALARM, environment={"RECSYS_ALARM": f'tee -a "{file}"'})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["failed", "failed"]
    assert lines[0].keys() == {"event", "at", "dag", "partition"}
