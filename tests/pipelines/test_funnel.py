"""A funnel from log to scores: prepared, trained on a sample, calibrated, measured by space, served; or refused."""

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import polars as pl
import pytest

from base.config import parse_config
from base.errors import ConfigError, DataError, PublishedError
from base.storage import read_manifest, resolve
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines.config import Run
from pipelines.evaluate import evaluate, evaluation_of
from pipelines.measure import measure, scored_table
from pipelines.prepare import prepare
from pipelines.promote import promote
from pipelines.report import report
from pipelines.score import score
from pipelines.tracking import registry_of
from pipelines.train import train
from recsys import metrics
from recsys.bundle import Bundle, log_odds_of
from recsys.calibration import Isotonic, Platt, calibrated

ROWS = 2500
OUTPUTS = ("p_click", "p_conversion_given_click", "p_click_and_conversion")
FEATURES = (
    *({"kind": "vocabulary", "column": c} for c in ("device", "category", "country", "placement")),
    {"kind": "hash", "column": "item_id", "buckets": 50},
    {"kind": "log", "column": "price"},
)
ESMM = {"name": "esmm", "dim": 4, "tower": {"kind": "mlp", "hidden": [8]}}
TRUTH = {
    "p_click": "click_probability",
    "p_conversion_given_click": "conversion_probability",
    "p_click_and_conversion": "click_and_conversion_probability",
}

ENTIRE = {"label": "would_convert", "truth": "conversion_probability"}


def tree_of(folder: Path, output: str = "out", **data: Any) -> dict[str, Any]:
    """Two days to train on, one to choose by, one to calibrate on, two to test on: the last is not mature."""
    return {
        "output": folder / output,
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["impression_id"],
            "labels": ["click", "conversion"],
            "funnel": ["click", "conversion"],
            "time": "day",
            "matures_after_days": {"conversion": 1},
            "observed_until": "2026-03-06",
            "split": {"train": "2026-03-01..2026-03-02", "valid": "2026-03-03", "test": "2026-03-05..2026-03-06"},
            **data,
        },
        "features": FEATURES,
        "model": ESMM,
        "train": {"batch_size": 250, "epochs": 2, "threads": 1},
        "mlflow": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }


def run_of(tree: dict[str, Any], **changes: Any) -> Run:
    return parse_config(Run, {**tree, **changes}, source="test")


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("funnel")
    config = SyntheticConfig(
        rows_per_day=ROWS,
        users=500,
        items=200,
        click_rate=0.3,
        conversion_rate=0.3,
        conversion_delay_days=0.5,
        observed_until=date(2026, 3, 6),
    )
    for i in range(6):
        day = config.start + timedelta(days=i)
        (folder / f"log/day={day}").mkdir(parents=True)
        day_frame(config, day).drop("day").write_parquet(folder / f"log/day={day}/part.parquet")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """ESMM on four non-clicks in ten, calibrated on a day of its own, evaluated, promoted and scored."""
    run = run_of(
        tree_of(folder),
        sampling={"negative_rate": 0.4},
        calibrate={"method": "platt", "partition": "day=2026-03-04"},
        evaluate={
            "slices": ["device"],
            "truth": TRUTH,
            "entire_space": {"p_conversion_given_click": ENTIRE},
            "pairs": [["device", "category"]],
        },
    )
    prepare(run, say=quiet)
    train(run, say=quiet)
    evaluate(run)
    assert promote(run).promoted
    score(run, say=quiet)
    return run


# Spaces


