"""The synthetic log: repeatable day by day, as announced in its columns, and hiding exactly what it says it hides."""

import hashlib
from datetime import date, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from base.config import parse_config
from base.errors import ConfigError
from features.readers.synthetic import (
    BOTH_TRUTH,
    CONVERSION,
    CONVERSION_TRUTH,
    DELAY,
    FEATURES,
    FUNNEL,
    INTERACTIONS,
    KEY,
    LABEL,
    LEVELS,
    POTENTIAL,
    TRUTH,
    SyntheticConfig,
    affinity,
    conversion_effect,
    day_frame,
    generate_day,
    id_effect,
    planted_effects,
)
from pipelines.cli import main
from tests.marks import quick

CONFIG = SyntheticConfig()
SMALL = SyntheticConfig(rows_per_day=5_000)
MAIN = ["advertiser", "category", "device", "country", "placement", "hour"]
PINNED = [
    (3176909999439872, "u75030", 173, "phone", "education", 1),
    (3176909999439873, "u6901", 4, "phone", "books", 0),
    (3176909999439874, "u104455", 17, "phone", "business", 0),
]
PINNED_PROBABILITY = [0.667439743975, 0.145153928573, 0.204937190699]
PINNED_LOG = "1c44c7e6a42eed139ac4fd43c55b13369dd338a5f74b49efb363378f2eaa4817"  # from before there was a funnel
RATES = {"click_rate": 0.2, "conversion_rate": 0.3}
DIALS = {"taste": 1.0, "confounding": 1.5, "conversion_delay_days": 3.0, "observed_until": date(2026, 3, 9)}
PINNED_FUNNEL = [  # conversions that come: the first is in the log, the last is late
    (3176909999439878, 1, 1, 0.5329948984503722),
    (3176909999439879, 1, 1, 1.8800703767812257),
    (3176909999439882, 0, 1, 4.774255249500278),
]
PINNED_CHANCES = [
    (0.0873082216326719, 0.4696308703840291, 0.056007991450466144),
    (0.3025628348742875, 0.3985352398963666, 0.15713478826442334),
    (0.4411071086004997, 0.13468153930071927, 0.08099031979750032),
]


def day_of(index: int) -> date:
    return CONFIG.start + timedelta(days=index)


@cache
def five_days() -> pl.DataFrame:
    return pl.concat([day_frame(CONFIG, day_of(index)) for index in range(5)])


@cache
def first_day(text: str) -> pl.DataFrame:
    config = SyntheticConfig.model_validate_json(text)
    return day_frame(config, config.start)


def funnel(**dials: float) -> pl.DataFrame:
    return first_day(SyntheticConfig.model_validate({"rows_per_day": 250_000, **RATES, **dials}).model_dump_json())


def small(**dials: object) -> pl.DataFrame:
    return first_day(SyntheticConfig.model_validate({"rows_per_day": 20_000, **dials}).model_dump_json())


def logit(frame: pl.DataFrame, column: str) -> np.ndarray:
    probability = frame[column].to_numpy()
    return np.log(probability) - np.log1p(-probability)


def user_numbers(frame: pl.DataFrame) -> pl.Series:
    return frame["user_id"].str.strip_prefix("u").cast(pl.Int64)


# Repeatable


def test_the_columns_are_as_announced() -> None:
    expected = {
        "impression_id": pl.Int64,
        "day": pl.Date,
        "user_id": pl.String,
        "item_id": pl.Int64,
        "advertiser": pl.String,
        "category": pl.String,
        "device": pl.String,
        "country": pl.String,
        "placement": pl.String,
        "hour": pl.Int64,
        "tags": pl.List(pl.String),
        "price": pl.Float64,
        "age": pl.Int64,
        "recency_hours": pl.Float64,
        "click": pl.Int8,
        "click_probability": pl.Float64,
    }
    assert day_frame(SMALL, SMALL.start).schema == expected
    assert tuple(expected) == (KEY, "day", *FEATURES, LABEL, TRUTH)
    assert len(FEATURES) == 12


@pytest.mark.parametrize("chunk_rows", [1_234, 4_999, 5_000, 1_000_000])
def test_a_day_again_is_the_same_day_whatever_the_chunks(chunk_rows: int) -> None:
    whole = day_frame(SMALL, day_of(3))
    chunks = list(generate_day(SMALL, day_of(3), chunk_rows=chunk_rows))
    assert max(map(len, chunks)) == min(chunk_rows, SMALL.rows_per_day)
    assert pl.concat(chunks).equals(whole, null_equal=True)


