"""Drift: numbers by hand, quiet days quiet, broken days found, thresholds that say what they mean."""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from base.config import load_config, parse_config
from base.errors import ConfigError
from features.pipeline import FittedPipeline
from features.profile import NumberBins, Profile, Reference, choose_bins, count, merge, missing_in
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines.config import Run
from serving.drift import Checks, Finding, compare, psi, psi_by_chance

DEMO = Path(__file__).parents[2] / "pipelines" / "runs" / "demo.toml"


def checks_of(**tree: Any) -> Checks:
    return parse_config(Checks, tree, source="test")


# Numbers by hand


def test_psi_by_hand() -> None:
    # (1.5 / 5, 3.5 / 5) against (2.5 / 5, 2.5 / 5), with half a row more in each of two bins.
    by_hand = 0.2 * math.log(0.5 / 0.3) - 0.2 * math.log(0.5 / 0.7)
    assert psi((1, 3), (2, 2)) == pytest.approx(by_hand, rel=1e-12)
    assert psi((1, 0, 3), (2, 0, 2)) == pytest.approx(by_hand, rel=1e-12)  # empty in both: no bin
    assert psi((10, 20), (10, 20)) == 0.0
    assert psi((100, 0), (0, 100)) == pytest.approx(2 * (100 / 101) * math.log(201), rel=1e-12)
    assert math.isnan(psi((0, 0), (1, 2)))