def test_every_output_is_measured_in_its_own_space_and_where_it_is_known(run: Run) -> None:
    scored, table, _ = evaluation_of(run)
    whole = table.filter(pl.col("slice") == "all")
    found = {(r["output"], r["space"]): (r["rows"], r["positives"]) for r in whole.iter_rows(named=True)}
    raw = pl.concat([run.source.raw(p).collect() for p in run.source.partitions("test")])
    mature = raw.filter(pl.col("day") == date(2026, 3, 5))
    clicked = mature.filter(pl.col("click") == 1)
    assert raw["conversion"].sum() > mature["conversion"].sum()  # some came early on the last day, and do not count
    counts = {
        ("p_click", "all impressions"): (2 * ROWS, raw["click"].sum()),
        ("p_conversion_given_click", "rows with click"): (clicked.height, clicked["conversion"].sum()),
        ("p_click_and_conversion", "all impressions"): (ROWS, mature["conversion"].sum()),
        ("p_conversion_given_click", "all impressions"): (2 * ROWS, raw["would_convert"].sum()),
    }
    truth = {(TRUTH[output], space): count for (output, space), count in counts.items()}
    assert found == counts | truth
    assert scored["conversion"].null_count() == ROWS
    floors = {(r["output"], r["space"]): r["log_loss"] for r in whole.iter_rows(named=True)}
    assert all(floors[output, space] > floors[TRUTH[output], space] for output, space in counts)
    slices = table.filter(pl.col("slice") == "device").group_by("output", "space").agg(pl.col("rows").sum())
    assert {(o, s): n for o, s, n in slices.iter_rows()} == {key: rows for key, (rows, _) in found.items()}


def test_a_conditional_metric_has_its_space_in_its_name(run: Run) -> None:
    logged = mlflow.get_run(registry_of(run).find("champion").run_id).data.metrics
    table = evaluation_of(run)[1]
    for name, output, space in (
        ("test.p_click", "p_click", "all impressions"),
        ("test.p_click_and_conversion", "p_click_and_conversion", "all impressions"),
        ("test.p_conversion_given_click.rows_with_click", "p_conversion_given_click", "rows with click"),
        ("test.p_conversion_given_click.all_impressions", "p_conversion_given_click", "all impressions"),
    ):
        found = metrics.headline(table, output, space)
        assert {m: logged[f"{name}.{m}"] for m in found} == pytest.approx(found)
    of_test = {key.rpartition(".")[0] for key in logged if key.startswith("test.")}
    assert len(of_test) == 4
    assert "p_conversion_given_click.auc" in logged  # while training: of the validation rows, on clicks


def test_one_day_may_be_measured_alone(run: Run) -> None:
    table = evaluate(run, partition="day=2026-03-06")  # of which no conversion is known
    assert metrics.headline(table, "p_click")["rows"] == ROWS
    for output in OUTPUTS[1:]:
        assert metrics.headline(table, output)["rows"] == 0
    page = report(run, partition="day=2026-03-06").read_text()
    assert page.count("Nothing can be measured on ") == 2
    assert "Nothing can be measured on rows with click: conversion is not known there yet" in page
    logged = mlflow.get_run(registry_of(run).find("champion").run_id).data.metrics
    assert logged["day_2026-03-06.p_conversion_given_click.rows_with_click.rows"] == 0
    assert logged["day_2026-03-06.p_conversion_given_click.all_impressions.rows"] == ROWS


def test_the_report_speaks_of_spaces(run: Run) -> None:
    page = report(run).read_text()
    for output, on in zip(OUTPUTS, ("all impressions", "rows with click", "all impressions"), strict=True):
        assert f"Quality of {output}" in page
        assert on in page
    assert page.count("Quality of p_conversion_given_click") == 2


# Sampling and calibration