def test_a_day_alone_is_the_day_among_others() -> None:
    alone = day_frame(SMALL, day_of(2))
    among = pl.concat([day_frame(SMALL, day_of(index)) for index in (4, 2, 0)])
    assert among.filter(pl.col("day") == day_of(2)).equals(alone, null_equal=True)


def test_a_longer_day_begins_like_a_shorter_one() -> None:
    longer = day_frame(SMALL.model_copy(update={"rows_per_day": 7_000}), day_of(1))
    assert longer.head(5_000).equals(day_frame(SMALL, day_of(1)), null_equal=True)


def test_numbers_are_pinned() -> None:
    frame = day_frame(SMALL, date(2026, 3, 7)).head(3)
    pinned = frame.select("impression_id", "user_id", "item_id", "device", "category", "click").rows()
    assert pinned == PINNED
    assert frame["click_probability"].to_list() == pytest.approx(PINNED_PROBABILITY, abs=1e-9)


def test_another_seed_is_another_log_in_another_world() -> None:
    other = SMALL.model_copy(update={"seed": 1})
    assert not day_frame(other, SMALL.start)["user_id"].equals(day_frame(SMALL, SMALL.start)["user_id"])
    assert not planted_effects(other, INTERACTIONS[0]).equals(planted_effects(SMALL, INTERACTIONS[0]))


# Ids


def test_keys_are_unique_over_days_and_exact_in_a_float() -> None:
    keys = five_days()[KEY]
    assert keys.n_unique() == len(five_days())
    assert keys.cast(pl.Float64).cast(pl.Int64).equals(keys)


def test_five_days_show_more_than_100k_users_some_of_them_often() -> None:
    counts = five_days()["user_id"].value_counts()["count"]
    assert len(counts) > 100_000
    assert (counts > 500).any()


def test_every_day_brings_ids_that_no_earlier_day_had() -> None:
    frame = five_days().with_columns(user_numbers(five_days()).alias("user"))
    for field, first, births, share in (
        ("user", CONFIG.users, 1_500, CONFIG.new_user_share),
        ("item_id", CONFIG.items, 200, CONFIG.new_item_share),
    ):
        for index in range(5):
            born = pl.col(field).is_between(first + index * births, first + (index + 1) * births - 1)
            assert frame.filter(born, pl.col("day") < day_of(index)).is_empty()
            assert frame.filter(pl.col("day") == day_of(index)).select(born.mean()).item() == pytest.approx(
                share, abs=2e-3
            )
        assert (frame[field] < first + 5 * births).all()


def test_what_belongs_to_an_id_never_changes() -> None:
    frame = five_days()
    for owner, field in (("item_id", "category"), ("item_id", "advertiser"), ("item_id", "tags"), ("user_id", "age")):
        values = frame.drop_nulls(field).group_by(owner).agg(pl.col(field).n_unique())
        assert values[field].max() == 1, field
    assert frame.group_by("user_id").agg(pl.col("country").n_unique())["country"].max() == 1


def test_an_effect_depends_on_the_id_alone() -> None:
    ids = np.array([3, 151_000, 7])
    together = id_effect(CONFIG, "user_id", ids)
    assert together[1] == id_effect(CONFIG, "user_id", ids[1:2])[0]
    assert not np.array_equal(together, id_effect(CONFIG, "item_id", ids))
    assert id_effect(CONFIG, "user_id", np.arange(100_000)).std() == pytest.approx(0.25, abs=0.003)


# Missing values


def test_missing_shares_are_as_announced() -> None:
    shares = five_days().select(pl.all().is_null().mean()).row(0, named=True)
    announced = {"price": 0.05, "age": 0.10, "advertiser": 0.02, "tags": 0.03}
    for name, share in shares.items():
        assert share == pytest.approx(announced.get(name, 0), abs=5e-3), name
    for name in ("price", "recency_hours", TRUTH):
        assert five_days()[name].is_finite().all()


