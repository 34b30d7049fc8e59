"""retrieval, retrieval_full_retrain: the two-tower model of RECSYS_RETRIEVAL_CONFIG; without one, no DAG is here.

When a day's features of the ranking model are published, its log is there and sound: `retrieval` then makes its own
features of that day, and takes its own model one day further. Once a week that one, too, is trained from nothing.
"""

from datetime import timedelta

from airflow.sdk import DAG, IdentityMapper, PartitionedAssetTimetable, chain

from dags.steps import FEATURES, KEEP, RETRIEVAL_CONFIG, check, common, each, params, prepare, retrain, train

if RETRIEVAL_CONFIG:
    with DAG(
        dag_id="retrieval",
        description="Features, warm-started training and the gate of the two-tower model, after each day's features.",
        doc_md=__doc__,
        schedule=PartitionedAssetTimetable(assets=FEATURES, default_partition_mapper=IdentityMapper()),
        catchup=False,
        max_active_runs=1,
        params=params(RETRIEVAL_CONFIG),
        **common(hours=14),
    ):
        plan, encode = prepare()
        first, _ = train(limit=timedelta(hours=48))
        chain(check(), plan)
        chain(encode, first)

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
