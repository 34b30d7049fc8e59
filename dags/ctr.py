"""ctr: from the raw log to published scores and a report, for one day to score; every task is a `recsys` command line.

Airflow must run from the environment in which recsys is installed (`make setup`):

    source .venv/bin/activate
    export AIRFLOW__CORE__DAGS_FOLDER=<this folder> AIRFLOW__CORE__LOAD_EXAMPLES=False
    export RECSYS_HOME=<folder that run files and their paths are relative to; by default the one above this>
    airflow standalone
    airflow dags unpause ctr
    airflow dags trigger ctr --conf '{"day": "2026-03-07", "train_days": 4}'

The day decides the split: the one before it tests the new model, the one before that validates it, `train_days` before
those train it. `promote` is skipped where the gate refuses, or holds the model for a person; `score` then uses the
champion there is. Only started by hand yet: the form with a schedule, partition keys and assets is to come.
"""

import os
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Param, TriggerRule, chain

# This interpreter, since the scheduler's PATH may lack it; -P, so that no folder below `home` is taken for our code.
RECSYS = shlex.join([sys.executable, "-P", "-m", "pipelines.cli"])
NOT_PROMOTED = [99, 98]
"""Exit statuses of `promote` when the gate refuses, and when it holds the model for a person."""

# What a user gives reaches the shell only as the value of a quoted variable, never as part of the command.
GIVEN = {
    "RECSYS_CONFIG": "{{ params.config }}",
    "RECSYS_PARTITION": "day={{ params.day }}",
    "RECSYS_SPLIT": (
        "data.split={"
        'train="{{ macros.ds_add(params.day, -2 - params.train_days) }}..{{ macros.ds_add(params.day, -3) }}", '
        'valid="{{ macros.ds_add(params.day, -2) }}", '
        'test="{{ macros.ds_add(params.day, -1) }}"}'
    ),
}


def step(
    verb: str,
    options: str = "",
    *,
    limit: timedelta,
    skip: list[int] | None = None,
    rule: TriggerRule = TriggerRule.ALL_SUCCESS,
) -> BashOperator:
    """One verb of the command line."""
    return BashOperator(
        task_id=verb,
        bash_command=f'exec {RECSYS} {verb} --config "$RECSYS_CONFIG" --set "$RECSYS_SPLIT" {options}'.rstrip(),
        env=GIVEN,
        append_env=True,
        cwd="{{ params.home }}",
        skip_on_exit_code=skip,
        trigger_rule=rule,
        execution_timeout=limit,
        do_xcom_push=False,
    )


with DAG(
    dag_id="ctr",
    description="Features, training, promotion and scores of one day.",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    params={  # pyright: ignore[reportArgumentType]
        "day": Param(type="string", format="date", description="The day to score, e.g. 2026-03-07."),
        "train_days": Param(5, type="integer", minimum=1, description="How many days to train on."),
        "config": Param(
            "pipelines/runs/demo.toml", type="string", minLength=1, description="The run file, relative to home."
        ),
        "home": Param(
            os.environ.get("RECSYS_HOME") or str(Path(__file__).resolve().parents[1]),
            type="string",
            minLength=1,
            description="The working directory of every step.",
        ),
    },
    tags=["recsys"],
) as dag:
    chain(
        step("prepare", "--overwrite", limit=timedelta(hours=4)),
        step("train", limit=timedelta(hours=12)),
        step("evaluate", limit=timedelta(hours=2)),
        step("promote", limit=timedelta(hours=2), skip=NOT_PROMOTED),
        step(
            "score",
            '--partition "$RECSYS_PARTITION" --overwrite',
            limit=timedelta(hours=4),
            rule=TriggerRule.NONE_FAILED,
        ),
        step("report", limit=timedelta(hours=1)),
    )
