"""Logs, examples and settings as they arrive at two in the morning: refused with name, value and remedy, or counted.

The verbs are called as the command line calls them; nothing that is refused leaves anything behind.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from base.errors import ArtefactError, ConfigError, DataError, IdError, PublishedError, RegistryError, UserError
from base.storage import publish, read_manifest, resolve, verify
from features.pipeline import FittedPipeline
from features.schema import Sparse
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.prepare import prepare
from pipelines.score import score
from pipelines.train import train
from recsys.data import ExampleStream, IdCount, check_ids
from serving.score import publish_scores
from tests.faults.conftest import ROWS, Platform

TRAIN, VALID, TEST = "2026-03-01", "2026-03-02", "2026-03-03"
Change = Callable[[pl.DataFrame], pl.DataFrame]


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture
def altered(platform: Platform, tmp_path: Path) -> Callable[..., Run]:
    """A run over the same log, with one day changed."""

    def altered(change: Change, day: str = TRAIN, **settings: str) -> Run:
        for name in (TRAIN, VALID, TEST):
            table = pl.read_parquet(platform.logs / f"day={name}" / "*.parquet")
            folder = tmp_path / "logs" / f"day={name}"
            folder.mkdir(parents=True)
            (change(table) if name == day else table).write_parquet(folder / "part.parquet")
        path = f"'{tmp_path}/logs/day=*/*.parquet'"
        return platform.at(tmp_path / "out", data__path=path, **settings)

    return altered


def refusal(kind: type[UserError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def some(column: str, value: object, *, rows: int) -> Change:
    """Puts `value` into the first rows of a column."""
    return lambda t: t.with_columns(
        pl.when(pl.int_range(pl.len()) < rows).then(pl.lit(value)).otherwise(column).cast(t[column].dtype).alias(column)
    )


# Columns


@pytest.mark.parametrize("day", [TRAIN, VALID])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("age"), "features: column 'age' is missing"),
        (lambda t: t.rename({"user_id": "userid"}), "features: column 'user_id' is missing; did you mean 'userid'?"),
        (lambda t: t.drop("impression_id"), "data.key: column 'impression_id' is missing"),
        (lambda t: t.drop("click"), "data.labels.click: column 'click' is missing"),
        (
            lambda t: t.with_columns(pl.col("age").cast(pl.String)),
            "column 'age' holds text; feature 'age' (quantiles) takes integer, float, boolean: convert it in the log",
        ),
        (
            lambda t: t.with_columns(pl.col("item_id").cast(pl.Float64)),
            "column 'item_id' holds float; feature 'item_id' (hash) takes integer, text, boolean, date: "
            "ids must not pass through float (they lose digits): store it as integer or text",
        ),
        (
            lambda t: t.with_columns(pl.concat_list("user_id")),
            "column 'user_id' holds texts; feature 'user_id' (vocabulary) takes integer, text, boolean, date: "
            "set multi = true for list columns",
        ),
        (
            lambda t: t.with_columns(pl.col("click").cast(pl.String)),
            "label 'click' holds text; it must be 0 or 1: give it as a SQL expression",
        ),
    ],
    ids=["missing", "renamed", "no key", "no label", "text", "float id", "list", "text label"],
)
def test_a_column_that_cannot_be_used(altered: Callable[..., Run], day: str, change: Change, message: str) -> None:
    run = altered(change, day)
    assert refusal(DataError, lambda: prepare(run, say=quiet)).startswith(message)
    assert not run.output.exists()


def test_a_column_that_changed_between_training_and_validation(altered: Callable[..., Run]) -> None:
    run = altered(lambda t: t.with_columns(pl.col("item_id").cast(pl.String)), VALID)
    assert refusal(DataError, lambda: prepare(run, say=quiet)) == (
        "column 'item_id' holds text, but held integer when features were fitted: "
        "convert it back, or fit the features again"
    )
    assert not run.examples_path(f"day={VALID}").exists()
    assert [p for p in files(run.output) if ".staging" in p or ".link" in p] == []


def test_a_day_that_is_not_asked_for_is_not_looked_at(altered: Callable[..., Run]) -> None:
    prepare(altered(lambda t: t.drop("age", "click"), TEST), say=quiet)


@pytest.mark.parametrize("dtype", [pl.Int32, pl.UInt64, pl.Int8])
def test_another_width_of_integer_is_the_same(platform: Platform, altered: Callable[..., Run], dtype: type) -> None:
    run = altered(lambda t: t.with_columns(pl.col("hour", "age").cast(dtype), pl.col("item_id").cast(pl.Int32)))
    assert prepare(run, say=quiet).version == FittedPipeline.load(resolve(platform.run.features_path)).version


def test_other_columns_may_come_and_go(platform: Platform, altered: Callable[..., Run]) -> None:
    run = altered(lambda t: t.drop("country").with_columns(news=1).select(reversed(t.drop("country").columns)))
    fitted = prepare(run, say=quiet)
    assert fitted.version == FittedPipeline.load(resolve(platform.run.features_path)).version


# Rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (some("click", 2, rows=1500), "1500 x label click is 2.0, not 0 or 1"),
        (some("click", None, rows=1500), "1500 x label click is null"),
        (some("impression_id", None, rows=1500), "1500 x key impression_id is null"),
        (lambda t: pl.concat([t.head(1500), t.head(1500)]), "1500 x key impression_id is repeated"),
        (
            lambda t: some("click", float("nan"), rows=1500)(t.with_columns(pl.col("click").cast(pl.Float64))),
            "1500 x label click is NaN, not 0 or 1",
        ),
    ],
    ids=["two", "null", "null key", "repeated key", "NaN"],
)
def test_too_many_bad_rows_are_refused(altered: Callable[..., Run], change: Change, reason: str) -> None:
    run = altered(change)
    assert refusal(DataError, lambda: prepare(run, say=quiet)) == (
        f"day={TRAIN}: 1500 of 3000 rows are bad, 50.00% where 1.00% is allowed: {reason}. "
        "Mend the log, or raise data.max_bad_share to set them aside"
    )
    assert not run.output.exists()


@pytest.mark.parametrize("day", [TRAIN, VALID])
def test_a_few_bad_rows_are_counted_and_set_aside(altered: Callable[..., Run], day: str) -> None:
    def change(table: pl.DataFrame) -> pl.DataFrame:
        table = some("click", None, rows=5)(some("click", 2, rows=12)(table))
        return pl.concat([table, table.tail(3)])

    said: list[str] = []
    run = altered(change, day)
    prepare(run, say=said.append)
    reasons = {"label click is 2.0, not 0 or 1": 7, "label click is null": 5, "key impression_id is repeated": 3}
    about = verify(resolve(run.examples_path(f"day={day}"))).about
    assert (about["rows"], about["bad"]) == (ROWS - 12, reasons)
    [line] = [s for s in said if s.startswith(f"day={day}: ")]
    assert line.startswith(f"day={day}: 2,988 examples; set aside ")
    assert all(f"; set aside {n} x {reason}" in line for reason, n in reasons.items())
    folder = resolve(run.examples_path(f"day={day}"))
    assert pl.read_parquet(folder / "part-*.parquet").height == ROWS - 12
    rejected = pl.read_parquet(folder / "rejected.parquet")
    assert dict(rejected["reason"].value_counts().iter_rows()) == reasons
    assert {"impression_id", "user_id", "click"} <= set(rejected.columns)


def test_the_share_of_bad_rows_is_a_setting(altered: Callable[..., Run]) -> None:
    run = altered(some("click", 2, rows=1500), data__max_bad_share="0.5")
    prepare(run, say=quiet)
    assert read_manifest(resolve(run.examples_path(f"day={TRAIN}"))).about["rows"] == 1500


@pytest.mark.parametrize("day", [TRAIN, VALID])
def test_an_empty_day(altered: Callable[..., Run], day: str) -> None:
    run = altered(lambda t: t.clear(), day)
    assert refusal(DataError, lambda: prepare(run, say=quiet)) == (
        f"day={day}: {run.data.path} has no rows for it; check the path, data.where and data.split"
    )
    assert not run.output.exists()


def test_a_day_that_is_not_there(platform: Platform, tmp_path: Path) -> None:
    run = platform.at(tmp_path / "out", data__split__valid="2026-04-02", data__split__test="2026-04-03")
    assert refusal(DataError, lambda: prepare(run, say=quiet)) == (
        f"{run.data.path}: no files for day 2026-04-02; check the path and data.split, wait for the log, or name a "
        "day that will have none in data.without_log"
    )
    run = platform.at(tmp_path / "out", data__path="'nowhere/*.parquet'")
    assert refusal(DataError, lambda: prepare(run, say=quiet)).startswith("nowhere/*.parquet: no files match; check")
    assert not run.output.exists()


@pytest.mark.parametrize("length", [0, 4, 1000])
def test_a_log_file_cut_short(altered: Callable[..., Run], tmp_path: Path, length: int) -> None:
    run = altered(lambda t: t)
    path = tmp_path / "logs" / f"day={TRAIN}" / "part.parquet"
    path.write_bytes(path.read_bytes()[:length])
    assert str(tmp_path / "logs") in refusal(DataError, lambda: prepare(run, say=quiet))
    assert not run.output.exists()


def test_labels_of_one_class_only(altered: Callable[..., Run]) -> None:
    run = altered(lambda t: t.with_columns(click=pl.lit(1, pl.Int8)), VALID, train__monitor="auc")
    prepare(run, say=quiet)
    assert refusal(DataError, lambda: train(run, say=quiet)) == (
        "label 'click': the validation rows, all impressions, hold one class only; choose other days"
    )


def test_a_published_log_may_be_named_by_its_folder(platform: Platform, tmp_path: Path) -> None:
    """Older versions of a day, which lie in a hidden folder, are no part of the log."""
    logs = Path(shutil.copytree(platform.logs, tmp_path / "logs", symlinks=True))
    old = resolve(logs / f"day={TRAIN}")
    with publish(logs / f"day={TRAIN}", "log", overwrite=True) as staging:
        pl.read_parquet(old / "*.parquet").head(2000).write_parquet(staging / "part-00000.parquet")
    for path in (logs, f"{logs}/", f"{logs}/**/*.parquet", f"{logs}/day=*/*"):
        run = platform.at(tmp_path / "out", data__path=f"'{path}'")
        assert run.source.raw(f"day={TRAIN}").select(pl.len()).collect().item() == 2000


# Funnels


ESMM = '{name="esmm", dim=4, tower={kind="mlp", hidden=[8]}}'
TWO = {"data__labels": '["click", "conversion"]', "model": ESMM}
FUNNEL = {**TWO, "data__funnel": '["click", "conversion"]'}


def converting(table: pl.DataFrame) -> pl.DataFrame:
    """Every third item is bought by those who click on it."""
    return table.with_columns(conversion=pl.when(pl.col("item_id") % 3 == 0).then("click").otherwise(0).cast(pl.Int8))


@pytest.fixture
def funnel(altered: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """A run of ESMM over the same log with conversions, of which one day is changed."""

    def funnel(change: Change, day: str = TRAIN, **settings: str) -> Run:
        run = altered(lambda t: t, day, **{**FUNNEL, **settings})
        for path in (tmp_path / "logs").glob("day=*/part.parquet"):
            table = converting(pl.read_parquet(path))
            (change(table) if day in str(path) else table).write_parquet(path)
        return run

    return funnel


def test_esmm_without_a_funnel(platform: Platform, tmp_path: Path) -> None:
    for settings, found in (
        ({"model": ESMM}, "data.labels are ['click'], data.funnel is []"),
        (TWO, "data.labels are ['click', 'conversion'], data.funnel is []"),
    ):
        assert refusal(ConfigError, lambda s=settings: platform.at(tmp_path / "out", **s)) == (
            'model.name = "esmm" needs two labels in a funnel, as data.funnel = ["click", "conversion"]; ' + found
        )


def test_a_funnel_with_a_column_that_is_missing(platform: Platform, tmp_path: Path) -> None:
    run = platform.at(tmp_path / "out", **FUNNEL)
    message = refusal(DataError, lambda: prepare(run, say=quiet))
    assert message.startswith("data.labels.conversion: column 'conversion' is missing")
    assert not run.output.exists()


@pytest.mark.parametrize("monitor", ["auc", "log_loss"])
def test_a_validation_day_without_conversions(funnel: Callable[..., Run], monitor: str) -> None:
    run = funnel(lambda t: t.with_columns(conversion=pl.lit(0, pl.Int8)), VALID, train__monitor=monitor)
    prepare(run, say=quiet)
    assert refusal(DataError, lambda: train(run, say=quiet)) == (
        "label 'conversion': the validation rows, rows with click, hold one class only; choose other days"
    )
    assert not run.bundle_path.exists()


def test_a_validation_day_on_which_every_click_converts(funnel: Callable[..., Run]) -> None:
    run = funnel(lambda t: t.with_columns(conversion="click"), VALID)
    prepare(run, say=quiet)
    assert refusal(DataError, lambda: train(run, say=quiet)) == (
        "label 'conversion': the validation rows, rows with click, hold one class only; choose other days"
    )


def test_conversions_before_their_clicks(funnel: Callable[..., Run]) -> None:
    reversed_funnel = {"data__funnel": '["conversion", "click"]'}
    run = funnel(lambda t: t, **reversed_funnel)
    message = refusal(DataError, lambda: prepare(run, say=quiet))
    assert message.startswith(f"day={TRAIN}: ")
    assert " x label click is 1 where conversion, before it in data.funnel, is 0. Mend the log" in message
    assert not run.output.exists()


@pytest.mark.parametrize("name", ["base", "esmm", "escm2"])
def test_batches_without_a_single_click_train_on(funnel: Callable[..., Run], name: str) -> None:
    """Thirty clicks in 3,000 rows, fifty a batch: half the batches have none, and most no conversion."""

    def few(table: pl.DataFrame) -> pl.DataFrame:
        clicks = (pl.int_range(pl.len()) % 100 == 0).cast(pl.Int8)
        return table.with_columns(click=clicks).with_columns(conversion=pl.col("click") * (pl.col("item_id") % 2))

    run = funnel(few, model=ESMM.replace("esmm", name), train__batch_size="50", train__epochs="1")
    prepare(run, say=quiet)
    trained = train(run, say=quiet)
    assert trained.history[0]["step"] == ROWS // 50
    assert 0 < trained.history[0]["train_loss"] < 2
    assert all(weight.isfinite().all() for weight in trained.weights.values())


def test_sampled_away_to_almost_nothing(funnel: Callable[..., Run]) -> None:
    """One non-click in a thousand: an epoch is its clicks, and training goes on."""
    run = funnel(lambda t: t, sampling__negative_rate="0.001", train__epochs="1")
    prepare(run, say=quiet)
    clicks = converting(pl.read_parquet(run.data.path.replace("day=*", f"day={TRAIN}")))["click"].sum()
    steps = train(run, say=quiet).history[0]["step"]
    assert steps in {-(-(clicks + kept) // 512) for kept in (0, 1, 2, 3)}


def test_a_calibration_day_without_positives(funnel: Callable[..., Run]) -> None:
    without = funnel(
        lambda t: t.with_columns(conversion=pl.lit(0, pl.Int8)),
        TEST,
        data__split=f'{{train="{TRAIN}", valid="{VALID}"}}',
        calibrate=f'{{method="platt", partition="day={TEST}"}}',
        train__epochs="1",
    )
    prepare(without, say=quiet)
    clicks = pl.read_parquet(without.data.path.replace("day=*", f"day={TEST}"))["click"].sum()
    assert refusal(DataError, lambda: train(without, say=quiet)) == (
        f"output 'p_conversion_given_click' cannot be calibrated on {clicks} rows of which 0 are positive: "
        "set calibrate.partition to a day with both, or leave the output out of calibrate.outputs"
    )
    assert not without.bundle_path.exists()


@pytest.mark.parametrize(("day", "role"), [(TRAIN, "train"), (TEST, "test")])
def test_calibrating_on_rows_that_are_trained_or_tested_on(funnel: Callable[..., Run], day: str, role: str) -> None:
    run = funnel(lambda t: t, calibrate=f'{{method="platt", partition="day={day}"}}')
    for verb in (prepare, train):
        assert refusal(ConfigError, lambda v=verb: v(run, say=quiet)) == (
            f"calibrate.partition = 'day={day}' is a {role} partition: calibrate on rows that are "
            "neither trained on nor tested on, such as the validation day"
        )
    assert not run.output.exists()


@pytest.mark.parametrize("setting", ["truth", "entire_space"])
def test_an_evaluation_column_that_is_missing_is_told_before_training(funnel: Callable[..., Run], setting: str) -> None:
    run = funnel(lambda t: t, evaluate=f'{{{setting}={{p_conversion_given_click="prise"}}}}')
    message = refusal(DataError, lambda: prepare(run, say=quiet))
    assert message.startswith("evaluate: column 'prise' is missing; did you mean 'price'?")
    assert not run.output.exists()


@pytest.mark.parametrize("setting", ["truth", "entire_space"])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("click", "; did you mean 'p_click'?"),  # outputs go by their own names, not by their labels'
        ("p_conversion_given_clik", "; did you mean 'p_conversion_given_click'?"),
        ("order", "; the outputs are p_click, p_conversion_given_click, p_click_and_conversion"),
    ],
)
def test_an_evaluation_of_an_output_that_is_none(
    funnel: Callable[..., Run], setting: str, name: str, hint: str
) -> None:
    run = funnel(lambda t: t, evaluate=f'{{{setting}={{{name}="click"}}}}')
    for verb in (lambda: prepare(run, say=quiet), lambda: train(run, say=quiet), lambda: evaluate(run)):
        assert refusal(ConfigError, verb) == f"evaluate.{setting}: {name!r} is no output of esmm{hint}"
    assert not run.output.exists()


def test_calibrating_an_output_that_is_none(funnel: Callable[..., Run]) -> None:
    run = funnel(lambda t: t, calibrate='{method="platt", outputs=["p_clik"]}')
    assert refusal(ConfigError, lambda: prepare(run, say=quiet)) == (
        "calibrate.outputs: 'p_clik' is no output of esmm; did you mean 'p_click'?"
    )
    assert not run.output.exists()


# Ids


TABLE = Sparse(name="user_id", rows=10)
OUTSIDE = [10, 11, -1, -7, 2**31, 2**53 + 1, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("bad", OUTSIDE)
def test_an_id_beyond_its_table(bad: int) -> None:
    given = torch.tensor([1, bad, 9, 0, bad])
    ids_V, count = given.clone(), IdCount()
    assert refusal(IdError, lambda: check_ids(ids_V, TABLE, "error", count)) == (
        f"feature 'user_id': id {bad} is outside its table of 10 rows (2 such ids): "
        "the examples were made by another pipeline; prepare them again"
    )
    assert check_ids(ids_V, TABLE, "unknown", count).tolist() == [1, 0, 9, 0, 0]
    assert count.replaced == 2
    assert torch.equal(ids_V, given)  # the caller's ids stay as they are


def test_ids_within_their_table() -> None:
    for ids in ([], [0], [9, 0, 9]):
        ids_V, count = torch.tensor(ids, dtype=torch.int64), IdCount()
        for policy in ("error", "unknown"):
            assert check_ids(ids_V, TABLE, policy, count).tolist() == ids
        assert count.replaced == 0


@pytest.mark.parametrize("bad", [10_000, -1])
@pytest.mark.parametrize("column", ["user_id", "tags"])
def test_a_bad_id_in_a_file_of_examples(platform: Platform, tmp_path: Path, column: str, bad: int) -> None:
    """In a plain column and in a bag; training and scoring read both through the same check."""
    run = platform.run
    schema = FittedPipeline.load(resolve(run.features_path)).schema(run.data.key, run.labels)
    table = pl.read_parquet(resolve(run.examples_path(f"day={VALID}")) / "part-*.parquet")
    value = pl.lit([1, bad, 2], table.schema[column]) if column == "tags" else pl.lit(bad, table.schema[column])
    changed = pl.when(pl.int_range(pl.len()) == 700).then(value).otherwise(column).alias(column)
    table.with_columns(changed).write_parquet(tmp_path / "part.parquet")
    [feature] = [f for f in schema.sparse if f.name == column]
    strict = ExampleStream((tmp_path / "part.parquet",), schema, 512)
    assert refusal(IdError, lambda: list(strict.epoch(0))) == (
        f"feature {column!r}: id {bad} is outside its table of {feature.rows} rows (1 such ids): "
        "the examples were made by another pipeline; prepare them again"
    )
    lenient = ExampleStream((tmp_path / "part.parquet",), schema, 512, policy="unknown")
    seen = [batch.sparse[column].values() for batch in lenient.epoch(0)]
    assert lenient.count.replaced == 1
    assert torch.cat(seen).min() >= 0
    assert torch.cat(seen).max() < feature.rows


# Artefacts that are there already, or belong to something else


def test_generate_refuses_what_is_published(platform: Platform) -> None:
    from datetime import date

    from features.readers.synthetic import SyntheticConfig

    config, days = SyntheticConfig(rows_per_day=10), [date(2026, 3, 1)]
    before = resolve(platform.logs / f"day={TRAIN}")
    assert refusal(PublishedError, lambda: generate(config, days, platform.logs, say=quiet)) == (
        f"{platform.logs / f'day={TRAIN}'}: already published; pass --overwrite to replace it, or choose another name"
    )
    assert resolve(platform.logs / f"day={TRAIN}") == before


def test_prepare_again_changes_nothing(altered: Callable[..., Run]) -> None:
    run = altered(lambda t: t)
    prepare(run, say=quiet)
    before, said = files(run.output), list[str]()
    for overwrite in (False, True):
        prepare(run, overwrite=overwrite, say=said.append)
    assert files(run.output) == before
    assert all("already" in line for line in said)


def test_prepare_with_other_features_refuses_without_overwrite(platform: Platform, altered: Callable[..., Run]) -> None:
    run = altered(lambda t: t)
    prepare(run, say=quiet)
    other = platform.at(run.output, data__path=f"'{run.data.path}'", features__0__min_count="2")
    before = files(run.output)
    assert refusal(PublishedError, lambda: prepare(other, say=quiet)) == (
        f"{run.features_path}: already published; pass --overwrite to replace it, or choose another name"
    )
    assert files(run.output) == before
    assert refusal(DataError, lambda: train(other, say=quiet)) == (
        f"{run.features_path}: fitted from other [[features]] or [derive]; run `recsys prepare --overwrite`"
    )
    assert not run.folder.exists()
    version = prepare(other, overwrite=True, say=quiet).version
    assert read_manifest(resolve(run.examples_path(f"day={VALID}"))).about["pipeline"] == version


def test_train_refuses_examples_of_other_features(platform: Platform, altered: Callable[..., Run]) -> None:
    run = altered(lambda t: t)
    old = prepare(run, say=quiet)
    other = platform.at(run.output, data__path=f"'{run.data.path}'", features__0__min_count="2")
    examples = resolve(run.examples_path(f"day={VALID}"))
    new = prepare(other, overwrite=True, say=quiet)
    other.examples_path(f"day={VALID}").unlink()
    other.examples_path(f"day={VALID}").symlink_to(examples)
    assert refusal(DataError, lambda: train(other, say=quiet)) == (
        f"{other.examples_path(f'day={VALID}')}: made by features {old.version}, the fitted ones are {new.version}; "
        "run `recsys prepare --overwrite`"
    )
    assert not other.folder.exists()


def test_train_before_prepare(platform: Platform, tmp_path: Path) -> None:
    run = platform.at(tmp_path / "out")
    assert refusal(ArtefactError, lambda: train(run, say=quiet)) == (
        f"{run.features_path}: nothing is published there; run `recsys prepare`"
    )
    assert not run.folder.exists()


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.parquet"])
def test_damaged_examples_are_refused_by_name_and_can_be_made_again(altered: Callable[..., Run], name: str) -> None:
    run = altered(lambda t: t)
    prepare(run, say=quiet)
    path = resolve(run.examples_path(f"day={TRAIN}")) / name
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert str(path) in refusal(ArtefactError, lambda: prepare(run, say=quiet))
    assert str(path) in refusal(ArtefactError, lambda: train(run, say=quiet))
    prepare(run, overwrite=True, say=quiet)
    assert path.read_bytes() == sound


@pytest.mark.parametrize("name", ["manifest.json", "recipe.json", "learned/000.parquet"])
def test_damaged_features_are_refused_by_name_and_can_be_made_again(altered: Callable[..., Run], name: str) -> None:
    run = altered(lambda t: t)
    prepare(run, say=quiet)
    path = resolve(run.features_path) / name
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert str(path) in refusal(ArtefactError, lambda: prepare(run, say=quiet))
    assert str(path) in refusal(ArtefactError, lambda: train(run, say=quiet))
    prepare(run, overwrite=True, say=quiet)
    assert path.read_bytes() == sound


# Registry


def test_an_mlflow_that_does_not_answer_is_told_before_training(platform: Platform, tmp_path: Path) -> None:
    run = platform.at(tmp_path / "out", mlflow__uri="'http://127.0.0.1:9'")
    shutil.copytree(platform.run.output, run.output, symlinks=True)
    started = time.monotonic()
    message = refusal(RegistryError, lambda: train(run, say=quiet))
    assert time.monotonic() - started < 60
    assert message.startswith("MLflow at http://127.0.0.1:9 does not answer; check mlflow.uri")
    assert message.endswith("; check mlflow.uri and that the server runs")
    assert not run.folder.exists()


def test_scoring_without_a_champion(platform: Platform, tmp_path: Path) -> None:
    run = platform.at(tmp_path / "out")
    message = refusal(RegistryError, lambda: score(run, say=quiet))
    assert message.startswith("model 'ctr' at sqlite:///")
    assert message.endswith("has no 'champion'; run `recsys promote` first")
    assert not (run.output / "scores").exists()


# Scoring


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: pl.concat([t, t.slice(17, 40)]),
            f"day={TEST}: 40 of 3040 rows are bad, 1.32% where 1.00% is allowed: 40 x key impression_id is repeated. "
            "Mend the log, or raise data.max_bad_share",
        ),
        (
            some("impression_id", None, rows=60),
            f"day={TEST}: 60 of 3000 rows are bad, 2.00% where 1.00% is allowed: 60 x key impression_id is null. Mend",
        ),
        (lambda t: t.drop("age"), "features: column 'age' is missing"),
        (lambda t: t.drop("impression_id"), "data.key: column 'impression_id' is missing"),
        (
            lambda t: t.with_columns(pl.col("price").cast(pl.String)),
            "column 'price' holds text; feature 'price' (log) takes integer, float, boolean: convert it in the log",
        ),
        (
            lambda t: t.with_columns(pl.col("user_id").str.strip_prefix("u").cast(pl.Int64)),
            "column 'user_id' holds integer, but held text when features were fitted: convert it back, or fit",
        ),
    ],
    ids=["repeated", "null key", "missing", "no key", "text", "other kind"],
)
def test_rows_that_cannot_be_scored_leave_the_old_output(
    altered: Callable[..., Run], bundle_path: Path, change: Change, message: str
) -> None:
    run = altered(change, TEST)
    target = run.scores_path(f"day={TEST}")
    with publish(target, "scores") as staging:
        (staging / "part-00000.parquet").write_text("yesterday's")
    before = files(run.output)
    scored: list[int] = []
    options = {
        "model": str(bundle_path),
        "overwrite": True,
        "say": quiet,
        "on_rows": lambda done, _: scored.append(done),
    }
    assert refusal(DataError, lambda: score(run, **options)).startswith(message)
    assert scored == []  # not after an hour of scoring
    assert files(run.output) == before
    verify(resolve(target))


def test_a_few_rows_without_a_key_of_their_own_are_set_aside(
    altered: Callable[..., Run], platform: Platform, bundle_path: Path, tmp_path: Path
) -> None:
    """The others get the scores that they get alone; of equal keys the first row."""

    def change(table: pl.DataFrame) -> pl.DataFrame:
        twice = table.slice(17, 3).with_columns(age=pl.lit(99, table["age"].dtype))
        return pl.concat([some("impression_id", None, rows=2)(table), twice]).with_columns(reason=pl.lit("ours"))

    said: list[str] = []
    [whole] = score(platform.at(tmp_path / "whole"), model=str(bundle_path), say=quiet)
    run = altered(change, TEST)
    [target] = score(run, model=str(bundle_path), say=said.append)
    reasons = {"key impression_id is null": 2, "key impression_id is repeated": 3}
    about = verify(resolve(target)).about
    assert (about["rows"], about["bad"]) == (ROWS - 2, reasons)
    found = pl.read_parquet(target / "part-*.parquet")
    assert found.equals(pl.read_parquet(whole / "part-*.parquet").slice(2))
    rejected = pl.read_parquet(target / "rejected.parquet")
    assert dict(rejected["reason"].value_counts().iter_rows()) == reasons
    assert rejected.filter(pl.col("reason").str.contains("repeated"))["age"].to_list() == [99] * 3
    assert rejected["raw_reason"].to_list() == ["ours"] * 5  # a column of the log that is called so
    assert said[-1].endswith(
        "set aside 2 x key impression_id is null; set aside 3 x key impression_id is repeated "
        f"-> {target}/rejected.parquet"
    )


def test_scoring_refuses_what_is_published(platform: Platform, bundle_path: Path, tmp_path: Path) -> None:
    run = platform.at(tmp_path / "out")
    [target] = score(run, model=str(bundle_path), say=quiet)
    before = resolve(target)
    assert refusal(PublishedError, lambda: score(run, model=str(bundle_path), say=quiet)) == (
        f"{target}: already published; pass --overwrite to replace it, or choose another name"
    )
    score(run, model=str(bundle_path), overwrite=True, say=quiet)
    assert resolve(target) == before  # the same bytes


def test_an_empty_day_to_score(altered: Callable[..., Run], bundle_path: Path) -> None:
    run = altered(lambda t: t.clear(), TEST)
    target = run.scores_path(f"day={TEST}")
    assert refusal(DataError, lambda: score(run, model=str(bundle_path), say=quiet)) == (
        f"{target}: there are no rows to score; check the path and the partition"
    )
    assert not run.output.exists()


@pytest.mark.parametrize("partition", ["2026-03-03", "day=tomorrow", "split=test", "week=9"])
def test_a_partition_that_means_nothing(platform: Platform, bundle_path: Path, partition: str) -> None:
    run = platform.run
    message = refusal(UserError, lambda: score(run, partition=partition, model=str(bundle_path), say=quiet))
    assert partition in message or partition.partition("=")[2] in message
    assert not (run.output / "scores").exists()


def test_a_new_value_is_unknown_and_no_error(altered: Callable[..., Run], bundle_path: Path) -> None:
    run = altered(lambda t: t.with_columns(user_id=pl.lit("nobody"), tags=pl.lit(None, pl.List(pl.String))), TEST)
    [target] = score(run, model=str(bundle_path), say=quiet)
    assert verify(resolve(target)).about["replaced_ids"] == 0
    assert pl.read_parquet(target / "part-*.parquet").height == ROWS


def test_a_row_less_is_noticed(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle_path: Path
) -> None:
    import serving.score
    from recsys.bundle import Bundle

    whole = serving.score.score
    monkeypatch.setattr(serving.score, "score", lambda *a, **k: (part.head(part.height - 1) for part in whole(*a, **k)))
    target, frame = tmp_path / "scores" / f"day={TEST}", platform.run.source.raw(f"day={TEST}")
    assert refusal(
        DataError,
        lambda: publish_scores(Bundle.load(bundle_path), frame, target, key=["impression_id"], model_version="1"),
    ) == (f"{target}: 3000 rows came in, 2999 were scored; nothing is published")
    assert not target.exists()


def test_a_missing_setting_is_told_by_the_command_line(platform: Platform) -> None:
    with pytest.raises(ConfigError, match=r"unknown key train\.epoch; did you mean 'epochs'"):
        platform.at(Path("out"), train__epoch="3")
