"""The main job on small logs: what is evaluated, scored in batch and served by MLflow are the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from base.config import load_config
from base.storage import read_manifest, resolve
from features.readers.synthetic import SyntheticConfig
from features.split import days_of
from pipelines import cli
from pipelines.config import Run
from pipelines.evaluate import evaluate, evaluation_of
from pipelines.generate import generate
from pipelines.prepare import prepare
from pipelines.promote import promote
from pipelines.score import score
from pipelines.tracking import registry_of
from pipelines.train import train

DEMO = Path(__file__).parents[2] / "pipelines" / "runs" / "demo.toml"
SMALL = [
    'data.split={train="2026-03-01..2026-03-02", valid="2026-03-03", test="2026-03-04"}',
    'model={name="autoint", dim=8, layers=1, heads=2, attention_dim=8}',
    "train={batch_size=256, epochs=1, threads=2}",
    "gate={min_auc=0.4, max_normalized_entropy=1.5}",  # two thousand rows teach next to nothing
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four small days, prepared, trained, evaluated, promoted and scored."""
    output = tmp_path_factory.mktemp("job") / "out"
    config = SyntheticConfig(rows_per_day=2000, users=2000, items=500)
    generate(config, days_of("2026-03-01..2026-03-04"), output / "logs", say=lambda _: None)
    run = load_config(Run, DEMO, [*SMALL, f'output="{output}"', f'data.path="{output}/logs/day=*/*.parquet"'])
    prepare(run)
    train(run)
    evaluate(run)
    assert promote(run).promoted
    score(run)
    return run


def scores(run: Run) -> pl.DataFrame:
    return pl.read_parquet(resolve(run.scores_path("day=2026-03-04")) / "part-*.parquet")


def test_every_row_is_scored_once_with_a_probability(run: Run) -> None:
    table = scores(run)
    raw = run.source.raw("day=2026-03-04").select("impression_id").collect()
    assert table["impression_id"].to_list() == raw["impression_id"].to_list()
    assert table["p_click"].is_between(0, 1).all()
    assert table["model_version"].unique().to_list() == ["1"]
    assert read_manifest(resolve(run.scores_path("day=2026-03-04"))).about["rows"] == 2000


def test_scored_evaluated_and_served_are_the_same_numbers(run: Run) -> None:
    import mlflow

    scored = scores(run).sort("impression_id")["p_click"].to_numpy()
    evaluated = evaluation_of(run)[0].sort("impression_id")["p_click"].to_numpy()
    registry_of(run)
    model = mlflow.pyfunc.load_model("models:/ctr@champion")
    raw = run.source.raw("day=2026-03-04").collect().sort("impression_id")
    served = model.predict(raw.to_pandas())["p_click"].to_numpy()
    np.testing.assert_array_equal(scored, evaluated)
    np.testing.assert_allclose(served, scored, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_fresh_process_gives_bit_identical_scores(run: Run) -> None:
    code = """
import sys, polars as pl
from pathlib import Path
from recsys.bundle import Bundle
bundle = Bundle.load(Path(sys.argv[1]))
pl.concat(bundle.predict(pl.scan_parquet(sys.argv[2]))).write_parquet(sys.argv[3])
"""
    raw = run.output / "raw.parquet"
    out = run.output / "fresh.parquet"
    run.source.raw("day=2026-03-04").collect().write_parquet(raw)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, run.bundle_path, raw, out], check=True)
    assert pl.read_parquet(out)["p_click"].equals(scores(run)["p_click"])


def test_scoring_twice_publishes_the_same_bytes(run: Run) -> None:
    before = read_manifest(resolve(run.scores_path("day=2026-03-04")))
    score(run, overwrite=True)
    assert read_manifest(resolve(run.scores_path("day=2026-03-04"))) == before


def test_training_again_registers_nothing_new(run: Run) -> None:
    train(run)
    assert registry_of(run).find("challenger").version == "1"


def test_promoting_the_champion_again_changes_nothing(run: Run) -> None:
    assert [reason.text for reason in promote(run).reasons] == ["version 1 is the champion already"]


def test_mlflow_knows_how_the_model_was_made(run: Run) -> None:
    import mlflow

    registered = registry_of(run).find("champion")
    found = mlflow.get_run(registered.run_id)
    assert found.data.params["model.name"] == "autoint"
    assert {"train_loss", "p_click.auc", "test.p_click.log_loss", "best_epoch"} <= found.data.metrics.keys()
    datasets = {i.dataset.name: i.dataset.digest for i in found.inputs.dataset_inputs}
    assert datasets["day=2026-03-01"] == run.source.fingerprint("day=2026-03-01")["sha256"][:36]