def test_bags_hold_none_to_five_tags_and_no_tag_twice() -> None:
    tags = five_days()["tags"].drop_nulls()
    assert sorted(tags.list.len().unique()) == [0, 1, 2, 3, 4, 5]
    assert tags.list.n_unique().equals(tags.list.len())
    assert set(tags.explode().drop_nulls()) == set(LEVELS["tags"])


# The truth


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.6])
def test_the_mean_probability_is_the_click_rate(rate: float) -> None:
    frame = day_frame(SyntheticConfig(click_rate=rate, rows_per_day=200_000, seed=7), day_of(0))
    assert frame[TRUTH].mean() == pytest.approx(rate, rel=0.015)
    assert frame[LABEL].mean() == pytest.approx(rate, rel=0.03)


def test_clicks_are_drawn_from_their_probabilities() -> None:
    bins = (
        five_days()
        .group_by((pl.col(TRUTH) * 20).floor())
        .agg(
            error=(pl.col(LABEL) - pl.col(TRUTH)).sum(),
            deviation=(pl.col(TRUTH) * (1 - pl.col(TRUTH))).sum().sqrt(),
        )
    )
    assert len(bins) == 20
    assert ((bins["error"] / bins["deviation"]).abs() < 4).all()


@pytest.mark.parametrize("pair", INTERACTIONS)
def test_no_level_of_an_interaction_has_a_main_effect(pair: tuple[str, str]) -> None:
    effects = planted_effects(CONFIG, pair)
    assert len(effects) == len(LEVELS[pair[0]]) * len(LEVELS[pair[1]])
    log = five_days().join(effects, on=pair, how="left", validate="m:1")
    assert log["effect"].std() == pytest.approx(1, abs=0.02)
    for field in pair:
        levels = log.group_by(field).agg(mean=pl.col("effect").mean(), error=pl.col("effect").std() / pl.len().sqrt())
        assert (levels["mean"].abs() < 0.01 + 4 * levels["error"]).all()


@pytest.mark.slow
def test_a_linear_model_sees_the_interactions_only_as_planted_crosses() -> None:
    crossed = five_days().select(
        pl.col(MAIN).cast(pl.String).fill_null("?"),
        *(pl.concat_str(pair, separator="/").alias("/".join(pair)) for pair in INTERACTIONS),
    )
    crosses = ["/".join(pair) for pair in INTERACTIONS]
    click, truth = five_days()[LABEL].to_numpy(), five_days()[TRUTH].to_numpy()
    seen = np.arange(len(click)) % 5 < 3  # 300k rows to fit, 200k to measure

    def auc(columns: list[str]) -> float:
        hot = sparse.csr_matrix(OneHotEncoder().fit_transform(crossed.select(columns).to_numpy()))
        model = LogisticRegression(max_iter=30, tol=1e-3).fit(hot[seen], click[seen])
        return float(roc_auc_score(click[~seen], model.decision_function(hot[~seen])))

    oracle = float(roc_auc_score(click[~seen], truth[~seen]))
    linear, planted = auc(MAIN), auc([*MAIN, *crosses])
    assert 0.80 < oracle < 0.85
    assert linear < oracle - 0.15
    assert planted - linear > 0.85 * (oracle - linear)


# The funnel: as it is, and what turning it on leaves alone


def test_without_the_funnel_the_log_is_what_it_always_was() -> None:
    frame = day_frame(SyntheticConfig(rows_per_day=2_000, seed=5), day_of(2))
    rows = [[f"{value:.9g}" if isinstance(value, float) else value for value in row] for row in frame.rows()]
    assert hashlib.sha256("\n".join(map(repr, rows)).encode()).hexdigest() == PINNED_LOG


def test_the_funnel_adds_columns_and_moves_no_other() -> None:
    off, on = small(), small(**RATES)
    added = [pl.Int8, pl.Int8, pl.Float64, pl.Float64, pl.Float64]
    assert on.schema == pl.Schema({**off.schema, **dict(zip(FUNNEL, added, strict=True))})
    assert on.columns == [*off.columns, CONVERSION, POTENTIAL, DELAY, CONVERSION_TRUTH, BOTH_TRUTH]
    assert on.select(off.columns).equals(off, null_equal=True)


def test_the_dials_move_outcomes_and_no_feature() -> None:
    off, on = small(), small(**DIALS, **RATES)
    assert on.select(KEY, *FEATURES).equals(off.select(KEY, *FEATURES), null_equal=True)
    assert not on[LABEL].equals(off[LABEL])
    clicks_alone = small(taste=1, confounding=1.5)
    assert clicks_alone.equals(on.select(off.columns), null_equal=True)


