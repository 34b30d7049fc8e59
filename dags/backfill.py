"""backfill: features, then scores, of a range of days; the partition key is the range, FIRST..LAST, both included.

Days are prepared in order, one at a time, since each extends the one before. Training follows by itself, on the asset,
and skips days that a later model has seen. Where there is a two-tower model, every day's users are recommended items.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, PartitionedAtRuntime, TriggerRule, chain, task

from dags.steps import (
    FEATURES,
    NOTHING,
    OVERWRITE,
    RECOMMEND,
    RETRIEVAL,
    RETRIEVAL_CONFIG,
    SCORE,
    Step,
    common,
    days_of,
    params,
)

with DAG(
    dag_id="backfill",
    description="Features and scores of a range of days.",
    doc_md=__doc__,
    schedule=PartitionedAtRuntime(),
    catchup=False,
    max_active_runs=1,
    params=params(overwrite=OVERWRITE, **RETRIEVAL),
    **common(hours=72),
) as dag:

    @task
    def days(partition_key: Any = None) -> list[str]:
        return days_of(partition_key)

    @task(outlets=[FEATURES], trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
    def published(days: Any, outlet_events: Any = None) -> None:
        outlet_events[FEATURES].add_partitions(days)

    every = days()
    prepared = Step.partial(
        task_id="prepare",
        verb="prepare",
        options='--day "$RECSYS_DAY"',
        skip={NOTHING},  # before the line that daily steps go on with
        execution_timeout=timedelta(hours=8),
        max_active_tis_per_dagrun=1,
        map_index_template="{{ task.day }}",
    ).expand(day=every)
    mapped: dict[str, Any] = {
        "trigger_rule": TriggerRule.NONE_FAILED,
        "execution_timeout": timedelta(hours=4),
        "map_index_template": "{{ task.day }}",
    }
    scored = Step.partial(task_id="score", **SCORE, **mapped).expand(day=every)
    chain(prepared, [published(every), scored])
    if RETRIEVAL_CONFIG:
        chain(prepared, Step.partial(task_id="recommend", **RECOMMEND, **mapped).expand(day=every))
