"""What the DAGs share: the deployment's settings, steps of the command line, alarms. No DAG is made here.

Airflow must run from the environment in which recsys is installed: the DAG files import this module as `dags.steps`.
"""

import asyncio
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Container
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.sensors.date_time import DateTimeSensor
from airflow.sdk import (
    Asset,
    Context,
    CronPartitionTimetable,
    Param,
    TriggerRule,
    chain,
    task,
)
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.types import RuntimeTaskInstanceProtocol

log = logging.getLogger(__name__)

# This interpreter, since the scheduler's PATH may lack it; -P, so that no folder below `home` is taken for our code.
RECSYS = shlex.join([sys.executable, "-P", "-m", "pipelines.cli"])
NOTHING, HELD = 99, 98
"""Exit statuses that skip what follows: nothing to do, or refused by the gate; held by the gate for a person."""

FEATURES = Asset(name="recsys_features", uri="x-recsys://features")
"""Features and examples; one partition per day."""

# Of the deployment: read from the environment of every component when it parses a DAG file.
HOME = os.environ.get("RECSYS_HOME") or str(Path(__file__).resolve().parents[1])
CONFIG = os.environ.get("RECSYS_CONFIG") or "run.toml"
RETRIEVAL_CONFIG = os.environ.get("RECSYS_RETRIEVAL_CONFIG") or None
"""The run file of a two-tower model that finds candidates, if there is one."""
START = os.environ.get("RECSYS_START") or None
"""The first day to build features of, YYYY-MM-DD. All days since then are; without it only the newest, at each tick."""
OBSERVED_DAYS = int(os.environ.get("RECSYS_OBSERVED_DAYS") or 0)
"""How many days later than at its end a day is processed, so that late labels are in its log: daily.observed_days."""
RETRY_DELAY = timedelta(seconds=float(os.environ.get("RECSYS_RETRY_SECONDS") or 300))
PATIENCE = int(os.environ.get("RECSYS_PATIENCE") or 72)
"""Retries of a step that waits for what is not there yet, a late log or the day before: 72 × 5 minutes = 6 hours."""
RETRIES = min(3, PATIENCE)
TRAINING_QUEUE = os.environ.get("RECSYS_TRAINING_QUEUE")
"""The queue of the step that trains, where executors have queues; by default that of every step."""
DEADLINE_HOURS = os.environ.get("RECSYS_DEADLINE_HOURS")

ALARM_SECONDS = 30
"""How long the command that raises an alarm may take."""


def params(config: str = CONFIG, /, **own: Param) -> ParamsDict:
    """What a run can be given: the same two for every DAG, then its own."""
    return ParamsDict(
        {
            "config": Param(config, type="string", minLength=1, description="The run file, relative to home."),
            "home": Param(HOME, type="string", minLength=1, description="The working directory of every step."),
            **own,
        }
    )


KEEP = Param(14, type="integer", minimum=1, description="How many days of artefacts to keep.")
OVERWRITE = Param(False, type="boolean", description="Make again what is published already.")
RETRIEVAL: dict[str, Param] = {}
"""What a run of a DAG that uses both models can be given besides."""
if RETRIEVAL_CONFIG:
    RETRIEVAL["retrieval_config"] = Param(
        RETRIEVAL_CONFIG, type="string", minLength=1, description="The run file of the two towers, relative to home."
    )

_OF_DAY: dict[str, Any] = {
    "env": {"RECSYS_PUBLISHED": "{{ '--overwrite' if params.overwrite else '--if-missing' }}"},
    "append_env": True,
}
SCORE: dict[str, Any] = {"verb": "score", "options": '--partition "$RECSYS_PARTITION" "$RECSYS_PUBLISHED"', **_OF_DAY}
"""Arguments of the step that scores."""
INDEX: dict[str, Any] = {"verb": "index", "options": "--if-missing", "config": "{{ params.retrieval_config }}"}
"""Of the step that has an index of the champion among the two-tower models."""
RECOMMEND: dict[str, Any] = {
    "verb": "recommend",
    # Should another version have become champion since the index was built: its own is built first.
    "options": '--partition "$RECSYS_PARTITION" --build-index "$RECSYS_PUBLISHED"',
    "config": "{{ params.retrieval_config }}",
    **_OF_DAY,
}
"""Of the step that recommends."""


def each(cron: str, *, offset: int = 0) -> CronPartitionTimetable:
    """A partition key (YYYY-MM-DD, UTC) per tick of `cron`, `offset` ticks away; the first one at the next tick.

    Ticks are at midnight, because a backfill leaves out the last day of its range if they are later.
    """
    return CronPartitionTimetable(
        cron, timezone="UTC", run_offset=offset, key_format="%Y-%m-%d", run_immediately=timedelta(0)
    )