def test_the_bundle_is_calibrated_on_the_day_asked_for(run: Run) -> None:
    bundle = Bundle.load(run.bundle_path)
    assert set(bundle.calibrators) == set(OUTPUTS)
    assert all(isinstance(c, Platt) for c in bundle.calibrators.values())
    assert bundle.schema.negative_rate == 0.4
    scored = scored_table(run, bundle, ["day=2026-03-04"])
    for output in bundle.outputs:
        rows = scored.filter(metrics.in_space(scored, output))
        ratio = metrics.calibration_ratio(rows[output.label], rows[output.name])
        assert ratio == pytest.approx(1, abs=0.005), output.name  # Platt's intercept makes the sums equal
    uncalibrated = Bundle(**{**vars(bundle), "calibrators": {}})
    plain = scored_table(run, uncalibrated, ["day=2026-03-04"], log_odds=True)
    for name in OUTPUTS:
        p, odds = plain[name].to_numpy(), plain[log_odds_of(name)].to_numpy()
        np.testing.assert_array_equal(calibrated(bundle.calibrators[name], p, odds), scored[name])
    ratio = metrics.calibration_ratio(plain["click"], plain["p_click"])
    assert ratio == pytest.approx(1, abs=0.15)  # sampling is undone before; as sampled it would be
    p = plain["p_click"].to_numpy().astype(float)
    assert (p / (p + 0.4 * (1 - p))).sum() / plain["click"].sum() > 1.5


def test_scored_evaluated_and_served_are_the_same_calibrated_numbers(run: Run) -> None:
    parts = [pl.read_parquet(resolve(run.scores_path(p)) / "part-*.parquet") for p in run.source.partitions("test")]
    scores = pl.concat(parts).sort("impression_id")
    evaluated = evaluation_of(run)[0].sort("impression_id")
    registry_of(run)
    model = mlflow.pyfunc.load_model("models:/ctr@champion")
    raw = pl.concat([run.source.raw(p).collect() for p in run.source.partitions("test")]).sort("impression_id")
    served = model.predict(raw.to_pandas())
    assert list(served.columns) == list(OUTPUTS)
    for name in OUTPUTS:
        np.testing.assert_array_equal(scores[name], evaluated[name])
        np.testing.assert_allclose(served[name], scores[name], atol=1e-6, rtol=0)


def test_only_the_outputs_asked_for_are_calibrated_by_default_on_the_validation_rows(run: Run, folder: Path) -> None:
    """Training is done; only what comes after it is done again."""
    tree = run.model_dump(mode="json")
    again = run_of(tree, calibrate={"method": "isotonic", "outputs": ["p_click"]})
    trained = train(again, say=quiet)
    assert trained.rows_per_second == 0
    bundle = Bundle.load(again.bundle_path)
    assert list(bundle.calibrators) == ["p_click"]
    made = bundle.calibrators["p_click"]
    assert isinstance(made, Isotonic)
    scored = scored_table(again, bundle, ["day=2026-03-03"])
    assert metrics.calibration_ratio(scored["click"], scored["p_click"]) == pytest.approx(1, abs=0.03)
    verdict = promote(again, partition="day=2026-03-06")  # of which no conversion is known: nobody can tell
    assert not verdict.promoted
    assert {r.text.partition(":")[0] for r in verdict.reasons if "there are no rows to measure" in r.text} == set(
        OUTPUTS[1:]
    )
    train(run_of(tree, calibrate=None), say=quiet)
    assert Bundle.load(run.bundle_path).calibrators == {}
    train(run, say=quiet)


# What is refused of a trained run


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        ({"partition": "day=2026-03-02"}, "calibrate.partition = 'day=2026-03-02' is a train partition: calibrate on"),
        ({"partition": "day=2026-03-05"}, "calibrate.partition = 'day=2026-03-05' is a test partition: calibrate on"),
        (
            {"outputs": ["p_click", "p_conversion_if_click"]},
            "calibrate.outputs: 'p_conversion_if_click' is no output of esmm; did you mean 'p_conversion_given_click'?",
        ),
    ],
)
def test_calibrating_on_what_it_may_not(run: Run, calibrate: dict[str, Any], message: str) -> None:
    wrong = run_of(run.model_dump(mode="json"), calibrate={"method": "platt", **calibrate})
    before = resolve(run.bundle_path)
    with pytest.raises(ConfigError) as caught:
        train(wrong, say=quiet)
    assert str(caught.value).startswith(message)
    assert resolve(run.bundle_path) == before