def test_a_funnel_in_chunks_and_alone_is_the_same() -> None:
    config = SyntheticConfig.model_validate({"rows_per_day": 5_000, **RATES, **DIALS})
    whole = day_frame(config, day_of(3))
    assert pl.concat(generate_day(config, day_of(3), chunk_rows=1_234)).equals(whole, null_equal=True)
    longer = day_frame(config.model_copy(update={"rows_per_day": 7_000}), day_of(3))
    assert longer.head(5_000).equals(whole, null_equal=True)


def test_the_numbers_of_a_funnel_are_pinned() -> None:
    config = SyntheticConfig.model_validate({"rows_per_day": 100, "conversion_rate": 0.3, **DIALS, "confounding": 1})
    comes = day_frame(config, date(2026, 3, 7)).filter(pl.col(DELAY).is_not_null()).head(3)
    assert comes.select(KEY, CONVERSION, POTENTIAL).rows() == [row[:3] for row in PINNED_FUNNEL]
    assert comes[DELAY].to_list() == pytest.approx([row[3] for row in PINNED_FUNNEL], abs=1e-9)
    chances = comes.select(TRUTH, CONVERSION_TRUTH, BOTH_TRUTH).to_numpy()
    assert chances == pytest.approx(np.array(PINNED_CHANCES), abs=1e-9)


# The funnel: rates and probabilities


@pytest.mark.parametrize("dials", [{}, {"taste": 1.0, "confounding": 1.0}])
@pytest.mark.parametrize(("click_rate", "conversion_rate"), [(0.2, 0.3), (0.03, 0.005)])
def test_both_rates_are_met(click_rate: float, conversion_rate: float, dials: dict[str, float]) -> None:
    frame = funnel(click_rate=click_rate, conversion_rate=conversion_rate, **dials)
    assert frame[TRUTH].mean() == pytest.approx(click_rate, rel=0.02)
    assert frame[LABEL].mean() == pytest.approx(click_rate, rel=0.04)
    assert frame[CONVERSION_TRUTH].mean() == pytest.approx(conversion_rate, rel=0.02)
    assert frame[POTENTIAL].mean() == pytest.approx(conversion_rate, rel=0.1)


