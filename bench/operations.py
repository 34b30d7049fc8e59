"""What production may meet, tried on a real Airflow and a real MLflow; after each, what must hold is checked.

    python -m bench.operations                       every scenario, about half an hour on two cores
    python -m bench.operations --quick               two days in order, a killed task and a rollback

The table goes into docs/operations.md by hand of this command (`--write`). Nothing here is timed.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import TypeVar

import polars as pl
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from base.storage import publish, published, read_manifest, resolve
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines.config import Run
from pipelines.deployment import Deployment
from pipelines.line import current_line
from pipelines.production_demo import config_of, run_files
from pipelines.rollback import rollback
from pipelines.tracking import registry_of

ROOT = Path(__file__).parent.parent
T = TypeVar("T")
DOCS = ROOT / "docs" / "operations.md"
FIRST = date(2026, 3, 5)
LOG = SyntheticConfig(rows_per_day=4000, users=2000, items=500, drift=0.05)
SETTINGS = """
[gate]
suspicious_auc_gain = 1.0     # only what is tried here shall decide
suspicious_entropy_gain = 1.0
max_psi = 100.0
max_normalized_entropy = 1.3
"""


@dataclass
class Trial:
    """One scenario, and what was seen."""

    name: str
    seen: str
    seconds: float


@dataclass
class Production:
    """A deployment, its log, and which ids have been given."""

    run: Run
    servers: Deployment
    logs: Path
    ids: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict[str, dict[str, dict[str, int]]])
    """By line and feature."""
    trials: list[Trial] = field(default_factory=list[Trial])

    def write(self, day: date, change: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows) -> None:
        """The day's log."""
        target = self.logs / f"day={day}"
        with publish(target, "log", overwrite=True) as staging:
            change(day_frame(LOG, day)).drop("day").write_parquet(staging / "part.parquet")

    def dag(self, name: str, key: date | str, *, state: str = "success") -> str:
        """A run of a DAG, waited for."""
        run_id = self.servers.airflow.trigger(name, str(key))
        self.over(name, run_id, state)
        return run_id

    def over(self, name: str, run_id: str, state: str = "success") -> None:
        found = self.servers.airflow.wait(name, run_id, seconds=900)
        assert found == state, f"{name} {run_id}: {found}: {self.servers.airflow.states(name, run_id)}"

    def trained(self, day: date) -> dict[str, str | None]:
        """The states of the training's tasks, once its run, which the asset starts, is over."""
        run_id = self.servers.airflow.run_of("training", str(day))
        self.over("training", run_id)
        return self.servers.airflow.states("training", run_id)

    def live(self, day: date) -> dict[str, str | None]:
        """A day as it should be."""
        self.write(day)
        self.dag("scoring", day)
        self.dag("features", day)
        return self.trained(day)

    def champion(self) -> str:
        found = registry_of(self.run).champion()
        assert found is not None
        return found.version

    def check(self) -> str:
        """Raises AssertionError unless all that must hold, holds."""
        scored = published(self.run.output / "scores")
        for target in scored:
            parts = pl.scan_parquet(resolve(target) / "part-*.parquet").select("impression_id").collect()
            assert parts.height == parts.n_unique() == LOG.rows_per_day, target
        versions = self.versions()
        models = self.run.output / "models"
        made = sorted(read_manifest(resolve(t)).version for m in models.iterdir() for t in published(m / "bundles"))
        assert sorted(v.tags["bundle"] for v in versions) == made, "not one version per training"
        passed = [int(v.version) for v in versions if v.tags.get("gate") == "passed" and "rolled_back" not in v.tags]
        assert int(self.champion()) == max(passed), (self.champion(), passed)
        line = current_line(self.run)
        assert line is not None
        features = line.features(line.days("features")[-1])
        known_ids = self.ids.setdefault(line.name, {})
        for transform, learned in zip(features.recipe.transforms, features.learned, strict=True):
            if "id" in learned.columns:
                known = dict(learned.drop_nulls("id").select(pl.col("value").cast(pl.String), "id").iter_rows())
                assert known_ids.get(transform.output, {}).items() <= known.items(), transform.output
                known_ids[transform.output] = known
        states = line.days("states")
        assert states == self.run.data.days(states[0], states[-1])
        return (
            f"{len(scored)} partitions scored, {len(versions)} versions of as many trainings, {len(passed)} promoted; "
            f"champion {self.champion()}; trained to {states[-1]}"
        )

    def versions(self) -> list[ModelVersion]:
        client = MlflowClient(self.run.tracking_uri, self.run.tracking_uri)
        return list(client.search_model_versions("name = 'ctr'"))

    def trial(self, name: str, scenario: Callable[[], str | None]) -> None:
        """Play a scenario, check, remember."""
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        seen = scenario()
        told = "; ".join(text for text in (seen, self.check()) if text)
        self.trials.append(Trial(name, told, time.perf_counter() - started))
        print(f"   {told} ({self.trials[-1].seconds:.0f} s)", flush=True)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/operations"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/operations.md")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    patience = {"RECSYS_RETRY_SECONDS": "5", "RECSYS_PATIENCE": "40", "OMP_NUM_THREADS": "1"}
    with Deployment(work / "servers", config=str(config_of(work)), environment=patience) as servers:
        production = Production(run_files(work, servers.mlflow_uri, _lenient)[0], servers, work / "logs")
        servers.airflow.unpause("features", "training", "full_retrain", "scoring", "backfill")
        _play(production, quick=options.quick)
    table = _table(production.trials)
    print(table)
    if options.write:
        _write(table)


