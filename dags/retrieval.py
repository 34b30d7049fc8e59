"""retrieval, retrieval_full_retrain: the two-tower model of RECSYS_RETRIEVAL_CONFIG; without one, no DAG is here.

When a day's features of the ranking model are published, the logs up to that day are there: `retrieval` then makes its
own features of it, and takes its own model one day further. Once a week that one, too, is trained from nothing.
"""

from datetime import timedelta

from airflow.sdk import DAG, IdentityMapper, PartitionedAssetTimetable, chain

from dags.steps import (
    FEATURES,
    KEEP,
    NOTHING,
    RETRIES,
    RETRIEVAL_CONFIG,
    Step,
    check,
    common,
    each,
    params,
    retrain,
    train,
)

if RETRIEVAL_CONFIG:
    with DAG(
        dag_id="retrieval",
        description="Features, warm-started training and the gate of the two-tower model, after each day's features.",
        doc_md=__doc__,
        schedule=PartitionedAssetTimetable(assets=FEATURES, default_partition_mapper=IdentityMapper()),
        catchup=False,
        max_active_runs=1,  # so no step waits long for another day, which it would keep out
        params=params(RETRIEVAL_CONFIG),
        **common(hours=14),
    ):
        prepare = Step(
            task_id="prepare",
            verb="prepare",
            options='--day "$RECSYS_DAY"',
            skip={NOTHING},  # before the line that daily steps go on with
            execution_timeout=timedelta(hours=8),
        )
        first, _ = train(limit=timedelta(hours=48))
        chain(check(retries=RETRIES), prepare, first)

    with DAG(
        dag_id="retrieval_full_retrain",
        description="A full fit and a full training of the two-tower model, then the gate.",
        doc_md=__doc__,
        schedule=each("0 0 * * 0"),
        catchup=False,
        max_active_runs=1,
        params=params(RETRIEVAL_CONFIG, keep=KEEP),
        **common(hours=72),
    ):
        retrain()