@pytest.mark.parametrize("dials", [{}, {"confounding": 1.5}, {"taste": 1.0, "confounding": 1.0}])
def test_outcomes_are_drawn_from_their_probabilities(dials: dict[str, float]) -> None:
    frame = funnel(**dials).with_columns(both=pl.col(LABEL) * pl.col(POTENTIAL))
    for outcome, truth in ((LABEL, TRUTH), (POTENTIAL, CONVERSION_TRUTH), ("both", BOTH_TRUTH)):
        deciles = (
            frame.group_by(pl.col(truth).rank("ordinal") * 10 // (len(frame) + 1))
            .agg(error=(pl.col(outcome) - pl.col(truth)).sum(), variance=(pl.col(truth) * (1 - pl.col(truth))).sum())
            .with_columns(z=pl.col("error") / pl.col("variance").sqrt())
        )
        assert len(deciles) == 10
        assert deciles["z"].abs().max() < 4, outcome  # type: ignore[operator]


def test_without_confounding_the_probabilities_multiply_and_the_draws_are_independent() -> None:
    frame = funnel()
    assert frame[BOTH_TRUTH].equals(frame[TRUTH] * frame[CONVERSION_TRUTH], check_names=False)
    assert abs(dependence(frame)) < 4
    clicked = frame.filter(pl.col(LABEL) == 1)
    assert clicked[POTENTIAL].mean() == pytest.approx(clicked[CONVERSION_TRUTH].mean(), abs=0.008)


def test_confounding_makes_converters_of_those_who_click() -> None:
    frame = funnel(confounding=1.5)
    assert (frame[BOTH_TRUTH] > frame[TRUTH] * frame[CONVERSION_TRUTH]).all()
    assert dependence(frame) > 50
    clicked, others = frame.filter(pl.col(LABEL) == 1), frame.filter(pl.col(LABEL) == 0)
    assert clicked.select(pl.col(POTENTIAL).mean() - pl.col(CONVERSION_TRUTH).mean()).item() > 0.1
    assert others.select(pl.col(POTENTIAL).mean() - pl.col(CONVERSION_TRUTH).mean()).item() < -0.03


def dependence(frame: pl.DataFrame) -> float:
    """Of click and would_convert beyond their probabilities, in standard errors of independence."""
    click, converts, p, q = (frame[name].to_numpy() for name in (LABEL, POTENTIAL, TRUTH, CONVERSION_TRUTH))
    return float(((click - p) * (converts - q)).sum() / np.sqrt((p * (1 - p) * q * (1 - q)).sum()))


def test_the_hidden_normal_is_no_function_of_the_ids() -> None:
    """Else an id's errors would agree, and their sum vary more than its probabilities say."""
    error = (pl.col(POTENTIAL) - pl.col(CONVERSION_TRUTH)).sum()
    variance = (pl.col(CONVERSION_TRUTH) * (1 - pl.col(CONVERSION_TRUTH))).sum()
    for owner in ("user_id", "item_id"):
        often = funnel(confounding=1.5).group_by(owner).agg(square=error**2 / variance, rows=pl.len())
        assert often.filter(pl.col("rows") >= 10)["square"].mean() == pytest.approx(1, abs=0.1)


# The funnel: taste, and effects of ids


@pytest.mark.slow
def test_taste_makes_those_who_click_more_likely_to_convert() -> None:
    lifts: list[float] = []
    for taste in (0.0, 1.0, 2.0):
        frame = funnel(taste=taste)
        clicked = pl.col(CONVERSION_TRUTH).filter(pl.col(LABEL) == 1).mean()
        lifts.append(frame.select(clicked - pl.col(CONVERSION_TRUTH).mean()).item())
    assert abs(lifts[0]) < 0.05  # shared columns alone
    assert lifts[1] > lifts[0] + 0.05
    assert lifts[2] > lifts[1] + 0.05


@pytest.mark.parametrize("column", [TRUTH, CONVERSION_TRUTH])
def test_taste_adds_the_affinity_to_both_logits(column: str) -> None:
    frame = small(**RATES, taste=2)
    expected = 2 * affinity(CONFIG, user_numbers(frame).to_numpy(), frame["item_id"].to_numpy())
    added = logit(frame, column) - logit(small(**RATES), column)
    assert (added - expected).std() < 1e-9
    assert expected.std() > 1


def test_affinity_is_a_function_of_two_ids() -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 150_000, 200_000), rng.integers(0, 20_000, 200_000)
    both = affinity(CONFIG, user, item)
    assert both.std() == pytest.approx(1, abs=0.01)
    assert both[7] == affinity(CONFIG, user[7:8], item[7:8])[0]
    assert not np.array_equal(both, affinity(SyntheticConfig(seed=1), user, item))
    for one_user, share in ((True, 0.64), (False, 0.23)):  # averaged over the others, what is left is the id's own
        ids = np.arange(400)
        grid = affinity(CONFIG, np.repeat(ids, 400), np.tile(ids, 400)).reshape(400, 400)
        assert grid.mean(axis=0 if one_user else 1).var() == pytest.approx(share, abs=0.12)


def test_conversions_have_effects_of_their_own() -> None:
    ids = np.arange(100_000)
    for field in ("user_id", "item_id"):
        click, conversion = id_effect(CONFIG, field, ids), conversion_effect(CONFIG, field, ids)
        assert conversion[41] == conversion_effect(CONFIG, field, ids[41:42])[0]
        assert abs(np.corrcoef(click, conversion)[0, 1]) < 0.015


def test_the_conversion_logit_is_the_sum_of_its_effects() -> None:
    """On rows without tags: what is left is the intercept."""
    bare = small(**RATES).drop_nulls(["advertiser", "price"]).filter(pl.col("tags").list.len().fill_null(0) == 0)
    rest = logit(bare, CONVERSION_TRUTH) + 0.5 * (np.log(bare["price"].to_numpy()) - 1.5) / 0.8
    ids = {"user_id": user_numbers(bare).to_numpy(), "item_id": bare["item_id"].to_numpy()}
    for field in ("advertiser", "category", "device", "country", "placement"):
        ids[field] = bare[field].cast(pl.Enum(LEVELS[field])).to_physical().cast(pl.Int64).to_numpy()
    for field, of_field in ids.items():
        rest -= conversion_effect(CONFIG, field, of_field)
    assert len(bare) > 3_000
    assert rest.std() < 1e-9