def common(*, hours: float, lag: timedelta = timedelta(0)) -> dict[str, Any]:
    """Arguments of every DAG: alarms, in how many hours a run should be through, and where the schedule starts.

    `lag`: from the beginning of a day to the tick that starts its run.
    """
    start = datetime.combine(date.fromisoformat(START), time(), UTC) + lag if START else None
    return {
        "start_date": start,
        "default_args": {
            "retries": RETRIES,
            "retry_delay": RETRY_DELAY,
            "on_failure_callback": alarm_failed,
            "on_retry_callback": alarm_retried,
        },
        "deadline": DeadlineAlert(
            reference=DeadlineReference.DAGRUN_QUEUED_AT,
            interval=timedelta(hours=float(DEADLINE_HOURS or hours)),
            callback=AsyncCallback(alarm_late),
        ),
        "tags": ["recsys"],
    }


class Step(BashOperator):
    """One verb of the command line, for the day that is the run's partition key.

    What a user gives reaches the shell only as the value of a quoted variable, never as part of the command.
    A key that is no date fails the task at once, without a retry.
    """

    template_fields = (*BashOperator.template_fields, "config", "day")

    def __init__(
        self,
        *,
        verb: str,
        options: str = "",
        day: str = "{{ dag_run.partition_key }}",
        partition: str | None = None,
        config: str = "{{ params.config }}",
        skip: Container[int] | None = None,
        **operator: Any,
    ) -> None:
        """`options` may read $RECSYS_DAY and $RECSYS_PARTITION (by default that of the day); `skip`: exit statuses."""
        super().__init__(
            bash_command=f'exec {RECSYS} {verb} --config "$RECSYS_CONFIG" {options}'.rstrip(),
            skip_on_exit_code=skip or (),
            **{"cwd": "{{ params.home }}", "do_xcom_push": False, **operator},
        )
        self.verb = verb
        self.options = options
        self.day = day
        self.partition = partition
        self.config = config

    def get_env(self, context: Context) -> dict[str, str]:
        """The worker's environment and what the command line reads of this run."""
        given = {
            "RECSYS_CONFIG": self.config,
            "RECSYS_DAY": self.day,
            "RECSYS_PARTITION": self.partition or f"day={self.day}",
        }
        return {**super().get_env(context), **given}

    def execute(self, context: Context) -> Any:
        """Run the command. Raises AirflowFailException, which is not retried, if the day is no date."""
        require_day(self.day)
        return super().execute(context)


def check(*, retries: int = PATIENCE) -> Step:
    """The step that compares the day with what the champion has seen; by default it waits for the day's log."""
    return Step(
        task_id="check",
        verb="check",
        options='--partition "$RECSYS_PARTITION"',
        retries=retries,
        execution_timeout=timedelta(hours=1),
    )


def prepare(*, full: bool = False) -> tuple[Step, Step]:
    """The steps from the raw log to examples: a map over partitions twice, once to count and once to encode.

    Returns the first and the last. With `full` the features are fitted anew on a window of days.
    """
    of_day = '--day "$RECSYS_DAY"' + " --full" * full
    of_partition = '--day "$RECSYS_DAY" --partition "$RECSYS_PARTITION"' + " --full" * full

    @task
    def partitions(planned: dict[str, list[str]], of: str) -> list[str]:
        return planned[of]

    plan = Step(
        task_id="plan",
        verb="plan",
        options=of_day,
        retries=PATIENCE,
        execution_timeout=timedelta(hours=1),
        do_xcom_push=True,
        output_processor=json.loads,
    )
    count = Step.partial(
        task_id="count",
        verb="count",
        options=of_partition,
        retries=PATIENCE,  # it waits for the log of a day that was missed
        execution_timeout=timedelta(hours=2),
        map_index_template="{{ task.partition }}",
    ).expand(partition=partitions.override(task_id="to_count")(plan.output, "count"))
    fit = Step(
        task_id="fit",
        verb="fit",
        options=of_day,
        execution_timeout=timedelta(hours=4),
        trigger_rule=TriggerRule.NONE_FAILED,  # it may be that nothing is left to count
    )
    encode = Step.partial(
        task_id="encode",
        verb="encode",
        options=of_partition,
        execution_timeout=timedelta(hours=2),
        map_index_template="{{ task.partition }}",
    ).expand(partition=partitions.override(task_id="to_encode")(plan.output, "encode"))
    chain(plan, count, fit, encode)
    return plan, encode


