"""Every DAG under a real scheduler, started through REST with a partition key; a stub stands in for the command line.

The stub notes every call. `plan` refuses a day before the day before it is fitted, as the real one does; beyond that it
does as `home/orders.json` says: by verb, day and perhaps run file, one exit status (or seconds to sleep) per attempt.
"""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from base.errors import SetupError
from pipelines.deployment import DAG_IDS, Deployment, _living

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

STUB = """
import fcntl, json, os, sys, time
from datetime import date, timedelta

verb, given = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
given |= {"--partition": sys.argv[sys.argv.index("--partition") + 1]} if "--partition" in sys.argv else {}
day = given.get("--day") or given.get("--partition", "").removeprefix("day=")

def note(**more):
    with open("calls.jsonl", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(json.dumps({"verb": verb, "day": day, "argv": sys.argv[1:], "pid": os.getpid(), **more}) + "\\n")

def calls():
    try:
        return [json.loads(line) for line in open("calls.jsonl")]
    except FileNotFoundError:
        return []

before = [c for c in calls() if (c["verb"], c["day"], c["argv"]) == (verb, day, sys.argv[1:]) and "exit" not in c]
note(at=time.time())
orders = json.load(open("orders.json"))
orders = orders.get(f"{verb} {day} {given['--config']}", orders.get(f"{verb} {day}", []))
order = orders[len(before)] if len(before) < len(orders) else 0
if isinstance(order, float):
    time.sleep(order)
    order = 0
if verb == "plan" and not order:
    yesterday = (date.fromisoformat(day) - timedelta(1)).isoformat()
    fitted = {c["day"] for c in calls() if c["verb"] == "fit" and c.get("exit") == 0}
    if "--full" not in sys.argv and not day.endswith("-01") and yesterday not in fitted:
        print(f"error: {yesterday}: has no features yet", file=sys.stderr)
        order = 2
if verb == "plan" and not order:
    print("planning")
    count = [] if day == "2026-04-01" else [f"day={day}", "day={{ 7 * 7 }}"]
    print(json.dumps({"count": count, "encode": [f"day={day}"]}))
note(at=time.time(), exit=order)
sys.exit(order)
"""


class Scene:
    """The running deployment, and what the stub was told and has noted."""

    def __init__(self, deployment: Deployment, home: Path) -> None:
        self.deployment, self.home = deployment, home
        self.airflow = deployment.airflow

    def order(self, **orders: list[int | float]) -> None:
        """E.g. `order(**{"train 2026-03-07": [1, 0]})`: its first attempt fails."""
        file = self.home / "orders.json"
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(json.loads(file.read_text()) | orders))
        os.replace(fresh, file)

    def calls(self, verb: str, *, begun: bool = True) -> list[dict[str, Any]]:
        """The calls of a verb: as they began, or as they ended."""
        file = self.home / "calls.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [c for c in lines if c["verb"] == verb and ("exit" not in c) == begun]

    def days(self, verb: str) -> list[str]:
        return [c["day"] for c in self.calls(verb)]

    def alarms(self) -> list[dict[str, Any]]:
        file = self.home / "alarms.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def run(self, dag_id: str, key: str, conf: dict[str, Any] | None = None) -> tuple[str, dict[str, str | None]]:
        """Start a run, wait for its end. Returns its state and those of its tasks."""
        run = self.airflow.trigger(dag_id, key, conf)
        return self.airflow.wait(dag_id, run), self.airflow.states(dag_id, run)

    def trained(self, day: str) -> tuple[str, dict[str, str | None]]:
        """The run of `training` that a day's features started."""
        run = self.airflow.run_of("training", day)
        return self.airflow.wait("training", run), self.airflow.states("training", run)


@contextmanager
def living(folder: Path, *, retrieval_config: str | None = None) -> Iterator[Scene]:
    """A deployment below `folder`, all of its DAGs unpaused; in the end, no process of it is left."""
    home, fake = folder / "home", folder / "fake" / "pipelines"
    home.mkdir()
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "cli.py").write_text(STUB)
    (home / "orders.json").write_text("{}")
    environment = {
        "PYTHONPATH": f"{fake.parent}{os.pathsep}{REPO}",
        "RECSYS_RETRY_SECONDS": "2",
        "RECSYS_PATIENCE": "60",
        "RECSYS_DEADLINE_HOURS": str(5 / 3600),
        "RECSYS_ALARM": f"tee -a {home / 'alarms.jsonl'}",
    }
    with Deployment(
        folder / "run", config="run.toml", retrieval_config=retrieval_config, home=home, environment=environment
    ) as deployment:
        deployment.airflow.unpause(*deployment.airflow.dag_ids)
        yield Scene(deployment, home)
    assert _living(folder / "run") == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with living(tmp_path_factory.mktemp("deployment")) as scene:
        yield scene