# The funnel: when conversions arrive


def test_a_conversion_is_a_click_that_converts() -> None:
    frame = funnel()
    assert frame[CONVERSION].equals(frame[LABEL] * frame[POTENTIAL], check_names=False)
    assert frame[DELAY].is_not_null().equals(frame[CONVERSION] == 1, check_names=False)
    assert frame[DELAY].max() == 0


def test_delays_follow_their_mean() -> None:
    frame = funnel(conversion_delay_days=4)
    comes = frame[LABEL] * frame[POTENTIAL] == 1
    assert frame[DELAY].is_not_null().equals(comes, check_names=False)
    delay = frame[DELAY].drop_nulls()
    assert len(delay) > 12_000
    assert delay.mean() == pytest.approx(4, rel=0.04)
    assert delay.median() == pytest.approx(4 * np.log(2), rel=0.05)
    assert frame.drop(DELAY).equals(funnel().drop(DELAY), null_equal=True)  # until when is not said: all are seen


def test_what_arrives_after_the_last_day_is_not_in_the_log() -> None:
    dials = {**RATES, "conversion_delay_days": 3}
    everything, seen = small(**dials), small(**dials, observed_until=day_of(2))
    late = everything[DELAY] >= 3  # 2.9 days after the first day is the third
    assert 0.3 < late.mean() < 0.45  # type: ignore[operator]
    assert seen.drop(CONVERSION).equals(everything.drop(CONVERSION), null_equal=True)
    assert seen[CONVERSION].equals((everything[CONVERSION] == 1).set(late.fill_null(False), False).cast(pl.Int8))


def test_the_same_day_seen_later_has_more_conversions() -> None:
    dials = {**RATES, "conversion_delay_days": 3}
    seen = [small(**dials, observed_until=day_of(last))[CONVERSION] for last in (0, 1, 5, 60)]
    for earlier, later in pairwise(seen):
        assert (earlier <= later).all()
        assert earlier.sum() < later.sum()
    on_the_day = small(**dials)[DELAY] < 1
    assert seen[0].sum() == on_the_day.sum() > 100


def test_the_command_line_writes_a_funnel(tmp_path: Path) -> None:
    given = ["--click-rate=0.2", "--conversion-rate=0.3", "--taste=1", "--confounding=1.5", "--delay-days=3"]
    arguments = ["generate", f"--out={tmp_path}", "--days=2026-03-02", "--rows=500", *given]
    result = CliRunner().invoke(main, [*arguments, "--observed-until=2026-03-09"])
    assert result.exit_code == 0, result.output
    config = SyntheticConfig.model_validate({"rows_per_day": 500, **RATES, **DIALS})
    expected = day_frame(config, date(2026, 3, 2)).drop("day")
    assert pl.read_parquet(tmp_path / "day=2026-03-02" / "*.parquet", hive_partitioning=False).equals(expected)
    refused = CliRunner().invoke(main, [*arguments, "--observed-until=2026-02-01"])
    assert refused.exit_code == 2
    assert "observed_until = 2026-02-01" in refused.output


# Drift


def drifting(**dials: object) -> SyntheticConfig:
    dials = {"rows_per_day": 20_000, "users": 5_000, "items": 2_000, "drift": 0.1, **dials}
    return SyntheticConfig.model_validate(dials)


@pytest.mark.slow
@pytest.mark.parametrize("dials", [{}, {**RATES, "taste": 1.0, "confounding": 1.5}])
def test_drift_starts_from_the_log_without_it(dials: dict[str, object]) -> None:
    on, off = drifting(**dials), drifting(**dials, drift=0.0)
    assert day_frame(on, day_of(0)).equals(day_frame(off, day_of(0)), null_equal=True)
    assert not day_frame(on, day_of(1)).equals(day_frame(off, day_of(1)), null_equal=True)