def test_calibrating_on_a_day_of_which_nothing_is_known(run: Run) -> None:
    split = {"train": "2026-03-01..2026-03-02", "valid": "2026-03-03", "test": "2026-03-05"}
    tree = run.model_dump(mode="json")
    tree["data"]["split"] = split
    wrong = run_of(tree, calibrate={"method": "platt", "partition": "day=2026-03-06"})
    with pytest.raises(DataError) as caught:
        train(wrong, say=quiet)
    assert str(caught.value) == (
        "output 'p_conversion_given_click' cannot be calibrated on 0 rows of which 0 are positive: "
        "set calibrate.partition to a day with both, or leave the output out of calibrate.outputs"
    )


@pytest.mark.parametrize("setting", ["truth", "entire_space"])
def test_settings_for_an_output_that_the_model_does_not_give(run: Run, setting: str) -> None:
    """Told by every verb that comes before or reads them."""
    for name, hint in (
        ("p_clik", "; did you mean 'p_click'?"),
        ("conversion_given_click", "; did you mean 'p_conversion_given_click'?"),
        ("zzz", f"; the outputs are {', '.join(OUTPUTS)}"),
    ):
        wrong = run_of(run.model_dump(mode="json"), evaluate={setting: {name: "would_convert"}})
        before = resolve(run.evaluation_path("test"))
        for verb in (lambda w: prepare(w, say=quiet), lambda w: train(w, say=quiet), evaluate):
            with pytest.raises(ConfigError) as caught:
                verb(wrong)
            assert str(caught.value) == f"evaluate.{setting}: {name!r} is no output of esmm{hint}"
        assert resolve(run.evaluation_path("test")) == before


def test_the_entire_space_is_of_conditional_probabilities(run: Run) -> None:
    wrong = run_of(run.model_dump(mode="json"), evaluate={"entire_space": {"p_click": "click"}})
    with pytest.raises(ConfigError, match=r"evaluate\.entire_space: 'p_click' speaks of all impressions already"):
        evaluate(wrong)


def test_the_entire_space_may_be_without_its_truth(run: Run) -> None:
    """Truth given a click and truth on all impressions are two columns; either may be missing."""
    tree = run.model_dump(mode="json")
    short, long = (
        run_of(tree, evaluate={"truth": TRUTH, "entire_space": {OUTPUTS[1]: entire}})
        for entire in ("would_convert", {"label": "would_convert"})
    )
    assert short == long
    scored = evaluation_of(run)[0]
    table = measure(short, Bundle.load(run.bundle_path).outputs, scored)
    spaces = table.filter(pl.col("output") == TRUTH[OUTPUTS[1]])["space"].to_list()
    assert spaces == ["rows with click"]
    only = run_of(tree, evaluate={"entire_space": {OUTPUTS[1]: ENTIRE}})
    table = measure(only, Bundle.load(run.bundle_path).outputs, scored)
    assert table.filter(pl.col("output") == TRUTH[OUTPUTS[1]])["space"].to_list() == ["all impressions"]
    assert set(only.evaluate.columns) == {"would_convert", "conversion_probability"}


# Preparing


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Callable[..., tuple[Run, list[str]]]:
    """Prepares the same log into one folder with other settings of [data]; returns what was said."""

    def prepared(*, overwrite: bool = False, **data: Any) -> tuple[Run, list[str]]:
        said: list[str] = []
        tree = tree_of(folder, **data) | {"output": tmp_path / "out"}
        run = run_of(tree)
        prepare(run, overwrite=overwrite, say=said.append)
        return run, said

    return prepared


def examples(run: Run, day: int) -> pl.DataFrame:
    return pl.read_parquet(resolve(run.examples_path(f"day=2026-03-0{day}")) / "part-*.parquet")