def _play(production: Production, *, quick: bool) -> None:
    days = iter(FIRST + timedelta(days=n) for n in range(1, 60))
    airflow = production.servers.airflow

    def begin() -> None:
        for n in range(4, -1, -1):
            production.write(FIRST - timedelta(days=n))
        production.dag("full_retrain", FIRST)

    def in_order(count: int) -> str:
        decided = [production.live(next(days))["promote"] for _ in range(count)]
        return f"gate: {decided.count('success')} promoted, {decided.count('skipped')} not"

    def again() -> str:
        before = current_line(production.run)
        day = next(days)
        production.write(day)
        production.dag("scoring", day)
        production.dag("full_retrain", day)
        line = current_line(production.run)
        assert line is not None
        assert before is not None
        production.live(next(days))
        return f"daily steps went on with line {line.name}, before it was {before.name}"

    def late() -> str:
        first, second = next(days), next(days)
        production.write(second)
        waiting = airflow.trigger("features", str(second))
        _until(lambda: any(t["state"] == "up_for_retry" for t in airflow.tasks("features", waiting)))
        production.write(first)
        production.dag("features", first)
        production.over("features", waiting)
        states = [production.trained(day)["train"] for day in (first, second)]
        for day in (first, second):
            production.dag("scoring", day)
        return f"{second} waited for {first}; training of the two days: {', '.join(str(s) for s in states)}"

    def killed() -> str:
        day = next(days)
        production.write(day)
        production.dag("scoring", day)
        production.dag("features", day)
        run_id = airflow.run_of("training", str(day))
        victim = _until(lambda: _process("pipelines.cli train"))
        time.sleep(6)
        os.kill(victim, signal.SIGKILL)
        production.over("training", run_id)
        tries = {t["task_id"]: t["try_number"] for t in airflow.tasks("training", run_id)}
        assert tries["train"] > 1, tries
        return f"train was killed and succeeded at try {tries['train']}"

    def overlapping() -> str:
        day = next(days)
        production.write(day)
        runs = [("features", airflow.trigger("features", str(day))) for _ in range(2)]
        runs += [("scoring", airflow.trigger("scoring", str(day))) for _ in range(2)]
        for name, run_id in runs:
            production.over(name, run_id)
        airflow.trigger("training", str(day))
        _until(lambda: all(r["state"] == "success" for r in airflow.runs("training")), seconds=600)
        return "two runs each of features, scoring and training of one day, at once"

    def backfill() -> str:
        three = [next(days) for _ in range(3)]
        for day in three:
            production.write(day)
        production.dag("backfill", f"{three[0]}..{three[-1]}")
        _until(lambda: _runs_of(production, three[-1]) and _all_over(production), seconds=600)
        return f"{three[0]} to {three[-1]} by one run"

    def paused() -> str:
        airflow.pause("training")
        missed, day = next(days), next(days)
        for d in (missed, day):
            production.write(d)
            production.dag("scoring", d)
        production.dag("features", missed)
        airflow.unpause("training")
        production.dag("features", day)
        production.trained(day)
        line = current_line(production.run)
        assert line is not None
        assert line.days("states")[-1] == day - timedelta(days=2)
        started = {r["partition_key"] for r in airflow.runs("training")}
        return f"no training was started for {missed}: {str(missed) not in started}; that of {day} made up for it"

    def mlflow_down() -> str:
        day = next(days)
        production.write(day)
        production.servers.stop_mlflow()
        run_id = airflow.trigger("scoring", str(day))
        _until(lambda: any(t["state"] == "up_for_retry" for t in airflow.tasks("scoring", run_id)))
        production.servers.run_mlflow()
        production.over("scoring", run_id)
        production.dag("features", day)
        production.trained(day)
        return "scoring waited for MLflow"

    def bad_challenger() -> str:
        poisoned = next(days)
        production.write(poisoned, _inverted)
        production.dag("scoring", poisoned)
        production.dag("features", poisoned)
        production.trained(poisoned)
        production.live(next(days))
        before = production.champion()
        decided = production.live(next(days))["promote"]
        assert decided == "skipped", decided
        assert production.champion() == before
        return f"a day whose clicks are of the wrong rows was trained on; the gate refused, champion {before} stays"

    def back() -> str:
        left = production.champion()
        restored = rollback(production.run, say=lambda _: None).version
        day = next(days)
        production.write(day)
        production.dag("scoring", day)
        by = read_manifest(resolve(production.run.scores_path(f"day={day}"))).about["model_version"]
        assert by == restored != left
        return f"champion {left} back to {restored}, which scored {day}"

    production.trial("full training", begin)
    if quick:
        production.trial("2 days in order", lambda: in_order(2))
        production.trial("a retry after a killed task", killed)
        production.trial("a rollback", back)
        return
    production.trial("5 days in order", lambda: in_order(5))
    production.trial("another full training", again)
    production.trial("a day that arrives late", late)
    production.trial("a retry after a killed task", killed)
    production.trial("two overlapping runs of the same partition", overlapping)
    production.trial("a backfill of 3 days", backfill)
    production.trial("a paused and resumed consumer", paused)
    production.trial("MLflow down for one step", mlflow_down)
    production.trial("a challenger that must fail the gate", bad_challenger)
    production.trial("a rollback", back)