def test_numbers_of_a_drifting_day_are_pinned() -> None:
    frame = day_frame(SMALL.model_copy(update={"drift": 0.1}), date(2026, 3, 7)).head(3)
    pinned = [("u70783", 168, "phone", 0), ("u6510", 3, "phone", 0), ("u98542", 17, "phone", 0)]
    assert frame.select("user_id", "item_id", "device", "click").rows() == pinned
    assert frame[TRUTH].to_list() == pytest.approx([0.106045131318, 0.314526855673, 0.022419265250], abs=1e-9)


def test_a_drifting_day_alone_is_the_day_among_others_whatever_the_chunks() -> None:
    config = drifting(rows_per_day=3_000)
    frames = {index: day_frame(config, day_of(index)) for index in (4, 0, 9)}
    for index in (9, 4):
        again = pl.concat(generate_day(config, day_of(index), chunk_rows=700))
        assert again.equals(frames[index], null_equal=True)


@pytest.mark.slow
def test_effects_are_forgotten_exponentially_and_keep_their_spread() -> None:
    config, ids = drifting(drift=0.05), np.arange(40_000)
    pair = (ids, ids[::-1])
    for of_day, match in (
        (lambda day: id_effect(config, "item_id", ids, day), 0.0),
        (lambda day: conversion_effect(config, "user_id", ids, day), 0.0),
        (lambda day: affinity(config, *pair, day), 0.13),  # of which the match, a product, is forgotten twice as fast
    ):
        days = {day: of_day(day) for day in (0, 1, 3, 10, 17, 30)}
        for day in days:
            assert days[day].std() == pytest.approx(days[0].std(), rel=0.03)
        for a, b in ((0, 1), (0, 3), (3, 10), (10, 17), (0, 30), (10, 30)):
            found = np.corrcoef(days[a], days[b])[0, 1]
            kept = np.exp(-0.05 * (b - a))
            assert found == pytest.approx((1 - match) * kept + match * kept**2, abs=0.02)
    cells = [planted_effects(config, ("country", "placement"), day)["effect"].to_numpy() for day in (0, 1, 20)]
    near, far = (np.corrcoef(cells[0], later)[0, 1] for later in cells[1:])
    assert near > 0.85 > 0.65 > far


def test_a_drifting_logit_is_the_sum_of_the_days_effects() -> None:
    """On rows without tags: what is left is the intercept; so the probabilities are known on every day."""
    config = drifting(**RATES, taste=1.0)
    bare = day_frame(config, day_of(12)).drop_nulls(["advertiser", "price"])
    bare = bare.filter(pl.col("tags").list.len().fill_null(0) == 0)
    rest = logit(bare, CONVERSION_TRUTH) + 0.5 * (np.log(bare["price"].to_numpy()) - 1.5) / 0.8
    ids = {"user_id": user_numbers(bare).to_numpy(), "item_id": bare["item_id"].to_numpy()}
    rest -= affinity(config, ids["user_id"], ids["item_id"], 12)
    for field in ("advertiser", "category", "device", "country", "placement"):
        ids[field] = bare[field].cast(pl.Enum(LEVELS[field])).to_physical().cast(pl.Int64).to_numpy()
    for field, of_field in ids.items():
        rest -= conversion_effect(config, field, of_field, 12)
    assert len(bare) > 1_000
    assert rest.std() < 1e-9


DRIFTED = {f"{drift} on day {index}": (drift, index) for drift in (0.05, 0.2) for index in (1, 9, 29)}


@pytest.mark.parametrize(("drift", "index"), quick(DRIFTED, "0.2 on day 29"))
def test_rates_stay_while_taste_moves(drift: float, index: int) -> None:
    config = drifting(rows_per_day=100_000, drift=drift, taste=1.0, **RATES)
    frame = day_frame(config, day_of(index))
    assert frame[TRUTH].mean() == pytest.approx(0.2, abs=0.004)
    assert frame[CONVERSION_TRUTH].mean() == pytest.approx(0.3, abs=0.004)
    for label, chance in ((LABEL, TRUTH), (POTENTIAL, CONVERSION_TRUTH)):
        error = frame[label] - frame[chance]
        assert abs(error.mean()) < 4 * error.std() / 100_000**0.5  # pyright: ignore