def test_labels_not_known_yet_are_counted_and_kept_as_null(prepared: Callable[..., tuple[Run, list[str]]]) -> None:
    run, said = prepared(
        observed_until="2026-03-04", split={"train": "2026-03-01..2026-03-02", "valid": "2026-03-03..2026-03-04"}
    )
    assert f"day=2026-03-02: {ROWS:,} examples" in said
    assert f"day=2026-03-04: {ROWS:,} examples; conversion not known yet of {ROWS:,}" in said
    for day in (1, 2, 3, 4):
        found = examples(run, day)
        assert found["@conversion"].null_count() == (ROWS if day == 4 else 0)
        assert found["@click"].null_count() == 0


@pytest.mark.parametrize(("until", "role"), [("2026-03-01", "train"), ("2026-03-03", "valid")])
def test_a_label_that_is_known_of_no_row_is_refused_before_training(
    prepared: Callable[..., tuple[Run, list[str]]], tmp_path: Path, until: str, role: str
) -> None:
    with pytest.raises(DataError) as caught:
        prepared(observed_until=until)
    assert str(caught.value) == (
        f"label 'conversion' is not known of any {role} row by {until}, where it matures after 1 days: "
        f"let data.split.{role} end earlier"
    )
    assert not (tmp_path / "out").exists()


def test_skipped_steps_are_counted_and_too_many_refused(prepared: Callable[..., tuple[Run, list[str]]]) -> None:
    """The log's conversions, asked of the non-clicks: nobody is left who clicked before."""
    reason = "label conversion is 1 where click, before it in data.funnel, is 0"
    labels = {"click": "click = 1 AND item_id > 2", "conversion": "conversion"}
    with pytest.raises(DataError, match=rf"rows are bad, .* is allowed: \d+ x {reason}\. Mend the log"):
        prepared(labels=labels, max_bad_share=0.001)
    run, said = prepared(labels=labels, max_bad_share=0.5)
    about = read_manifest(resolve(run.examples_path("day=2026-03-01"))).about
    raw = run.source.raw("day=2026-03-01").collect()
    skipped = raw.filter((pl.col("conversion") == 1) & (pl.col("item_id") <= 2)).height
    assert about["bad"] == {reason: skipped}
    assert skipped > 10
    assert any(f"; set aside {skipped} x {reason}" in line for line in said)