def _inverted(rows: pl.DataFrame) -> pl.DataFrame:
    """As many clicks as before, on the rows that were least likely to get one."""
    clicks = int(rows["click"].sum())
    return rows.with_columns(click=(pl.col("click_probability").rank("ordinal") <= clicks).cast(rows["click"].dtype))


def _runs_of(production: Production, day: date) -> bool:
    return any(r["partition_key"] == str(day) for r in production.servers.airflow.runs("training"))


def _all_over(production: Production) -> bool:
    runs = production.servers.airflow.runs("training")
    assert not any(r["state"] == "failed" for r in runs), runs
    return all(r["state"] == "success" for r in runs)


def _process(words: str) -> int | None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if words in command and command.startswith(sys.executable):
                return int(entry.name)
    return None


def _until(found: Callable[[], T | None], seconds: float = 300) -> T:
    end = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.5)
    return value


def _lenient(text: str) -> str:
    return re.sub(r"\n\[gate\]\n(?:.+\n)+", SETTINGS, text)


def _table(trials: list[Trial]) -> str:
    lines = ["| tried | seen |", "|---|---|"]
    return "\n".join([*lines, *(f"| {t.name} | {t.seen} |" for t in trials)])


def _write(table: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    marked = f"<!-- tried -->\n{table}\n<!-- end -->"
    DOCS.write_text(re.sub(r"<!-- tried -->\n.*?<!-- end -->", lambda _: marked, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
