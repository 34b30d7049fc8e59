"""A two-tower model beside the ranking one under a real scheduler; a stub stands in for the command line."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.dags.test_scheduler import Scene, living

pytestmark = pytest.mark.slow

TRAINED = dict.fromkeys(["check", "prepare", "train", "promote", "report"], "success")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with living(tmp_path_factory.mktemp("retrieval"), retrieval_config="retrieval.toml") as scene:
        yield scene


def of(calls: list[dict[str, Any]], config: str) -> list[dict[str, Any]]:
    """Those for one run file."""
    return [call for call in calls if call["argv"][call["argv"].index("--config") + 1] == config]


def retrieved(scene: Scene, day: str) -> tuple[str, dict[str, str | None]]:
    """The run of `retrieval` that a day's features started."""
    run = scene.airflow.run_of("retrieval", day)
    return scene.airflow.wait("retrieval", run), scene.airflow.states("retrieval", run)


def test_a_days_features_start_both_trainings(scene: Scene) -> None:
    scene.order(**{"train 2026-03-01 run.toml": [2, 2, 2, 2], "promote 2026-03-01 retrieval.toml": [99]})
    assert scene.run("features", "2026-03-01")[0] == "success"
    assert retrieved(scene, "2026-03-01") == ("success", {**TRAINED, "promote": "skipped"})
    assert scene.trained("2026-03-01")[0] == "failed"  # which is no concern of the other
    (ours,) = of(scene.calls("train"), "retrieval.toml")
    (fitted,) = of(scene.calls("fit", begun=False), "run.toml")
    assert fitted["at"] < of(scene.calls("check"), "retrieval.toml")[0]["at"] < ours["at"]


def test_what_was_trained_already_is_skipped(scene: Scene) -> None:
    scene.order(**{"prepare 2026-05-01": [99], "train 2026-05-01 retrieval.toml": [99]})
    assert scene.run("features", "2026-05-01")[0] == "success"
    assert retrieved(scene, "2026-05-01") == ("success", dict.fromkeys(TRAINED, "skipped") | {"check": "success"})


def test_users_are_recommended_items_once_there_is_an_index(scene: Scene) -> None:
    # The index has no day. Scores that fail for good stop nothing, a killed recommend is tried again.
    scene.order(**{"index ": [1, 3.0], "score 2026-03-07": [2] * 61, "recommend 2026-03-07": [120.0]})
    run = scene.airflow.trigger("scoring", "2026-03-07")
    end = time.monotonic() + 180
    while not (begun := scene.calls("recommend")) and time.monotonic() < end:
        time.sleep(0.2)
    assert [call["exit"] for call in scene.calls("index", begun=False)] == [1, 0]
    assert scene.calls("index", begun=False)[-1]["at"] <= begun[0]["at"]
    os.kill(begun[0]["pid"], signal.SIGKILL)
    while len(scene.calls("recommend")) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    scene.order(**{"score 2026-03-07": []})
    assert scene.airflow.wait("scoring", run) == "success"
    assert scene.airflow.states("scoring", run) == dict.fromkeys(["score", "index", "recommend"], "success")
    assert scene.days("recommend").count("2026-03-07") == 2
    assert len(of(scene.calls("recommend"), "retrieval.toml")) == 2
    assert len(of(scene.calls("score"), "run.toml")) == len(scene.calls("score")) > 1
    said = {(a["event"], a["task"]) for a in scene.alarms() if a["run"] == run and a["event"] != "late"}
    assert said == {("retrying", task) for task in ("score", "index", "recommend")}


def test_a_backfill_recommends_on_every_day_and_trains_both(scene: Scene) -> None:
    days = ["2026-02-27", "2026-02-28"]
    given = {"overwrite": True, "retrieval_config": "other.toml"}
    state, tasks = scene.run("backfill", f"{days[0]}..{days[1]}", given)
    assert (state, set(tasks.values())) == ("success", {"success"})
    called = of(scene.calls("recommend"), "other.toml")
    assert sorted(call["day"] for call in called) == days
    assert {tuple(call["argv"][-2:]) for call in called} == {("--build-index", "--overwrite")}
    for day in days:
        assert scene.trained(day)[0] == "success"
        assert retrieved(scene, day) == ("success", TRAINED)


def test_a_full_retrain_of_its_own(scene: Scene) -> None:
    state, tasks = scene.run("retrieval_full_retrain", "2026-03-08")
    assert (state, set(tasks.values())) == ("success", {"success"})
    trained = [call for call in scene.calls("train") if call["day"] == "2026-03-08"]
    assert [call["argv"][-1] for call in of(trained, "retrieval.toml")] == ["--full"]
    assert of(trained, "run.toml") == []
    assert len(of(scene.calls("clean"), "retrieval.toml")) == 1


def test_a_run_without_a_day_recommends_nothing(scene: Scene) -> None:
    before = len(scene.calls("index"))
    run = scene.airflow.trigger("scoring", "2026-3-7")
    assert scene.airflow.wait("scoring", run) == "failed"
    states = scene.airflow.states("scoring", run)
    assert states == {"score": "failed", "index": "failed", "recommend": "upstream_failed"}
    assert len(scene.calls("index")) == before