@pytest.mark.slow
def test_what_was_learned_yesterday_is_worth_more_than_what_was_learned_last_month() -> None:
    """By the click rate of each item and of each pair of levels: no more than lookups."""
    config = drifting(rows_per_day=50_000, drift=0.05, taste=1.0, users=500, items=200)
    fields = (["item_id"], ["device", "category"], ["country", "placement"])
    target = day_frame(config, day_of(30))
    areas: list[float] = []
    for age in (1, 4, 12, 30):
        old = day_frame(config, day_of(30 - age))
        score = np.zeros(len(target))
        for columns in fields:
            rate = old.group_by(columns).agg(rate=(pl.col(LABEL).sum() + 4) / (pl.len() + 20))
            found = target.join(rate, on=columns, how="left", maintain_order="left")["rate"]
            found = found.fill_null(0.2).to_numpy()
            score += np.log(found / (1 - found))
        areas.append(float(roc_auc_score(target[LABEL], score)))
    assert all(young > old + 0.01 for young, old in pairwise(areas)), areas


@pytest.mark.slow
def test_ids_fade_as_others_are_born() -> None:
    config, days = drifting(rows_per_day=50_000), (0, 1, 2, 10, 28, 30)
    counts = {index: day_frame(config, day_of(index))["item_id"].value_counts() for index in days}
    shown = {index: set(of_day["item_id"].to_list()) for index, of_day in counts.items()}
    for index in days[1:]:
        born = set(range(config.items + index * 20, config.items + (index + 1) * 20))
        assert shown[index] & born
        assert not any(born & shown[earlier] for earlier in days if earlier < index)
    often = set(counts[0].filter(pl.col("count") > 10)["item_id"].to_list())  # chance hides none of them
    for index in (1, 10, 28):
        gone = len(often - shown[index]) / len(often)
        assert gone == pytest.approx(1 - np.exp(-index / 100), abs=0.04)
    most = [of_day["count"].sort().tail(100).sum() for of_day in counts.values()]
    assert most == pytest.approx([most[0]] * len(most), rel=0.1)  # popularity stays
    lasting = {index: set(day_frame(drifting(drift=0.0), day_of(index))["item_id"].to_list()) for index in (0, 30)}
    assert set(range(50)) <= lasting[0] & lasting[30]  # without drift, the popular ones never fade


def test_the_command_line_drifts(tmp_path: Path) -> None:
    arguments = ["generate", f"--out={tmp_path}", "--days=2026-03-04", "--rows=500", "--drift=0.05"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    expected = day_frame(SyntheticConfig(rows_per_day=500, drift=0.05), date(2026, 3, 4)).drop("day")
    assert pl.read_parquet(tmp_path / "day=2026-03-04" / "*.parquet", hive_partitioning=False).equals(expected)


# Refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rows_per_day", 0), ("rows_per_day", 1 << 32), ("users", 3), ("items", 0), ("seed", -1), ("start", "soon")),
        *(("click_rate", 0.0), ("click_rate", 1.0), ("new_user_share", 1.5), ("new_item_share", -0.1)),
        *(("clickrate", 0.2), ("conversion_rate", 0.0), ("conversion_rate", 1.0), ("taste", -1.0), ("taste", 11.0)),
        *(
            ("drift", -0.1),
            ("drift", 1.5),
            ("confounding", -0.1),
            ("confounding", 4.0),
            ("conversion_delay_days", -1.0),
            ("observed_until", "soon"),
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(SyntheticConfig, {key: value}, source="run.toml")


@pytest.mark.parametrize(("key", "value"), [("conversion_delay_days", 2.0), ("observed_until", "2026-03-09")])
def test_what_needs_conversions_is_refused_without_them(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"run.toml: {key} = {value}: .*set conversion_rate"):
        parse_config(SyntheticConfig, {key: value}, source="run.toml")
    parse_config(SyntheticConfig, {key: value, "conversion_rate": 0.1}, source="run.toml")


def test_conversions_are_not_observed_before_the_log_begins() -> None:
    with pytest.raises(ConfigError, match=r"observed_until = 2026-02-28: .*2026-03-01"):
        parse_config(SyntheticConfig, {"conversion_rate": 0.1, "observed_until": "2026-02-28"}, source="run.toml")


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        SMALL.seed = 1  # type: ignore[misc]


def test_a_day_before_the_first_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"2026-02-28.*2026-03-01"):
        generate_day(SMALL, date(2026, 2, 28))


def test_an_empty_chunk_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="chunk_rows = 0"):
        generate_day(SMALL, SMALL.start, chunk_rows=0)