def test_two_samples_of_one_distribution_keep_below_what_chance_explains() -> None:
    rng = np.random.default_rng(0)
    share = np.full(32, 1 / 32)
    n, m = 1000, 1000
    values = [psi(rng.multinomial(n, share).tolist(), rng.multinomial(m, share).tolist()) for _ in range(300)]
    assert np.mean(values) == pytest.approx(31 * (1 / n + 1 / m), rel=0.1)
    assert max(values) < psi_by_chance([1000 // 32] * 32, [1000 // 32] * 32) < 0.2  # so the default needs 1,000 rows


def one(reference: Reference, found: Profile, checks: Checks, what: str) -> Finding:
    return next(f for f in compare(reference, found, checks) if f.what == what)


def reference_of(training: Profile) -> Reference:
    return Reference(bins={}, training=training, held_out=Profile(rows=1))


@pytest.mark.parametrize(
    ("rows", "verdict"), [(1000, "ok"), (501, "ok"), (499, "warn"), (199, "stop"), (2001, "warn"), (5001, "stop")]
)
def test_volume_is_beside_the_mean_day(rows: int, verdict: str) -> None:
    reference = reference_of(Profile(rows=3000, days=3))
    found = one(reference, Profile(rows=rows, days=1), Checks(), "volume")
    assert (found.verdict, found.reference, found.found) == (verdict, 1000, rows)
    assert not compare(reference, Profile(rows=rows), Checks())  # a random share is no day


@pytest.mark.parametrize(
    ("positives", "known", "verdict"),
    [(20, 1000, "ok"), (9, 1000, "ok"), (0, 100, "ok"), (0, 10_000, "stop"), (90, 10_000, "warn"), (900, 9000, "warn")],
)
def test_label_rates_are_judged_beyond_chance(positives: int, known: int, verdict: str) -> None:
    """2 % in training: none among 100 rows is chance, none among 10,000 is not."""
    reference = reference_of(Profile(rows=100_000, positives={"click": 2000}, known={"click": 100_000}))
    found = Profile(rows=known, positives={"click": positives}, known={"click": known})
    assert one(reference, found, Checks(), "label_rate").verdict == verdict


def test_a_label_that_is_not_known_yet_is_not_judged() -> None:
    reference = reference_of(Profile(rows=10, positives={"buy": 5}, known={"buy": 10}))
    assert not compare(reference, Profile(rows=10, positives={"buy": 0}, known={"buy": 0}), Checks())


def test_missing_is_the_share_lost_of_what_was_there() -> None:
    reference = reference_of(Profile(rows=10_000, missing={"age": 5000}))
    found = {
        n: one(reference, Profile(rows=10_000, missing={"age": n}), Checks(), "missing") for n in (5400, 5600, 6600)
    }
    assert [f.verdict for f in found.values()] == ["ok", "warn", "stop"]
    assert found[5600].warn == (None, pytest.approx(0.55))
    assert found[6600].sentence == "age: missing 66.00%, 50.00% before (at most 65.00% is allowed)"


def test_scores_are_compared_with_the_held_out_ones() -> None:
    held_out = Profile(rows=2000, scores={"p": (1000, 1000)})
    reference = Reference(
        bins={}, score_bins={"p": NumberBins(edges=(0.5,))}, training=Profile(rows=0), held_out=held_out
    )
    found = one(reference, Profile(rows=2000, scores={"p": (200, 1800)}), Checks(), "score_psi")
    assert (found.name, found.verdict) == ("p", "warn")
    assert found.found == pytest.approx(psi((1000, 1000), (200, 1800)))


# Days of the synthetic log


class Log:
    """Eight days: features fitted on five, the sixth held out, the last two to check."""

    def __init__(self, rows: int) -> None:
        config = SyntheticConfig(rows_per_day=rows, users=rows // 4, items=rows // 4)
        days = [day_frame(config, config.start + timedelta(days=i)) for i in range(8)]
        self.fitted: FittedPipeline = load_config(Run, DEMO).pipeline.fit(d.lazy() for d in days[:5])
        self.bins = choose_bins(self.examples(days[4]), self.fitted)
        training = merge(self.profile(d) for d in days[:5])
        self.reference = Reference(bins=self.bins, training=training, held_out=self.profile(days[5]))
        self.days = days

    def examples(self, day: pl.DataFrame) -> pl.LazyFrame:
        return self.fitted.transform(day.lazy().with_columns(pl.col("click").alias("@click")), keep=["@click"])

    def profile(self, day: pl.DataFrame) -> Profile:
        missing = day.lazy().select(**missing_in(day.lazy(), self.fitted.recipe.inputs)).collect().row(0, named=True)
        return count(self.examples(day), self.bins, ["click"], days=1, missing=missing)

    def remarks(self, day: pl.DataFrame) -> dict[tuple[str, str], str]:
        found = compare(self.reference, self.profile(day), Checks())
        return {(f.name, f.what): f.verdict for f in found if f.verdict != "ok"}


@pytest.fixture(scope="module", params=[1000, 8000])
def log(request: pytest.FixtureRequest) -> Log:
    return Log(request.param)


def test_clean_days_are_quiet(log: Log) -> None:
    for day in log.days[5:]:
        assert log.remarks(day) == {}


HALF = pl.int_range(pl.len()) % 2 == 0
c = pl.col
BROKEN = {
    "garbage": (pl.lit("x") + c("user_id"), ("user_id", "unknown"), "stop"),
    "other ids": (c("item_id") + 10**6, ("item_id", "unknown"), "stop"),
    "shifted ids": (c("item_id") + 1, ("item_id", "psi"), "warn"),
    "permuted ids": ((c("item_id") * 7 + 3) % 200, ("item_id", "psi"), "warn"),
    "constant": (pl.lit("phone").alias("device"), ("device", "psi"), "warn"),
    "cents": (c("price") * 100, ("price", "psi"), "warn"),
    "half null": (pl.when(HALF).then("country").alias("country"), ("country", "missing"), "stop"),
    "half null numbers": (pl.when(HALF).then("price").alias("price"), ("price", "missing"), "stop"),
    "half null lists": (pl.when(HALF).then("tags").alias("tags"), ("tags", "missing"), "stop"),
    "empty lists": (c("tags").list.head(0), ("tags", "psi"), "warn"),
    "no clicks": (pl.lit(0, pl.Int8).alias("click"), ("click", "label_rate"), "stop"),
    "only clicks": (pl.lit(1, pl.Int8).alias("click"), ("click", "label_rate"), "warn"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_days_are_found_and_nothing_else_is(log: Log, name: str) -> None:
    expression, where, verdict = BROKEN[name]
    column = expression.meta.output_name() if name not in ("garbage",) else "user_id"
    found = log.remarks(log.days[6].with_columns(expression.alias(column)))
    assert found.get(where) == verdict
    assert {name for name, _ in found} == {column}


def test_a_tenth_of_the_rows_is_found_and_its_features_are_not_blamed(log: Log) -> None:
    assert log.remarks(log.days[6].head(log.days[6].height // 10)) == {("rows", "volume"): "stop"}


# Thresholds


def test_a_threshold_left_unsaid_keeps_its_default() -> None:
    checks = checks_of(psi={"stop": 2}, missing={"warn": "never"}, overrides={"age": {"psi": {"warn": 0.5}}})
    assert (checks.psi.warn, checks.psi.stop) == (0.2, 2)
    assert (checks.missing.warn, checks.missing.stop) == (None, 0.3)
    assert (checks.limit("psi", "age").warn, checks.limit("psi", "age").stop) == (0.5, 2)
    assert checks.limit("psi", "other") == checks.psi
    assert checks.limit("unknown", "age") == checks.unknown
    assert Checks.model_validate(checks.model_dump(mode="json")) == checks


def test_never_is_never() -> None:
    reference = reference_of(Profile(rows=100, missing={"age": 0}))
    checks = checks_of(missing={"warn": "never", "stop": "never"})
    found = one(reference, Profile(rows=100, missing={"age": 100}), checks, "missing")
    assert (found.verdict, found.allowed) == ("ok", "any")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"psi": {"stop": 0.1}}, "psi: stop = 0.1 lies below warn = 0.2"),
        ({"volume": {"warn": [2, 3]}}, r"volume: warn = \[2.0, 3.0\]: write the lowest and the highest multiple"),
        ({"volume": {"warn": [0.1, 2]}}, "does not enclose"),
        ({"overrides": {"x": {"unknown": {"warn": 0.6}}}}, "overrides.x.unknown: stop = 0.5 lies below warn = 0.6"),
        ({"psy": {}}, "unknown key psy; did you mean 'psi'"),
        ({"psi": {"warm": 1}}, "unknown key psi.warm; did you mean 'warn'"),
        ({"psi": {"warn": -1}}, "psi.warn = -1"),
    ],
)
def test_thresholds_that_cannot_be_meant_are_named(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checks_of(**tree)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("checks.overrides.user.psi.warn=1", "checks.overrides.user.psi: 'user' is no feature; did you mean 'user_id'"),
        ("checks.overrides.click.missing.stop=1", "'click' is no raw column that a feature reads; there are"),
        ("checks.overrides.user_id.label_rate.stop=[0,99]", "'user_id' is no label; there are click"),
    ],
)
def test_overrides_of_unknown_names_are_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(Run, DEMO, [setting])