def test_days_in_any_order_are_built_in_order_and_each_starts_one_training(scene: Scene) -> None:
    days = ["2026-03-01", "2026-03-02", "2026-03-03"]
    runs = {day: scene.airflow.trigger("features", day) for day in reversed(days)}
    assert {scene.airflow.wait("features", run) for run in runs.values()} == {"success"}
    assert scene.days("fit") == days
    assert scene.airflow.states("features", runs[days[0]]) == dict.fromkeys(
        ["check", "plan", "to_count", "to_encode", "count[0]", "count[1]", "fit", "encode[0]", "published"], "success"
    )
    counted = [c["argv"] for c in scene.calls("count") if c["day"] == days[0]]
    assert sorted(argv[-1] for argv in counted) == ["day=2026-03-01", "day={{ 7 * 7 }}"]  # as planned, not rendered
    for day in days:
        assert scene.trained(day) == ("success", dict.fromkeys(["train", "promote", "report"], "success"))
    assert sorted(scene.days("train")) == days
    ends = sorted(c["at"] for c in scene.calls("train", begun=False))
    begins = sorted(c["at"] for c in scene.calls("train"))
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))  # never two at once


def test_a_day_with_nothing_to_count_is_published(scene: Scene) -> None:
    state, tasks = scene.run("features", "2026-04-01")
    assert (state, tasks["count"], tasks["fit"], tasks["published"]) == ("success", "skipped", "success", "success")


def test_what_was_trained_already_or_is_refused_is_skipped(scene: Scene) -> None:
    scene.order(**{"train 2026-05-01": [99], "promote 2026-06-01": [99], "promote 2026-07-01": [98]})
    for day in ("2026-05-01", "2026-06-01", "2026-07-01"):
        assert scene.run("features", day)[0] == "success"
    assert scene.trained("2026-05-01") == ("success", dict.fromkeys(["train", "promote", "report"], "skipped"))
    refused = ("success", {"train": "success", "promote": "skipped", "report": "success"})
    assert scene.trained("2026-06-01") == scene.trained("2026-07-01") == refused


def test_a_failing_task_is_tried_again_and_says_so(scene: Scene) -> None:
    scene.order(**{"score 2026-03-07": [1]})
    run = scene.airflow.trigger("scoring", "2026-03-07")
    assert scene.airflow.wait("scoring", run) == "success"
    assert [t["try_number"] for t in scene.airflow.tasks("scoring", run)] == [2]
    said = [(a["event"], a["task"]) for a in scene.alarms() if a["run"] == run and a["event"] != "late"]
    assert said == [("retrying", "score")]


def test_a_task_that_goes_on_failing_stops_the_run_and_starts_no_training(scene: Scene) -> None:
    scene.order(**{"fit 2026-08-01": [2, 2, 2, 2]})
    run = scene.airflow.trigger("features", "2026-08-01")
    assert scene.airflow.wait("features", run) == "failed"
    states = scene.airflow.states("features", run)
    assert (states["fit"], states["encode"], states["published"]) == ("failed", "upstream_failed", "upstream_failed")
    said = [(a["event"], a["task"], a["partition"]) for a in scene.alarms() if a["run"] == run and a["event"] != "late"]
    assert said == [("retrying", "fit", "2026-08-01"), ("failed", "fit", "2026-08-01")]
    assert "2026-08-01" not in [r["partition_key"] for r in scene.airflow.runs("training")]

    scene.airflow.clear("features", run)  # the remedy, once the cause is gone
    assert scene.airflow.wait("features", run) == "success"
    assert scene.trained("2026-08-01")[0] == "success"


def test_a_killed_task_is_tried_again(scene: Scene) -> None:
    scene.order(**{"score 2026-03-08": [120.0]})
    run = scene.airflow.trigger("scoring", "2026-03-08")
    end = time.monotonic() + 120
    while not (found := [c for c in scene.calls("score") if c["day"] == "2026-03-08"]) and time.monotonic() < end:
        time.sleep(0.2)
    os.kill(found[0]["pid"], signal.SIGKILL)
    assert scene.airflow.wait("scoring", run) == "success"
    assert scene.days("score").count("2026-03-08") == 2


