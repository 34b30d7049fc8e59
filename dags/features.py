"""features: checks, features and examples of one day, by a map over the partitions of the raw log.

The run for a day starts when the day is over, and waits for its log. With RECSYS_START none is left out:
after a stop, all days since the last one follow.
"""

from datetime import timedelta

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, TriggerRule, chain

from dags.steps import FEATURES, OBSERVED_DAYS, START, check, common, each, params, prepare

with DAG(
    dag_id="features",
    description="Features and examples of one day, as a partition of the asset recsys_features.",
    doc_md=__doc__,
    schedule=each("0 0 * * *", offset=-1 - OBSERVED_DAYS),
    catchup=START is not None,
    max_active_runs=8,  # more than one: a day that waits for the day before it must not keep that one out
    params=params(),
    **common(hours=10, lag=timedelta(days=1 + OBSERVED_DAYS)),
) as dag:
    plan, encode = prepare()
    published = EmptyOperator(task_id="published", outlets=[FEATURES], trigger_rule=TriggerRule.NONE_FAILED)
    chain(check(), plan)
    chain(encode, published)