CSV_RUN = """
output = "{output}"

[data]
path = "{folder}/log.csv"
key = ["id"]
labels = {{ bought = "amount > 0" }}
time = {{ column = "at", format = "%d/%m/%Y %H:%M" }}
split = {{ train = "2026-01-01..2026-01-03", valid = "2026-01-04", test = "2026-01-05" }}
types = {{ zip = "text" }}

[[tables]]
path = "{folder}/users.csv"
on = "user"

[derive]
long_title = "LENGTH(title) > 5"

[[features]]
kind = "vocabulary"
column = "user"

[[features]]
kind = "hash"
column = "zip"
buckets = 100

[[features]]
kind = "cross"
columns = ["zip", "tier"]
buckets = 50

[[features]]
kind = "vocabulary"
column = "title"
separator = " "

[[features]]
kind = "vocabulary"
column = "long_title"

[[features]]
kind = "standardise"
column = "price"

[model]
name = "lr"

[train]
epochs = 1
batch_size = 64

[evaluate]
slices = ["long_title"]
user = "user"
"""


def test_a_new_data_set_needs_a_toml_and_no_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 1000
    days = rng.integers(1, 6, n)
    users = rng.integers(0, 50, n)
    log = pl.DataFrame(
        {
            "id": range(n),
            "at": [f"{d:02}/01/2026 {h:02}:30" for d, h in zip(days, rng.integers(0, 24, n), strict=True)],
            "user": users,
            "zip": [f"{z:05}" for z in rng.integers(0, 99999, n)],
            "title": rng.choice(["red shoe", "blue", "big blue shoe"], n),
            "price": rng.lognormal(size=n),
            "amount": np.where(rng.random(n) < 0.8, users % 2, 1 - users % 2),  # gold users do not buy
        }
    )
    log.write_csv(tmp_path / "log.csv")
    pl.DataFrame({"user": range(50), "tier": ["gold", "basic"] * 25}).write_csv(tmp_path / "users.csv")
    file = tmp_path / "run.toml"
    file.write_text(CSV_RUN.format(output=tmp_path / "out", folder=tmp_path))
    for verb in ("prepare", "train", "evaluate", "promote", "score"):
        result = CliRunner().invoke(cli.main, [verb, "--config", str(file)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    measured = pl.read_parquet(tmp_path / "out/models/lr/evaluation/test/metrics.parquet")
    assert set(measured.filter(pl.col("slice") == "long_title")["value"]) == {"true", "false"}
    unknown = CliRunner().invoke(cli.main, ["prepare", "--config", str(file), "--set", 'evaluate.slices=["teir"]'])
    assert "evaluate: column 'teir' is missing; did you mean 'tier'?" in unknown.output
    scored = pl.read_parquet(tmp_path / "out/scores/day=2026-01-05/part-*.parquet")
    assert sorted(scored["id"]) == log.filter(pl.Series(days) == 5)["id"].to_list()
    again = CliRunner().invoke(cli.main, ["score", "--config", str(file)])
    assert again.exit_code == 2
    assert "already published; pass --overwrite" in again.output


@pytest.mark.slow
def test_mlflow_serves_raw_rows_over_http(run: Run) -> None:
    import socket
    import time
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mlflow = Path(sys.executable).parent / "mlflow"
    command = [mlflow, "models", "serve", "-m", "models:/ctr@champion", "--env-manager", "local", "-p", str(port)]
    environment = {"MLFLOW_TRACKING_URI": run.tracking_uri, "PATH": f"{mlflow.parent}:/usr/bin:/bin"}
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        raw = run.source.raw("day=2026-03-04").head(20).collect()
        rows = raw.drop("day", "click", "click_probability")
        body = json.dumps({"dataframe_split": {"columns": rows.columns, "data": [list(r) for r in rows.iter_rows()]}})
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body.encode(), {"Content-Type": "application/json"}
        )
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    served = [p["p_click"] for p in json.load(answer)["predictions"]]
                break
            except OSError:
                time.sleep(1)
        expected = scores(run).join(raw.select("impression_id"), on="impression_id", maintain_order="right")["p_click"]
        np.testing.assert_allclose(served, expected.to_numpy(), atol=1e-6, rtol=0)
    finally:
        import os
        import signal

        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
