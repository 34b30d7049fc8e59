"""full_retrain: once a week, features and a model from nothing on a window of days; the gate; then old artefacts go.

The run for a Sunday starts when that day is over; one that is started for a day still running waits for its end.
"""

from airflow.sdk import DAG

from dags.steps import KEEP, common, each, params, retrain

with DAG(
    dag_id="full_retrain",
    description="A full fit and a full training on a window of days, then the gate.",
    doc_md=__doc__,
    # The key is the Sunday that begins with the tick: an offset would count weeks.
    schedule=each("0 0 * * 0"),
    catchup=False,
    max_active_runs=1,
    params=params(keep=KEEP),
    **common(hours=72),
) as dag:
    retrain()
