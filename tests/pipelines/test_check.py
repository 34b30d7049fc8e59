"""check: a day beside what the champion has seen, from the command line to MLflow and the report."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result
from mlflow.tracking import MlflowClient

from base.config import load_config
from base.storage import resolve
from features.profile import merge
from features.readers.synthetic import SyntheticConfig
from features.split import days_of
from pipelines import cli
from pipelines.check import check
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.prepare import prepare
from pipelines.profile import profile_of
from pipelines.promote import promote
from pipelines.report import report
from pipelines.score import score
from pipelines.tracking import registry_of
from pipelines.train import train
from recsys.bundle import Bundle

DEMO = Path(__file__).parents[2] / "pipelines" / "runs" / "demo.toml"
ROWS = 1500
DAY, LATER = "day=2026-03-04", "day=2026-03-05"


def settings(output: Path) -> list[str]:
    return [
        'data.split={train="2026-03-01..2026-03-02", valid="2026-03-03", test="2026-03-04"}',
        'model={name="lr"}',
        "train={batch_size=256, epochs=1, threads=2}",
        'evaluate={slices=["device"]}',
        "gate={max_normalized_entropy=1.5}",  # a model of so few rows is worse than the mean
        f'output="{output}"',
        f'data.path="{output}/logs/day=*/*.parquet"',
    ]


def command(run: Run, *arguments: str) -> Result:
    overrides = [word for setting in settings(run.output) for word in ("--set", setting)]
    return CliRunner().invoke(cli.main, ["check", "--config", str(DEMO), *overrides, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five small days; a challenger, and no champion yet."""
    output = tmp_path_factory.mktemp("check") / "out"
    config = SyntheticConfig(rows_per_day=ROWS, users=400, items=300)
    generate(config, days_of("2026-03-01..2026-03-05"), output / "logs", say=lambda _: None)
    run = load_config(Run, DEMO, settings(output))
    prepare(run, say=lambda _: None)
    train(run, say=lambda _: None)
    return run


@pytest.fixture(scope="module")
def run(trained: Run) -> Run:
    """With a champion, and the scores of a day by it."""
    before = command(trained, "--partition", DAY)
    assert before.exit_code == 0
    assert "no champion yet" in before.output
    evaluate(trained)
    assert promote(trained).promoted
    score(trained, say=lambda _: None)
    return trained


@pytest.fixture
def raw(run: Run) -> Iterator[Path]:
    """The raw file of a day, which a test may break."""
    file = resolve(run.output / "logs" / LATER) / "part-00000.parquet"
    shutil.copy(file, run.output / "sound.parquet")
    yield file
    shutil.copy(run.output / "sound.parquet", file)


def test_the_bundle_keeps_the_profile_of_its_rows(trained: Run) -> None:
    bundle = Bundle.load(trained.bundle_path)
    assert bundle.profile is not None
    training, held_out = bundle.profile.training, bundle.profile.held_out
    assert (training.rows, training.days, held_out.rows, held_out.days) == (2 * ROWS, 2, ROWS, 1)
    assert training.features.keys() == {t.output for t in trained.features}
    assert sum(held_out.scores["p_click"]) == ROWS
    # From examples and their manifests as from the raw rows.
    days = [profile_of(trained, bundle, bundle.profile, p) for p in trained.source.partitions("train")]
    assert merge(days) == training
    raw = pl.concat(trained.source.raw(p) for p in trained.source.partitions("train")).collect()
    assert training.missing["price"] == raw["price"].null_count() > 0
    assert training.positives["click"] == raw["click"].sum()


def test_a_bundle_without_a_profile_loads_and_has_nothing_to_compare(run: Run, tmp_path: Path) -> None:
    old = replace(Bundle.load(run.bundle_path), profile=None).save(tmp_path / "bundle")
    assert old.profile is None
    said: list[str] = []
    assert check(run, partition=DAY, model=str(tmp_path / "bundle"), say=said.append) == {}
    assert "keeps no profile" in said[0]


