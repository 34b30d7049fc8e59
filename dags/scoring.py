"""scoring: the rows of one day, scored by the champion that there is; and what its users are recommended.

The run for a day starts when the day begins, and waits for its rows. What is published stays as it is, unless the run
is given `overwrite`. Items are recommended where RECSYS_RETRIEVAL_CONFIG names a two-tower model.
"""

from datetime import timedelta

from airflow.sdk import DAG, chain

from dags.steps import (
    INDEX,
    OVERWRITE,
    PATIENCE,
    RECOMMEND,
    RETRIEVAL,
    RETRIEVAL_CONFIG,
    SCORE,
    Step,
    common,
    each,
    params,
)

with DAG(
    dag_id="scoring",
    description="Scores and recommendations of one day by the champions.",
    doc_md=__doc__,
    schedule=each("0 0 * * *"),
    catchup=False,
    params=params(overwrite=OVERWRITE, **RETRIEVAL),
    **common(hours=8),
) as dag:
    Step(task_id="score", **SCORE, retries=PATIENCE, execution_timeout=timedelta(hours=4))
    if RETRIEVAL_CONFIG:
        index = Step(task_id="index", **INDEX, retries=PATIENCE, execution_timeout=timedelta(hours=4))
        recommend = Step(task_id="recommend", **RECOMMEND, retries=PATIENCE, execution_timeout=timedelta(hours=4))
        chain(index, recommend)