def test_a_run_past_its_deadline_raises_an_alarm(scene: Scene) -> None:
    scene.order(**{"score 2026-03-09": [12.0]})
    run = scene.airflow.trigger("scoring", "2026-03-09")
    scene.airflow.wait("scoring", run)
    end = time.monotonic() + 60
    while not (said := [a for a in scene.alarms() if a["event"] == "late" and a["run"] == run]):
        assert time.monotonic() < end, scene.alarms()
        time.sleep(1)
    assert said[0]["dag"] == "scoring"


def test_what_a_paused_consumer_missed_does_not_follow(scene: Scene) -> None:
    """Hence `train` itself catches up the days before; see docs/operations.md."""
    scene.airflow.pause("training")
    assert scene.run("features", "2026-09-01")[0] == "success"
    scene.airflow.unpause("training")
    assert scene.run("features", "2026-09-02")[0] == "success"
    assert scene.trained("2026-09-02")[0] == "success"
    assert "2026-09-01" not in [r["partition_key"] for r in scene.airflow.runs("training")]


def test_a_full_retrain_of_a_day_that_is_over(scene: Scene) -> None:
    state, tasks = scene.run("full_retrain", "2026-03-08")
    assert state == "success"
    assert set(tasks.values()) == {"success"}
    assert all("--full" in c["argv"] for c in scene.calls("train") if c["day"] == "2026-03-08")


def test_a_backfill_prepares_in_order_and_scores_every_day(scene: Scene) -> None:
    days = ["2026-02-27", "2026-02-28", "2026-03-01"]
    conf = {"overwrite": True}
    state, tasks = scene.run("backfill", "2026-02-27..2026-03-01", conf)
    assert (state, set(tasks.values())) == ("success", {"success"})
    assert scene.days("prepare") == days
    scored = [c["argv"] for c in scene.calls("score") if c["day"] in days]
    assert sorted(argv[-2] for argv in scored) == [f"day={day}" for day in days]
    assert {argv[-1] for argv in scored} == {"--overwrite"}
    for day in days[:2]:
        assert scene.trained(day)[0] == "success"


def test_airflows_own_backfill_includes_the_last_day(scene: Scene) -> None:
    days = ["2026-01-05", "2026-01-06", "2026-01-07"]
    scene.airflow.backfill("scoring", days[0], days[-1])
    runs = [scene.airflow.run_of("scoring", day) for day in days]
    assert [scene.airflow.wait("scoring", run) for run in runs] == ["success"] * 3
    assert [day for day in scene.days("score") if day.startswith("2026-01")] == days


def test_a_run_without_a_day_fails_at_once_with_a_sentence(scene: Scene) -> None:
    wanted = [("training", "2026-3-7", "train"), ("scoring", None, "score"), ("backfill", "2026-03-02..x", "days")]
    runs = [(dag_id, scene.airflow.trigger(dag_id, key), key, task_id) for dag_id, key, task_id in wanted]
    for dag_id, run, key, task_id in runs:
        assert scene.airflow.wait(dag_id, run) == "failed"
        first = next(t for t in scene.airflow.tasks(dag_id, run) if t["task_id"] == task_id)
        assert (first["state"], first["try_number"]) == ("failed", 1)
        said = next(a for a in scene.alarms() if a["run"] == run and a["event"] == "failed")
        assert said["error"].startswith(f"partition key {str(key).rpartition('.')[2]!r}: is no day")
    with pytest.raises(SetupError, match="does not match"):
        scene.airflow.trigger("features", "2026-02-30")
    assert not {"2026-3-7", "None", ""} & {*scene.days("train"), *scene.days("score")}


def test_nothing_starts_by_itself(scene: Scene) -> None:
    """Unpausing starts no run of today: the first tick lies ahead."""
    kinds = {r["run_type"] for dag in DAG_IDS for r in scene.airflow.runs(dag)}
    assert kinds <= {"manual", "asset_triggered", "backfill"}


def test_mlflow_can_be_away_for_a_while(scene: Scene) -> None:
    deployment = scene.deployment
    with urllib.request.urlopen(f"{deployment.mlflow_uri}/health", timeout=30) as answer:
        assert answer.status == 200
    deployment.stop_mlflow()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{deployment.mlflow_uri}/health", timeout=30)
    deployment.run_mlflow()
    with urllib.request.urlopen(f"{deployment.mlflow_uri}/health", timeout=30) as answer:
        assert answer.status == 200
