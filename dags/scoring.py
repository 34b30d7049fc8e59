"""scoring: the rows of one day, scored by the champion that there is.

The run for a day starts when the day begins, and waits for its rows. Scores that are published stay as they are,
unless the run is given `overwrite`.
"""

from datetime import timedelta

from airflow.sdk import DAG

from dags.steps import OVERWRITE, PATIENCE, SCORE, Step, common, each, params

with DAG(
    dag_id="scoring",
    description="Scores of one day by the champion.",
    doc_md=__doc__,
    schedule=each("0 0 * * *"),
    catchup=False,
    params=params(overwrite=OVERWRITE),
    **common(hours=8),
) as dag:
    Step(task_id="score", **SCORE, retries=PATIENCE, execution_timeout=timedelta(hours=4))