def test_a_quiet_day_passes_and_is_remembered(run: Run) -> None:
    done = command(run, "--partition", LATER)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert ["rows", "volume", "ok", "1,500", "1,500", "750", "to", "3,000"] in lines
    folder = resolve(run.checks_path(LATER), "check")
    found = {(f["name"], f["what"]): f for f in json.loads((folder / "findings.json").read_text())}
    assert {f["verdict"] for f in found.values()} == {"ok"}
    assert ("p_click", "score_psi") not in found  # it has no scores
    assert (folder / "findings.txt").read_text().strip() in done.output
    champion = registry_of(run).champion()
    assert champion is not None
    client = MlflowClient(run.tracking_uri)
    history = client.get_metric_history(champion.run_id, "drift.item_id.unknown")
    assert [(m.value, m.step) for m in history] == [(found[("item_id", "unknown")]["found"], 20260305)]
    logged = {a.path for a in client.list_artifacts(champion.run_id, f"drift/{LATER}")}
    assert f"drift/{LATER}/findings.txt" in logged


def test_scores_are_compared_where_the_same_bundle_made_them(run: Run, tmp_path: Path) -> None:
    found = check(run, say=lambda _: None)
    assert list(found) == [DAY]
    scores = [f for f in found[DAY] if f.what == "score_psi"]
    assert [(f.name, f.verdict) for f in scores] == [("p_click", "ok")]
    replace(Bundle.load(run.bundle_path), metrics={}).save(tmp_path / "bundle")
    found = check(run, model=str(tmp_path / "bundle"), say=lambda _: None)
    assert found[DAY]
    assert not [f for f in found[DAY] if f.what == "score_psi"]


def test_only_scores_of_rows_to_learn_from_are_compared(run: Run) -> None:
    bundle = Bundle.load(run.bundle_path)
    assert bundle.profile is not None
    data = run.data.model_copy(update={"where": "device = 'phone'"})
    some = profile_of(run.model_copy(update={"data": data}), bundle, bundle.profile, DAY)
    phones = run.source.raw(DAY).filter(pl.col("device") == "phone").collect().height
    assert sum(some.scores["p_click"]) == some.rows == phones


def test_a_day_that_must_not_be_scored_stops_and_is_remembered(run: Run, raw: Path) -> None:
    rows = pl.read_parquet(raw)
    rows.with_columns(click=pl.lit(0, pl.Int8), price=pl.col("price") * 100).write_parquet(raw)
    done = command(run, "--partition", LATER)
    assert done.exit_code == 2
    (last,) = done.stderr.splitlines()
    assert last.startswith("error: day=2026-03-05, click: label rate 0.00%")
    assert last.endswith("mend the log, or allow it in [checks]")
    assert "price" not in last  # a warning does not stop
    found = json.loads((resolve(run.checks_path(LATER)) / "findings.json").read_text())
    assert {f["name"]: f["verdict"] for f in found if f["verdict"] != "ok"} == {"click": "stop", "price": "warn"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop("price"), "column 'price' is missing"),
        (lambda rows: rows.with_columns(pl.col("item_id").cast(pl.String)), "column 'item_id' holds text, but held"),
        (lambda rows: rows.clear(), "has no rows"),
    ],
)
def test_a_day_that_cannot_be_read_is_refused_in_one_sentence(
    run: Run, raw: Path, change: Callable[[pl.DataFrame], pl.DataFrame], said: str
) -> None:
    change(pl.read_parquet(raw)).write_parquet(raw)
    done = command(run, "--partition", LATER)
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.splitlines()) == 1


def test_the_report_shows_drift(run: Run) -> None:
    page = report(run).read_text()
    assert f"Drift: {DAY} beside what the model has seen" in page
    assert "numbers compared, none of them beyond a threshold." in page
    assert page.count(">user_id</text>") >= 2  # in the figures of PSI and of unknown ids
    drawn = {p.name for p in (resolve(run.report_path) / "plots").iterdir()}
    assert {f"drift-{DAY}-{what}.svg" for what in ("psi", "unknown", "missing")} <= drawn
