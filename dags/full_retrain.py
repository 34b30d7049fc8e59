"""full_retrain: once a week, features and a model from nothing on a window of days; the gate; then old artefacts go.

The run for a Sunday starts when that day is over; one that is started for a day still running waits for its end.
"""

from datetime import timedelta

from airflow.providers.standard.sensors.date_time import DateTimeSensor
from airflow.sdk import DAG, Param, TriggerRule, chain

from dags.steps import OBSERVED_DAYS, PATIENCE, Step, common, each, params, prepare, train

with DAG(
    dag_id="full_retrain",
    description="A full fit and a full training on a window of days, then the gate.",
    doc_md=__doc__,
    # The key is the Sunday that begins with the tick: an offset would count weeks.
    schedule=each("0 0 * * 0"),
    catchup=False,
    max_active_runs=1,
    params=params(keep=Param(14, type="integer", minimum=1, description="How many days of artefacts to keep.")),
    **common(hours=72),
) as dag:
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
    check = Step(
        task_id="check",
        verb="check",
        options='--partition "$RECSYS_PARTITION"',
        retries=PATIENCE,  # the gate needs the log of the day
        execution_timeout=timedelta(hours=1),
    )
    chain(over, check, plan)
    chain(encode, first)
    chain(report, clean)