def train(*, full: bool = False, limit: timedelta) -> tuple[Step, Step]:
    """The steps from examples to the gate's verdict and its report. Returns the first and the last.

    Days are trained in order whatever order the runs come in: `train` catches up the days before and skips
    a day that a later model has seen. It keeps that state itself; `max_active_runs` only saves waiting.
    """
    of_day = '--day "$RECSYS_DAY"' + " --full" * full
    first = Step(
        task_id="train",
        verb="train",
        options=of_day,
        skip={NOTHING},
        execution_timeout=limit,
        trigger_rule=TriggerRule.NONE_FAILED,
        **({"queue": TRAINING_QUEUE} if TRAINING_QUEUE else {}),
    )
    promote = Step(
        task_id="promote",
        verb="promote",
        options=of_day,
        skip={NOTHING, HELD},
        execution_timeout=timedelta(hours=2),
    )
    report = Step(
        task_id="report",
        verb="report",
        options=of_day,
        skip={NOTHING},
        execution_timeout=timedelta(hours=1),
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,  # also after a refusal, but not if nothing was trained
    )
    chain(first, promote, report)
    chain(first, report)
    return first, report


def retrain() -> None:
    """The steps of a full training, from the end of its day to the removal of what has become old."""
    over = DateTimeSensor(
        task_id="over",
        target_time=f"{{{{ macros.ds_add(dag_run.partition_key, {1 + OBSERVED_DAYS}) }}}}",
        mode="reschedule",
        poke_interval=timedelta(minutes=10),
        timeout=timedelta(days=2).total_seconds(),
    )
    plan, encode = prepare(full=True)
    first, report = train(full=True, limit=timedelta(hours=36))
    clean = Step(
        task_id="clean",
        verb="clean",
        options='--keep "$RECSYS_KEEP"',
        env={"RECSYS_KEEP": "{{ params.keep }}"},
        append_env=True,
        execution_timeout=timedelta(hours=1),
        trigger_rule=TriggerRule.NONE_FAILED,
    )
    chain(over, check(), plan)  # the gate needs the log of the day
    chain(encode, first)
    chain(report, clean)


def require_day(key: str | None) -> date:
    """The day of a partition key. Raises AirflowFailException if it is missing or not YYYY-MM-DD."""
    try:
        day = date.fromisoformat(key or "")
    except ValueError:
        day = None
    if day is None or day.isoformat() != key:
        raise AirflowFailException(
            f"partition key {key!r}: is no day; start the run with a partition key such as 2026-03-07"
        )
    return day


def days_of(key: str | None) -> list[str]:
    """The days of a range FIRST..LAST, both included, or of one day. Raises AirflowFailException for anything else."""
    first, _, last = (key or "").partition("..")
    start, end = require_day(first), require_day(last or first)
    if start > end:
        raise AirflowFailException(f"partition key {key!r}: ends before it begins; write FIRST..LAST")
    return [(start + timedelta(days=n)).isoformat() for n in range((end - start).days + 1)]


def alarm_failed(context: Context) -> None:
    """A task failed for good."""
    alarm("failed", **_about(context))


def alarm_retried(context: Context) -> None:
    """A task failed for the first time and will be tried again; later attempts are silent."""
    if _task(context).try_number == 1:
        alarm("retrying", **_about(context))


async def alarm_late(context: dict[str, Any] | None = None) -> None:
    """A run missed its deadline. Runs in the triggerer."""
    run = (context or {}).get("dag_run") or {}
    await asyncio.to_thread(
        alarm, "late", dag=run.get("dag_id"), run=run.get("dag_run_id"), partition=run.get("partition_key")
    )


def _task(context: Context) -> RuntimeTaskInstanceProtocol:
    assert "ti" in context
    return context["ti"]


def _about(context: Context) -> dict[str, Any]:
    ti = _task(context)
    return {
        "dag": ti.dag_id,
        "task": ti.task_id,
        "map_index": ti.map_index,
        "run": ti.run_id,
        "partition": getattr(context.get("dag_run"), "partition_key", None),
        "attempt": ti.try_number,
        "error": str(context.get("exception") or "").partition("\n")[0],
    }


def alarm(event: str, **about: Any) -> None:
    """Log one line of JSON and give it to the command in RECSYS_ALARM, if there is one, as its standard input."""
    line = json.dumps({"event": event, "at": datetime.now(UTC).isoformat(timespec="seconds"), **about})
    log.error("recsys alarm: %s", line)
    command = os.environ.get("RECSYS_ALARM")
    if not command:
        return
    try:
        done = subprocess.run(
            shlex.split(command), input=f"{line}\n", text=True, capture_output=True, timeout=ALARM_SECONDS, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        log.error("RECSYS_ALARM could not be run: %s", error)
        return
    if done.returncode:
        log.error("RECSYS_ALARM ended with exit status %s: %s", done.returncode, done.stderr[-500:])