CHANGES: dict[str, dict[str, Any]] = {
    "label": {"labels": {"click": "click", "conversion": "conversion = 1 AND hour > 11"}},
    "where": {"where": "hour > 3"},
    "maturity": {"matures_after_days": {"conversion": 3}, "observed_until": "2026-03-06"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_labels_rows_or_maturity_never_keep_the_old_examples(
    prepared: Callable[..., tuple[Run, list[str]]], name: str
) -> None:
    """Without --overwrite it is refused and nothing changes; with it everything is made anew."""
    run, _ = prepared()
    before = {p: resolve(p) for p in (run.features_path, *(run.examples_path(f"day=2026-03-0{d}") for d in (1, 2, 3)))}
    old = examples(run, 1)
    with pytest.raises(PublishedError, match=f"{run.features_path}: already published; pass --overwrite"):
        prepared(**CHANGES[name])
    assert {p: resolve(p) for p in before} == before
    _, said = prepared(**CHANGES[name], overwrite=True)
    assert not any("already" in line for line in said)
    new = examples(run, 1)
    match name:
        case "label":
            assert (new["@conversion"] <= old["@conversion"]).all()
            assert 0 < new["@conversion"].sum() < old["@conversion"].sum()
        case "where":
            assert 0 < new.height < old.height
        case _:
            assert new.equals(old)  # as it happens: all three days were known before, and are now
    assert all("already" in line for line in prepared(**CHANGES[name])[1])


@pytest.mark.parametrize("name", CHANGES)
def test_training_refuses_examples_of_other_labels_rows_or_maturity(
    prepared: Callable[..., tuple[Run, list[str]]], tmp_path: Path, name: str
) -> None:
    run, _ = prepared()
    other = run_of(run.model_dump(mode="json") | {"data": tree_of(tmp_path, **CHANGES[name])["data"]})
    other = other.model_copy(update={"data": other.data.model_copy(update={"path": run.data.path})})
    with pytest.raises(
        DataError, match=r"made with other \[data\], .* settings, so its rows or labels may differ; run"
    ):
        train(other, say=quiet)
    assert not run.folder.exists()


def test_a_later_look_at_the_log_makes_only_the_days_anew_that_matured(
    prepared: Callable[..., tuple[Run, list[str]]],
) -> None:
    split = {"train": "2026-03-01..2026-03-02", "valid": "2026-03-03..2026-03-04"}
    run, _ = prepared(observed_until="2026-03-04", split=split)
    assert all("already" in line for line in prepared(observed_until="2026-03-04", split=split)[1])
    with pytest.raises(PublishedError, match="day=2026-03-04: already published; pass --overwrite"):
        prepared(observed_until="2026-03-05", split=split)
    said = prepared(observed_until="2026-03-05", split=split, overwrite=True)[1]
    assert [line.split(":")[0] for line in said if "already" not in line] == ["day=2026-03-04"]
    assert examples(run, 4)["@conversion"].null_count() == 0
    assert all("already" in line for line in prepared(observed_until="2026-03-06", split=split)[1])


# What a run file may say


def refusal(folder: Path, **changes: Any) -> str:
    data = changes.pop("data", {})
    with pytest.raises(ConfigError) as caught:
        run_of(tree_of(folder, **data), **changes)
    return str(caught.value)


ALONE = {"labels": ["click"], "funnel": [], "matures_after_days": {}}
APART = {"labels": ["click", "conversion"], "funnel": []}
THREE = {"labels": {"click": "click", "conversion": "conversion", "cheap": "price < 4"}}


@pytest.mark.parametrize("name", ["base", "division", "esmm", "escm2", "nise"])
@pytest.mark.parametrize("data", [ALONE, APART, THREE], ids=["one label", "no funnel", "three labels"])
def test_a_funnel_model_needs_a_funnel_of_two(folder: Path, name: str, data: dict[str, Any]) -> None:
    assert refusal(folder, data=data, model={"name": name}).startswith(
        f'model.name = "{name}" needs two labels in a funnel, as data.funnel = ["click", "conversion"]; data.labels '
    )


@pytest.mark.parametrize("rate", [0, -0.1, 1.5])
def test_a_rate_that_is_no_share_is_refused(folder: Path, rate: float) -> None:
    assert f"sampling.negative_rate = {rate}" in refusal(folder, sampling={"negative_rate": rate})


@pytest.mark.parametrize("data", [APART, THREE], ids=["no funnel", "a label outside the funnel"])
def test_several_labels_can_be_sampled_only_as_a_funnel(folder: Path, data: dict[str, Any]) -> None:
    message = refusal(folder, data=data, model={"name": "multitask"}, sampling={"negative_rate": 0.1})
    assert message.startswith(
        "sampling.negative_rate = 0.1: scores can be corrected for one label, or for a funnel of all of them; "
    )
    for fine in ({}, ALONE):
        made = run_of(tree_of(folder, **fine), model={"name": "multitask"}, sampling={"negative_rate": 0.1})
        assert made.sampling.negative_rate == 0.1
    assert run_of(tree_of(folder, **data), model={"name": "multitask"}).sampling.negative_rate == 1


def test_calibration_needs_a_method_that_exists(folder: Path) -> None:
    assert "calibrate.method is missing" in refusal(folder, calibrate={"partition": "day=2026-03-04"})
    assert "calibrate.method = 'beta'" in refusal(folder, calibrate={"method": "beta"})


def test_funnel_settings_that_cannot_be_meant_name_the_file(folder: Path) -> None:
    assert refusal(folder, data={"funnel": ["click", "convrsion"]}).startswith(
        "test: data: funnel names 'convrsion', which is none of the labels ['click', 'conversion']"
    )
