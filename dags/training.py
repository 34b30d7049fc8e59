"""training: trains the model one day further when a day's features are published, and gates it against the champion."""

from datetime import timedelta

from airflow.sdk import DAG, IdentityMapper, PartitionedAssetTimetable

from dags.steps import FEATURES, common, params, train

with DAG(
    dag_id="training",
    description="Warm-started training, then the gate, after each day's features.",
    doc_md=__doc__,
    schedule=PartitionedAssetTimetable(assets=FEATURES, default_partition_mapper=IdentityMapper()),
    catchup=False,
    max_active_runs=1,
    params=params(),
    **common(hours=14),
) as dag:
    train(limit=timedelta(hours=48))  # it may wait for a full training to end
